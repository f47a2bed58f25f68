import io
import re
from typing import Any

from rich.console import Console

from deployopt.report import profiles, render
from deployopt.report.terminal import render_bench


def row(report: dict[str, Any], key: tuple[str, str, str, int]) -> dict[str, Any]:
    return next(r for r in report["rows"] if (r["variant"], r["backend"], r["precision"], r["batch"]) == key)


QAT = ("qat", "openvino", "int8", 1)


def test_shares_and_names(report: dict[str, Any]) -> None:
    found = row(report, QAT)
    assert profiles.not_int8(found["profile"]) == "5 %"
    assert [cells[0] for cells in profiles.layers(found)] == ["conv1 + relu1", "fc", "(reorder)", "2 other layers"]
    assert [cells[4] for cells in profiles.layers(found)] == ["70 %", "25 %", "4 %", "1 %"]
    assert [cells[0] for cells in profiles.layers(found, shown=1)] == ["conv1 + relu1", "4 other layers"]
    assert profiles.layers(found, shown=1)[1][4] == "30 %"


def test_the_terminal_has_one_line_for_each_int8_row(report: dict[str, Any]) -> None:
    lines = [line for line in render(report, "terminal").splitlines() if "of the time not in INT8" in line]
    assert len(lines) == 4  # two backends at two batch sizes
    assert "qat/openvino/int8/b1: 5 % of the time not in INT8; slowest: conv1 + relu1, int8, 70 %" in lines
    assert all(len(line) <= 100 for line in lines)


def test_markdown_compares_the_sum_with_the_measured_latency(report: dict[str, Any]) -> None:
    text = render(report, "markdown")
    assert "<summary>Where the time goes</summary>" in text
    line = next(line for line in text.splitlines() if line.startswith("| qat/openvino/int8/b1"))
    assert line.count("0.255 ms") == 2
    assert "conv1 + relu1 (int8) 70 %" in line


def test_the_page_draws_the_recommended_row_and_folds_the_others(report: dict[str, Any]) -> None:
    html = render(report, "html")
    section = re.search(r'<section id="layers".*?</section>', html, re.S)
    assert section is not None
    shown, _, folded = section[0].partition("<details>")
    assert "qat/openvino/int8/b1: 5 % of the time not in INT8" in shown
    assert shown.count("<figcaption>") == 1
    assert "qat/onnxruntime/int8/b1" in folded
    assert "layers&#39; sum 0.255 ms, p50 0.255 ms; 50 profiled runs." in shown
    assert 'class="f2"' in shown  # INT8
    assert 'class="f0"' in shown  # FP32


def test_reports_without_profiles_say_nothing_of_layers(report: dict[str, Any]) -> None:
    for each in report["rows"]:
        each["profile"] = None
    for kind in ("terminal", "markdown", "html"):
        text = render(report, kind)
        assert "not in INT8" not in text
        assert "Where the time goes" not in text
    for each in report["rows"]:
        del each["profile"]  # as reports were before
    assert "not in INT8" not in render(report, "html")


def test_bench_lists_layers(report: dict[str, Any]) -> None:
    console = Console(file=io.StringIO(), width=100, no_color=True)
    with console.capture() as captured:
        render_bench([row(report, QAT)], console)
    text = captured.get()
    assert "layers' sum 0.255 ms, p50 0.255 ms; 5 % of the layers' time not in INT8" in text
    assert re.search(r"conv1 \+ relu1 +Convolution +int8 +\d+ +70 %", text)
