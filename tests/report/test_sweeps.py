import re
from typing import Any

import pytest

from deployopt.report import charts, html, markdown, render, summary, sweeps, verdict


@pytest.fixture
def swept(report: dict[str, Any]) -> dict[str, Any]:
    """The report with batch 2 too, and offline rows of OpenVINO on the run's two threads and on one, five times as fast as its single stream."""
    rows: list[dict[str, Any]] = [{**r, "batch": 2} for r in summary.measured(report["rows"]) if r["batch"] == 1]
    for row in [*summary.measured(report["rows"]), *rows]:
        if row["backend"] == "openvino":
            facts = {"scenario": "offline", "throughput_per_s": 5 * row["throughput_per_s"], "throughput_ci95": [1000.0, 1010.0]}
            rows += [{**row, **facts, "sweep": "offline"}, {**row, **facts, "sweep": "offline-t1", "threads": 1}]
    return {**report, "rows": [*report["rows"], *rows]}


def test_curves_go_over_batch_sizes_with_the_runs_own_threads(swept: dict[str, Any]) -> None:
    found = sweeps.curves(swept["rows"], "batch", "throughput")
    assert list(found) == ["finetune", "prune", "qat"]
    sessions = [("torch fp32", False), ("onnxruntime int8", False), ("openvino int8", False), ("openvino int8", True)]
    assert [(c.session, c.offline) for c in found["qat"]] == sessions
    single, offline = ({x: y for x, y, _ in c.points} for c in found["qat"][2:])
    assert sorted(single) == [1, 2, 8]
    assert offline[8] == pytest.approx(5 * single[8])


def test_one_batch_size_makes_no_curve(report: dict[str, Any]) -> None:
    found = sweeps.curves(report["rows"], "batch", "throughput")
    assert {len(c.points) for curves in found.values() for c in curves} == {2}
    assert sweeps.curves([r for r in report["rows"] if r["batch"] == 1], "batch", "throughput") == {}


def test_latency_is_of_single_streams_only(swept: dict[str, Any]) -> None:
    found = sweeps.curves(swept["rows"], "batch", "latency")
    assert not any(c.offline for curves in found.values() for c in curves)


def test_curves_over_threads_need_several_numbers_of_them(swept: dict[str, Any], report: dict[str, Any]) -> None:
    assert sweeps.curves(report["rows"], "threads", "throughput") == {}
    (curve,) = sweeps.curves(swept["rows"], "threads", "throughput")["qat"]
    assert (curve.session, curve.offline, [x for x, _, _ in curve.points]) == ("openvino int8", True, [1, 2])
    assert "batch 8" in curve.points[0][2]


@pytest.mark.parametrize("lack", ["threads", "throughput_per_s"])
@pytest.mark.parametrize("missing", [True, False])
def test_rows_that_do_not_tell_a_figure_have_no_point(swept: dict[str, Any], lack: str, missing: bool) -> None:
    untold = next(r for r in swept["rows"] if (r["variant"], r["batch"], r.get("sweep")) == ("qat", 8, "offline-t1"))
    untold[lack] = None
    if missing:
        del untold[lack]
    assert sweeps.curves(swept["rows"], "threads", "throughput").keys() == {"finetune", "prune"}
    for format in ("html", "terminal", "markdown"):
        text = render(swept, format)
        assert ("offline, threads unknown" in text) == (lack == "threads"), format


def test_the_table_shows_what_is_known(swept: dict[str, Any]) -> None:
    row = summary.measured(swept["rows"])[0]
    row["contract"] |= {"load_ms": 12.34, "first_inference_ms": 7.89}
    found = sweeps.table(swept["rows"])
    assert found is not None
    headers, body = found
    assert headers[-4:] == ["images/s [95 %]", "first inference ms", "load ms", "peak memory"]
    assert body[0][-3:] == ["7.89", "12.3", "210 MB"]
    assert sorted({r[4] for r in body})[:1] == ["offline, 1 thread"]
    assert sweeps.table([r for r in swept["rows"] if r["status"] == "unavailable"]) is None


