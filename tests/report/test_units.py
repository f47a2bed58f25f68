import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployopt.report import units


@pytest.mark.parametrize(
    ("value", "text"), [(0.0412, "0.0412"), (4.123, "4.12"), (41.23, "41.2"), (412.3, "412"), (4123.0, "4123"), (0, "0"), (-0.5, "−0.500"), (None, "–")]
)
def test_significant(value: float | None, text: str) -> None:
    assert units.significant(value) == text


@given(st.floats(min_value=1e-6, max_value=1e9))
def test_significant_keeps_three_digits(value: float) -> None:
    assert float(units.significant(value)) == pytest.approx(value, rel=6e-3)


def test_suffixes_and_signs() -> None:
    assert units.count(140_848_138) == "141 M"
    assert units.size(2_912_345) == "2.91 MB"
    assert units.size(980) == "980 B"
    assert units.seconds(192.2) == "3 min 12 s"
    assert units.seconds(3720) == "1 h 2 min"
    assert [units.time_left(s) for s in (4.4, 192.2)] == ["about 4 s left", "about 3 min 12 s left"]
    assert units.signed(-0.001) == "0.00"
    assert units.signed(-0.277) == "−0.28"
    assert units.interval([0.4012, 0.4231]) == "0.401–0.423"
