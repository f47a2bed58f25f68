import io
import re
from typing import Any

import pytest
from rich.console import Console

from deployopt.report import profiles, render
from deployopt.report.terminal import render_bench

QAT = ("qat", "openvino", "int8", 1)


def row(report: dict[str, Any], key: tuple[str, str, str, int]) -> dict[str, Any]:
    return next(r for r in report["rows"] if (r["variant"], r["backend"], r["precision"], r["batch"]) == key)


def test_where_the_time_goes_and_what_is_not_int8(report: dict[str, Any]) -> None:
    profile = row(report, QAT)["profile"]
    assert profiles.by_kind(profile) == "Convolution 70 %, MatMul 25 %, Reorder 4 %"
    assert profiles.slowest_layer(profile) == "conv1 + relu1 (Convolution, int8) 70 %"
    assert profiles.not_int8(profile) == "5 % of the time: added by the runtime (Reorder, fp32) 4 %, pool (Pooling, fp32) 1 %"
    assert profiles.not_int8(profile, named=1) == "5 % of the time: added by the runtime (Reorder, fp32) 4 %, and 1 more layer"
    assert profiles.caption(row(report, QAT)) == "qat/openvino/int8/b1: Convolution 70 %, MatMul 25 %, Reorder 4 %; not INT8 5 %"


def test_an_int8_row_that_is_wholly_int8_says_so(report: dict[str, Any]) -> None:
    profile = row(report, QAT)["profile"]
    for layer in profile["layers"]:
        layer["precision"] = "int8"
    assert profiles.not_int8(profile) == "no layer"
    assert profiles.caption(row(report, QAT)).endswith("; not INT8 0 %")


def test_float_rows_are_not_asked_what_is_not_int8(report: dict[str, Any]) -> None:
    assert "INT8" not in profiles.caption(row(report, ("prune", "openvino", "fp32", 1)))
    assert all(where.split("/")[2] == "int8" for where, _ in profiles.sentences(report["rows"]))


def test_a_share_too_small_to_round_up_is_not_zero(report: dict[str, Any]) -> None:
    profile = row(report, QAT)["profile"]
    assert [profiles.share(part * profile["total_us"], profile) for part in (0.0, 0.004, 0.006)] == ["0 %", "< 1 %", "1 %"]


def test_tables_list_the_slowest_first_and_sum_up_the_others(report: dict[str, Any]) -> None:
    profile = row(report, QAT)["profile"]
    assert [(cells[0], cells[4]) for cells in profiles.table(profile)] == [("conv1 + relu1", "70 %"), ("fc", "25 %"), ("(reorder)", "4 %"), ("pool", "1 %")]
    assert [(cells[0], cells[4]) for cells in profiles.table(profile, shown=1)] == [("conv1 + relu1", "70 %"), ("3 other layers", "30 %")]


def test_the_terminal_answers_both_questions_for_each_int8_row(report: dict[str, Any]) -> None:
    text = render(report, "terminal")
    section = text[text.index("where the time goes") :].partition("\n\n")[0]
    assert re.findall(r"^(\S+):", section, re.MULTILINE) == ["qat/onnxruntime/int8/b1", "qat/openvino/int8/b1"]
    told = " ".join(section.split())
    assert "Convolution 70 %, MatMul 25 %, Reorder 4 %; slowest conv1 + relu1 (Convolution, int8) 70 %" in told
    assert "not INT8: 5 % of the time: added by the runtime (Reorder, fp32) 4 %, pool (Pooling, fp32) 1 %" in told
    assert all(len(line) <= 100 for line in section.splitlines())


@pytest.mark.parametrize("kind", ["terminal", "markdown", "html"])
def test_the_contract_says_when_layers_were_timed(report: dict[str, Any], kind: str) -> None:
    text = " ".join(render(report, kind).split()).replace("&#39;", "'")
    assert "layers: 50 runs by the runtime's own profiler · in a session of its own after the timed rounds" in text