def test_the_device_clock_has_a_column_where_there_is_one(report: dict[str, Any]) -> None:
    first, second = summary.measured(report["rows"])[:2]
    first["latency_ms"]["device"] = {"p50": 0.31, "p50_ci95": [0.3, 0.32]}
    found = sweeps.table([first, second])
    assert found is not None
    column = found[0].index("device p50 ms [95 %]")
    assert [cells[column] for cells in found[1]] == ["0.310 [0.300–0.320]", ""]
    assert r"0.310 \[0.300–0.320\]" in markdown.render(report)
    assert "0.310 [0.300–0.320]" in html.render(report)


def test_gpu_power_is_of_rows_that_ran_there(report: dict[str, Any]) -> None:
    row = summary.measured(report["rows"])[0]
    row["contract"] |= {"device": "cuda:0", "load": {"gpu_power_w": 311.6}}
    row["device_memory_bytes"] = 540_000_000
    found = sweeps.table([row])
    assert found is not None
    assert found[1][0][-2:] == ["540 MB", "312 W"]


def test_a_disturbed_row_shows_no_figure_that_depends_on_time(report: dict[str, Any]) -> None:
    row = summary.measured(report["rows"])[0]
    row["contract"] |= {"load_ms": 12.34}
    found = sweeps.table([row, {**row, "variant": "disturbed", "status": "invalid"}])
    assert found is not None
    headers, (_, disturbed) = found
    cells = dict(zip(headers, disturbed, strict=True))
    assert (cells["p50 ms"], cells["p90 ms"], cells["images/s [95 %]"]) == ("invalid", "", "")
    assert (cells["load ms"], cells["peak memory"]) == ("12.3", "210 MB")


def test_swept_rows_are_shown_and_never_judged(report: dict[str, Any], swept: dict[str, Any]) -> None:
    task = summary.task_of(report)
    assert verdict.judge(swept["rows"], swept["variants"], {}, task) == verdict.judge(report["rows"], report["variants"], {}, task)
    assert "qat/openvino/int8/b8/offline-t1" in {summary.row_key(r) for r in swept["rows"]}
    page = html.render(swept)
    assert "qat: throughput by batch size" in page
    assert "qat: throughput by threads" in page
    assert "offline, 1 thread" in markdown.render(swept)


def test_the_terminal_keeps_its_tables_and_adds_one(report: dict[str, Any], swept: dict[str, Any]) -> None:
    before, after = render(report, "terminal"), render(swept, "terminal")
    assert "other scenarios" not in before
    assert "other scenarios" in after
    assert "offline, 1 thread" in after
    assert after.count("batch 1  ms") == 1
    assert max(map(len, after.splitlines())) <= max(map(len, before.splitlines()))


def test_the_contract_says_which_rows_were_launched_as_a_cuda_graph(swept: dict[str, Any]) -> None:
    row = swept["rows"][0]
    said = [{**row, "contract": {**row["contract"], "cuda_graph": how}} for how in ("on", "on", "refused: no reason")]
    assert "CUDA graph on (2 rows), refused: no reason (1 row)" in summary.contract_lines(said)[0]
    assert "CUDA graph on ·" in summary.contract_lines(said[:2])[0]
    assert "CUDA" not in summary.contract_lines([row])[0]


def test_the_contract_names_offline_streams(swept: dict[str, Any]) -> None:
    offline = {**summary.swept(swept["rows"])[0]}
    offline["contract"] = {**offline["contract"], "scenario": "offline", "streams": 2}
    assert "offline 2 streams" in summary.contract_lines([offline])[0]
    assert "stream" not in summary.contract_lines(summary.own(swept["rows"]))[0]


def test_ticks_stand_at_the_batch_sizes_that_were_measured() -> None:
    series = charts.Series("torch fp32", 0, False, [(1.0, 3.0, ""), (8.0, 5.0, "")])
    drawn = charts.curves([series], [], 500, y_title="images/s", show_y=charts.tick_label, label="throughput", x_log_from=4)
    ticks = re.findall(r'text-anchor="middle"[^>]*>([^<]+)<', drawn)
    assert ticks == ["1", "8"]
