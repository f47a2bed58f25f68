import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from deployopt.errors import ArtifactError
from deployopt.report import history

KEY = "qat/openvino/int8/b1"


def line(p50_ms: float | None, machine: str = "CPU A", fingerprint: str = "a", score: float = 0.98) -> dict[str, Any]:
    rows = {} if p50_ms is None else {KEY: {"p50_ms": p50_ms, "p50_ci95_ms": [p50_ms * 0.99, p50_ms * 1.01], "score": score, "size_bytes": 1000}}
    return {
        "schema": 1,
        "time": "2026-01-01T00:00:00Z",
        "run": "run <1>",
        "recipe": "r",
        "machine": {"name": machine, "fingerprint": fingerprint},
        "gate_met": True,
        "task": {"name": "classification", "primary": "top1", "unit": "", "higher_is_better": True},
        "rows": rows,
    }


def comparison(report: dict[str, Any], reran: bool, **row: Any) -> dict[str, Any]:
    rows = [{"key": KEY, "ratio": 1.0, "new_p50_ms": 0.5, **row}, {"key": "gone/openvino/int8/b1", "ratio": None, "new_p50_ms": None}]
    return {
        "base": "b",
        "new": "n",
        "time": "T",
        "environment": report["environment"],
        "reran": reran,
        "gate": {"asked": True, "met": False},
        "rows": rows,
    }


def test_an_entry_holds_what_was_measured_and_where(report: dict[str, Any]) -> None:
    stored = history.entry(report, comparison(report, False))
    assert list(stored["rows"]) == [KEY]
    assert stored["rows"][KEY]["p50_ci95_ms"] is not None
    assert stored["rows"][KEY]["score"] == pytest.approx(0.9825)
    assert (stored["gate_met"], stored["recipe_sha256"]) == (False, report["recipe_sha256"])
    ungated = comparison(report, False) | {"gate": {"asked": False, "met": True}}
    assert history.entry(report, ungated)["gate_met"] is None
    assert history.entry(report, comparison(report, True))["rows"][KEY]["p50_ci95_ms"] is None  # the stored interval is of other figures
    assert history.entry(report, comparison(report, True, ratio=None))["rows"] == {}


def test_the_fingerprint_follows_what_latency_depends_on(report: dict[str, Any]) -> None:
    here = comparison(report, False)
    there = copy.deepcopy(here)
    there["environment"]["utc"] = "later"
    assert history.entry(report, there)["machine"] == history.entry(report, here)["machine"]
    there["environment"]["gpus"] = [{"name": "GPU", "driver": "550"}]
    with_gpu = history.entry(report, there)["machine"]
    there["environment"]["gpus"][0]["driver"] = "560"
    fingerprints = {history.entry(report, c)["machine"]["fingerprint"] for c in (here, there)} | {with_gpu["fingerprint"]}
    assert len(fingerprints) == 3


def test_lines_are_appended_and_read(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    for p50 in (1.0, 0.9):
        history.append(path, line(p50))
    assert [e["rows"][KEY]["p50_ms"] for e in history.read(path)] == [1.0, 0.9]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        (json.dumps(line(1.0)) + '\n{"schema": 1, "ti', ":2 is not whole JSON"),
        ('{"schema": 1}\n', ":1 is no entry"),
        (json.dumps({**line(1.0), "machine": {}}) + "\n", ":1 is no entry"),
        (json.dumps({**line(1.0), "rows": {KEY: {"score": 1.0}}}) + "\n", ":1 is no entry"),
        (json.dumps({**line(1.0), "task": {}}) + "\n", ":1 is no entry of a history: task has no 'primary'"),
        (json.dumps({**line(1.0), "rows": {KEY: {"p50_ms": 1.0, "p50_ci95_ms": None}}}) + "\n", f"{KEY} has no 'score'"),
        (json.dumps({**line(1.0), "rows": {KEY: {"p50_ms": 1.0, "score": 0.9}}}) + "\n", f"{KEY} has no 'p50_ci95_ms'"),
        (json.dumps(line(1.0)) + "\n" + json.dumps(line(0.0)) + "\n", r":2 is no entry.*p50_ms: wanted greater than 0, found 0\.0"),
        (json.dumps(line(1.0, score=float("nan"))) + "\n", r"score: wanted a finite number, found nan"),
        ("5\n", ":1 is no entry of a history: it: wanted a valid dictionary"),
        (json.dumps({**line(1.0), "schema": 2}) + "\n", "wanted history schema 1, found 2"),
    ],
)
def test_damaged_histories_name_the_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "h.jsonl"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=said):
        history.read(path)
    if text:
        with pytest.raises(ArtifactError):
            history.append(path, line(1.0))
        assert path.read_text() == text


def test_a_line_without_its_end_is_not_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    path.write_text(json.dumps(line(1.0)))
    with pytest.raises(ArtifactError, match="last line does not end"):
        history.append(path, line(1.0))


def test_the_table_is_of_the_newest_machine() -> None:
    text = history.render_markdown([line(9.0, "CPU B", "b"), line(1.0), line(2.0), line(1.5)])
    assert "3 runs on CPU A" in text
    assert "1 run on other machines left out" in text
    assert "▁█▅" in text
    assert "−25.0 %" in text
    assert "98.00 %" in text


def test_curves_break_where_the_machine_changed() -> None:
    page = history.render_html(
        [line(1.0), line(1.1), line(0.5, "CPU <B>", "b"), line(0.6, "CPU <B>", "b"), line(None, "CPU <B>", "b"), line(0.7, "CPU <B>", "b")]
    )
    latency = page.split('class="wide"')[1].split('class="narrow"')[0]
    assert latency.count("<polyline") == 3
    assert latency.count("data-tip") == 5
    assert "CPU &lt;B&gt;" in page
    assert "CPU <B>" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize(("met", "shown"), [(True, "met"), (False, "missed"), (None, "–")])
def test_gates_that_nobody_asked_for_are_neither_met_nor_missed(tmp_path: Path, met: bool | None, shown: str) -> None:
    path = tmp_path / "h.jsonl"
    history.append(path, {**line(1.0), "gate_met": met})
    page = history.render_html(history.read(path))
    assert [cell for cell in re.findall(r"<td[^>]*>([^<]*)</td>", page) if cell in {"met", "missed", "–"}] == [shown]


def test_swept_rows_have_curves_of_their_own() -> None:
    entry = line(1.0)
    entry["rows"] |= {f"{KEY}/offline-t1": {**entry["rows"][KEY], "p50_ms": 7.0}}
    page = history.render_html([entry, entry])
    assert "Latency: openvino, batch 1<" in page
    assert "Latency: openvino, batch 1, offline-t1<" in page
    assert "int8, batch" not in page
    scores = page.split("Accuracy<")[1].split('class="narrow"')[0]
    assert scores.count("<polyline") == 1
