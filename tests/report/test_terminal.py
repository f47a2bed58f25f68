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
    assert "unavailable tensorrt (10 rows): no NVIDIA driver answers → install the driver" in text
    assert "built, not run tensorrt_rtx (10 rows)" in text
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
