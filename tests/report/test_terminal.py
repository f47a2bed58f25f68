import io
from typing import Any

import pytest
from rich.console import Console

from deployopt.report import render, terminal


def printed(report: dict[str, Any], width: int, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    terminal.render(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [100, 80, 60])
def test_no_line_is_wider_than_the_terminal_but_paths(report: dict[str, Any], width: int) -> None:
    paths = (report["run"], f"  {report['run']}")
    lines = [line for line in printed(report, width).splitlines() if not line.startswith(paths)]
    assert max(map(len, lines)) <= width


def test_hundred_columns_show_every_figure(report: dict[str, Any]) -> None:
    text = printed(report, 100)
    line = next(line for line in text.splitlines() if line.startswith("qat") and "openvino" in line)
    for figure in ("int8", "98.25", "−0.08", "0.255", "0.279", "7.92x", "7.80–8.05", "21/21", "4.31 MB"):
        assert figure in line


def test_eighty_columns_keep_one_line_a_row_and_the_main_figures(report: dict[str, Any]) -> None:
    text = printed(report, 80)
    line = next(line for line in text.splitlines() if line.startswith("qat") and "openvino" in line)
    for figure in ("openvino", "int8", "98.25", "0.255", "7.92x"):
        assert figure in line


def test_absences_are_one_line_each_with_remedy(report: dict[str, Any]) -> None:
    text = " ".join(printed(report, 100).split())
    assert text.count("unavailable") == 1
    assert "unavailable tensorrt fp32, fp16, int8 (10 rows): no NVIDIA driver answers → install the driver" in text
    assert "built, not run tensorrt_rtx fp32, fp16, int8 (10 rows)" in text
    assert "SIGSEGV in libonnxruntime [core dumped]" in text  # brackets are no markup
    assert "MAD/median 0.12 exceeds its limit" in text


def test_budget_misses_come_first(report: dict[str, Any]) -> None:
    report["budget"] = {"met": False, "violations": [{"limit": "min_speedup", "sentence": "speed-up: wanted at least 9x"}]}
    assert printed(report, 100).startswith("BUDGET MISSED speed-up: wanted at least 9x")


def test_contract_recommendation_and_paths_are_said(report: dict[str, Any]) -> None:
    text = printed(report, 100)
    assert "24 blocks × 4000 iterations" in text
    assert "06-build/qat-openvino-int8.onnx" in text
    for name in ("report.json", "report.md", "report.html"):
        assert f"{report['run']}/{name}" in text


def test_no_escape_codes_off_a_terminal(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in printed(report, 100)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in printed(report, 100, force_terminal=True)
    assert "\x1b" not in render(report, "terminal")


def test_a_report_without_rows(report: dict[str, Any]) -> None:
    report.update(rows=[], variants=[], recommended=None, budget={"met": True, "violations": []})
    assert "no deployable row was measured" in printed(report, 100)


def bench_row(name: str, p50: float, speedup: float | None, bounds: list[float] | None, **other: Any) -> dict[str, Any]:
    host = {"n": 2000, "p50": p50, "p90": p50 * 1.1, "p99": p50 * 1.3, "p50_ci95": [p50 * 0.99, p50 * 1.01]}
    row = {"variant": name, "backend": "onnxruntime", "precision": "fp32", "batch": 1, "status": "ok", "reason": None, "latency_ms": {"host": host}}
    return {**row, "throughput_per_s": 1e3 / p50, "speedup": speedup, "speedup_ci95": bounds, "verified": None, "contract": None, **other}


def benched(rows: list[dict[str, Any]], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    terminal.render_bench(rows, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_bench_says_who_is_faster_who_is_not_and_who_failed() -> None:
    failed = bench_row("broken", 1.0, None, None, status="failed", reason="no such kernel → install it", latency_ms=None, throughput_per_s=None)
    rows = [bench_row("finetune", 4.0, 1.0, [1.0, 1.0]), bench_row("qat", 0.77, 5.2, [5.1, 5.3]), bench_row("same", 4.0, 1.0, [0.98, 1.03]), failed]
    slow = bench_row("slow", 8.0, 0.5, [0.49, 0.51], status="invalid", reason="MAD/median is 0.40 (limit 0.25)")
    text = benched([*rows, slow])
    assert "qat is 5.20x faster than finetune, 5.10–5.30" in text
    assert "no difference between same and finetune: 0.98–1.03 covers 1" in text
    assert "slow is 2.00x slower than finetune, 1.96–2.04 (doubtful: slow invalid)" in text
    assert "broken cannot be compared with finetune: broken was not measured" in text
    assert "failed broken b1: no such kernel → install it" in text
    line = next(line for line in text.splitlines() if line.startswith("qat "))
    assert line.split() == ["qat", "onnxruntime", "fp32", "0.770", "[0.762–0.778]", "0.847", "1.00", "1299", "5.20x", "[5.10–5.30]"]


def test_bench_shows_what_runs_in_int8() -> None:
    """Of what is typed as INT8 only; where nothing is, there is no column."""
    verified = {"quantized_layers": 19, "quantizable_layers": 21, "executed": {"int8": 19, "fp32": 2}}
    rows = [
        bench_row("a", 4.0, 1.0, [1.0, 1.0]),
        *(bench_row(n, 2.0, 2.0, [1.9, 2.1], precision="int8", verified=v) for n, v in (("b", verified), ("c", None))),
    ]
    lines = benched(rows).splitlines()
    assert [next(line for line in lines if line.startswith(f"{name} ")).split()[2:4] for name in "abc"] == [["fp32", "–"], ["int8", "19/21"], ["int8", "?"]]
    assert "INT8" not in benched(rows[:1])


def test_bench_says_where_and_what_the_device_clock_showed() -> None:
    where = {
        "cpu": {"model": "CPU A", "cores": 2, "isa": ["avx2"]},
        "gpus": [{"name": "GPU A", "driver": "570.1"}],
        "versions": {"tensorrt": "11.0", "torch": None},
    }
    row = bench_row("engine", 1.0, 1.0, None, contract={"clock": "host, device", "blocks": 20, "environment": where})
    row["latency_ms"]["device"] = {"p50": 0.625}
    text = benched([row], width=140)
    assert "CPU A · 2 cores (avx2) · GPU A, driver 570.1" in text
    assert "\ntensorrt 11.0\n" in text
    assert "device" in text.splitlines()[1]
    assert "0.625" in text


def test_bench_fits_a_narrow_terminal() -> None:
    text = benched([bench_row("finetune", 4.0, 1.0, [1.0, 1.0]), bench_row("qat", 0.77, 5.2, [5.1, 5.3])], width=60)
    assert max(map(len, text.splitlines())) <= 60
    assert "5.20x" in text