def test_markdown_compares_the_sum_with_the_measured_latency(report: dict[str, Any]) -> None:
    text = render(report, "markdown")
    assert "<summary>Where the time goes</summary>" in text
    section = text[text.index("<summary>Where the time goes</summary>") :]
    line = next(line for line in section.splitlines() if line.startswith("| qat/openvino/int8/b1"))
    assert line.count("0.255 ms") == 2
    assert "| conv1 + relu1 (Convolution, int8) 70 % | 5 % of the time: added by the runtime" in line


def test_the_page_draws_the_recommended_artifact_and_folds_the_others(report: dict[str, Any]) -> None:
    html = render(report, "html")
    section = re.search(r'<section id="layers".*?</section>', html, re.DOTALL)
    assert section is not None
    shown, _, folded = section[0].partition("<details>")
    assert "qat/openvino/int8/b1: Convolution 70 %, MatMul 25 %, Reorder 4 %; not INT8 5 %" in shown
    assert shown.count("<figcaption>") == 1
    assert "qat/onnxruntime/int8/b1" in folded
    assert "Not INT8: 5 % of the time: added by the runtime (Reorder, fp32) 4 %, pool (Pooling, fp32) 1 %." in shown
    assert "Layers&#39; sum 0.255 ms over 50 profiled runs, p50 0.255 ms without the profiler." in shown
    assert ">70 %<" in shown
    assert ">4 %, fp32<" in shown  # told without colour
    assert 'class="f2"' in shown  # INT8
    assert 'class="f0"' in shown  # FP32


def test_the_page_draws_the_recommended_artifact_at_the_batch_that_was_profiled(report: dict[str, Any]) -> None:
    report["recommended"]["row"] = report["rows"].index(row(report, ("qat", "onnxruntime", "int8", 8)))
    shown = render(report, "html").partition('<section id="layers"')[2].partition("<details>")[0]
    assert "qat/onnxruntime/int8/b1: Convolution" in shown


def test_the_page_sums_up_what_it_does_not_draw(report: dict[str, Any]) -> None:
    profile = row(report, QAT)["profile"]
    profile["layers"] += [{**profile["layers"][2], "name": f"pool{i}", "nodes": [f"pool{i}"]} for i in range(20)]
    section = render(report, "html").partition('<section id="layers"')[2].partition("</section>")[0]
    assert "4 other layers" in section.partition("<details>")[0]
    assert "and 10 more layers." in section
    assert ">pool19<" in section.partition("As a table")[2]


def test_reports_without_profiles_say_nothing_of_layers(report: dict[str, Any]) -> None:
    for each in report["rows"]:
        each["profile"] = None
    for kind in ("terminal", "markdown", "html"):
        text = render(report, kind)
        assert "not INT8" not in text
        assert "here the time goes" not in text
        assert "layers: " not in text
    for each in report["rows"]:
        del each["profile"]  # as reports were before
    assert "not INT8" not in render(report, "html")


@pytest.mark.parametrize("width", [80, 100])
def test_bench_lists_layers(report: dict[str, Any], width: int) -> None:
    console = Console(file=io.StringIO(), width=width, no_color=True)
    with console.capture() as captured:
        render_bench([row(report, QAT)], console)
    text = captured.get()
    assert "qat b1: where the time goes  Convolution 70 %, MatMul 25 %, Reorder 4 %" in text
    assert "not INT8: 5 % of the time: added by the runtime (Reorder, fp32) 4 %," in " ".join(text.split())
    assert re.search(r"conv1 \+ relu1 +Convolution +int8 +\d+ +70 %", text)
    assert "layers' sum 0.255 ms over 50 profiled runs, p50 0.255 ms without the profiler" in text
    assert all(len(line.rstrip()) <= width for line in text.splitlines())


def test_bench_keeps_a_layer_on_one_line(report: dict[str, Any]) -> None:
    row(report, QAT)["profile"]["layers"][1]["nodes"] = [f"body.layer{i}.0.conv{i}" for i in range(20)]
    console = Console(file=io.StringIO(), width=80, no_color=True)
    with console.capture() as captured:
        render_bench([row(report, QAT)], console)
    assert re.search(r"^body\.layer0\.0\.conv0 \+ .*… +Convolution +int8 +\d+ +70 %$", captured.get(), re.MULTILINE)
