from hypothesis import given
from hypothesis import strategies as st

from deployopt.report import charts

NUMBERS = st.lists(st.floats(min_value=1e-4, max_value=1e6), min_size=1, max_size=30)


@given(NUMBERS, st.booleans())
def test_scale_keeps_order_and_stays_inside(values: list[float], logarithmic: bool) -> None:
    scale = charts.Scale(values, 50, 450, log_from=10 if logarithmic else None)
    places = [scale(v) for v in sorted(values)]
    assert places == sorted(places)
    assert all(50 <= p <= 450 for p in places)
    ticks = scale.ticks()
    assert len(ticks) <= 13
    assert all(49 <= scale(t) <= 451 for t in ticks)


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(0, 1)), min_size=1, max_size=20), st.booleans())
def test_pareto_points_are_beaten_by_none_and_beat_all_others(points: list[tuple[float, float]], higher: bool) -> None:
    sign = 1 if higher else -1
    front = set(charts.pareto(points, higher_y=higher))
    assert front
    for i, (x, y) in enumerate(points):
        beaten = any(px <= x and sign * py >= sign * y and (px, py) != (x, y) for px, py in points)
        if i in front:
            assert not beaten
        else:
            assert beaten or (x, y) in [points[j] for j in front]


def test_text_is_escaped() -> None:
    assert "<b>" not in charts.text(0, 0, "<b>")
    assert '"><b>' not in charts.marker(0, 0, 0, "mark", tip='"><b>')
