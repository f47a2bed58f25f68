import json
import re
from pathlib import Path
from typing import Any

import pytest

from deployopt import report as reports
from deployopt.errors import ArtifactError, UsageError


def test_written_reports_read_back(report: dict[str, Any], tmp_path: Path) -> None:
    paths = reports.write_all(report, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    assert reports.load(tmp_path) == reports.load(paths["json"]) == report


@pytest.mark.parametrize("format", reports.FORMATS)
def test_every_format_renders_the_recommended_row(report: dict[str, Any], format: str) -> None:
    text = reports.render(report, format)
    assert "openvino" in text
    assert text.endswith("\n")


def test_unknown_format_lists_the_known(report: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"unknown report format 'pdf' .*terminal, markdown, html, json, junit"):
        reports.render(report, "pdf")


def test_figures_that_are_not_finite_are_refused_and_located(report: dict[str, Any], tmp_path: Path) -> None:
    report["rows"][3]["speedup"] = float("nan")
    with pytest.raises(ArtifactError, match=r"report\.rows\[3\]\.speedup"):
        reports.write_all(report, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ArtifactError, match=r"rows\[3\]"):
        reports.render(report, "json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"schema": 1, "rows": [', "not whole JSON"),
        ("[1]", "not a report"),
        ('{"schema": 2, "deployopt": "9.0"}', r"wanted report schema 1, found schema 2 \(written by deployopt 9.0\)"),
        ('{"schema": 1, "rows": []}', "it has no 'variants'"),
        ('{"schema": 1, "variants": [{}], "rows": []}', r"variants\[0\] has no 'name'"),
        ('{"schema": 1, "variants": [], "rows": [{"variant": "a", "backend": "b", "precision": "c"}]}', r"rows\[0\] has no 'batch'"),
        ('{"schema": 1, "variants": [], "rows": ["fast"]}', r"rows\[0\]: wanted a valid dictionary, found 'fast'"),
    ],
)
def test_damaged_reports_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ArtifactError, match=message) as caught:
        reports.load(tmp_path)
    assert caught.value.remedy


@pytest.mark.parametrize("figure", ["NaN", "-Infinity", "1e999"])
def test_a_stored_figure_that_is_not_finite_is_refused(report: dict[str, Any], tmp_path: Path, figure: str) -> None:
    """No gate is missed by a NaN."""
    report["rows"][2]["accuracy"]["top1"] = "FIGURE"
    (tmp_path / "report.json").write_text(json.dumps(report).replace('"FIGURE"', figure))
    with pytest.raises(ArtifactError, match=r"not finite at report\.rows\[2\]\.accuracy\.top1"):
        reports.load(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("rows", 1, "latency_ms"), 5, r"rows\[1\]\.latency_ms: wanted a valid dictionary, found 5"),
        (("rows", 1, "latency_ms", "host"), {}, r"rows\[1\]\.latency_ms\.host has no 'p50'"),
        (("rows", 1, "latency_ms", "host", "p50"), 0, r"host\.p50: wanted greater than 0, found 0"),
        (("rows", 1, "latency_ms", "host", "p50_ci95"), [1.0], r"host\.p50_ci95: .* found \[1\.0\]"),
        (("rows", 1, "threads"), 0, r"rows\[1\]\.threads: wanted greater than 0, found 0"),
        (("rows", 1, "threads"), "two", r"rows\[1\]\.threads: wanted a valid integer, found 'two'"),
        (("rows", 1, "accuracy", "top1"), "high", r"rows\[1\]\.accuracy\.top1: wanted a number, found 'high'"),
        (("rows", 1, "contract", "blocks"), "many", r"contract\.blocks: wanted a valid integer, found 'many'"),
        (("variants", 0, "curves", 0, "validation_top1"), [], r"variants\[0\]\.curves\[0\]\.validation_top1: wanted a number"),
        (("recommended", "row"), 999, r"recommended\.row: wanted one of its \d+ rows, counted from 0, found 999"),
        (("recommended", "row"), -1, r"recommended\.row: wanted greater than or equal to 0"),
        (("recommended",), {"row": 0}, r"recommended has no 'why'"),
        (("task",), {"primary": "top1"}, r"task has no 'unit'"),
        (("environment", "cpu"), "fast", r"environment\.cpu: wanted a valid dictionary"),
        (("budget", "violations"), [{}], r"budget\.violations\[0\] has no 'limit'"),
    ],
)
def test_a_report_of_another_form_is_refused_where_it_is_read(
    report: dict[str, Any], tmp_path: Path, path: tuple[str | int, ...], value: Any, message: str
) -> None:
    target: Any = report
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = value
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ArtifactError, match=message) as caught:
        reports.load(tmp_path)
    assert caught.value.remedy == reports.RERUN


def test_missing_reports_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        reports.load(tmp_path / "nowhere")
    (tmp_path / "log.txt").write_text("x")
    with pytest.raises(UsageError, match=r"holds log\.txt"):
        reports.load(tmp_path)


def test_truncation_at_any_byte_is_an_error_of_ours(report: dict[str, Any], tmp_path: Path) -> None:
    text = json.dumps(report)
    for cut in range(0, len(text) - 1, len(text) // 25):
        (tmp_path / "report.json").write_text(text[:cut])
        with pytest.raises(ArtifactError):
            reports.load(tmp_path)


@pytest.mark.parametrize("format", ["terminal", "markdown", "html"])
def test_a_note_is_shown_once_for_all_batches(report: dict[str, Any], format: str) -> None:
    for row in report["rows"]:
        if (row["backend"], row["precision"]) == ("onnxruntime", "int8"):
            row["notes"] = ["19 of 21 layers only"]
    text = reports.render(report, format)
    assert text.count("19 of 21 layers only") == 1
    assert "qat onnxruntime int8" in text


@pytest.mark.parametrize("format", ["markdown", "html"])
def test_sensitivity_is_shown_layer_by_layer(report: dict[str, Any], format: str) -> None:
    text = re.sub(r"\\(.)", r"\1", reports.render(report, format))
    assert "Sensitivity of each layer: qat" in text
    for wanted in ("body.layer1.0.conv1", "0.0400", "+5.2 %", "body.conv1 to float 98.06 %", "All in INT8: 0.0500"):
        assert wanted in text
    report["variants"][2]["record"] = {}
    assert "Sensitivity of each layer" not in reports.render(report, format)


@pytest.mark.parametrize("format", ["markdown", "html"])
def test_of_a_quantisation_record_of_another_form_what_is_there_is_told(report: dict[str, Any], format: str) -> None:
    record = report["variants"][2]["record"]["quantization"]
    del record["float_layers"], record["mixed_precision"]["trace"]
    text = re.sub(r"\\(.)", r"\1", reports.render(report, format))
    assert "All in INT8: 0.0500" in text
    assert "Kept in float: none" in text
    assert "Chosen for a drop" not in text
    record["sensitivity"]["layers"] = [{"name": "body.conv1"}]
    assert "Sensitivity of each layer" not in reports.render(report, format)
