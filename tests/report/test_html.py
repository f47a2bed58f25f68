import re
from html.parser import HTMLParser
from typing import Any

import pytest

from deployopt.report.html import render

VOID = {"meta", "link", "br", "circle", "rect", "line", "polygon", "polyline"}


class Page(HTMLParser):
    """Checks nesting; gathers tags, attributes and visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_it_is_well_nested_small_and_offline(report: dict[str, Any]) -> None:
    html = render(report)
    page = Page(html)
    assert not page.open
    assert len(html.encode()) < 3_000_000
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", html)
    assert all(value and value.startswith(("#", "data:,")) for name, value in page.attributes if name in {"href", "src"})
    assert page.tags.count("h1") == 1
    identifiers = [value for name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))


def test_every_promised_chart_is_there_and_labelled(report: dict[str, Any]) -> None:
    page = Page(render(report))
    headings = " ".join(page.text)
    for title in (
        "Accuracy against latency",
        "What each stage bought",
        "Latency distributions",
        "Size and MACs by stage",
        "Training curves",
        "Confusion matrix: qat",
    ):
        assert title in headings
    tips = [value or "" for name, value in page.attributes if name == "data-tip"]
    measured = [r for r in report["rows"] if r["status"] == "ok"]
    for row in measured:
        assert any(tip.startswith(f"{row['variant']} {row['backend']} {row['precision']}, batch {row['batch']}\n") for tip in tips)
    assert sum(name == "aria-label" for name, _ in page.attributes) >= len(tips)


def test_hostile_names_are_text(report: dict[str, Any]) -> None:
    hostile = '<script>alert("x")</script>'
    report["classes"][0] = report["variants"][-1]["details"]["classes"][0] = hostile
    report["variants"][0]["name"] = report["rows"][0]["variant"] = hostile
    report["rows"][-1]["reason"] = hostile
    report["environment"]["cpu"]["model"] = hostile
    page = Page(render(report))
    assert page.tags.count("script") == 1
    assert "alert" in "".join(page.text)


def test_every_variant_has_its_confusion_matrix_and_the_last_is_open(report: dict[str, Any]) -> None:
    first, last = report["variants"][0], report["variants"][-1]
    first["details"] = {**last["details"], "confusion": [[54 if i == j else 0 for j in range(10)] for i in range(10)]}
    page = render(report)
    shown, _, folded = page[page.index('id="confusion"') :].partition("<details><summary>Confusion matrix: ")
    assert f"Confusion matrix: {last['name']}" in shown
    assert folded.startswith(first["name"])
    assert f"{last['name']}: 533 of 540 right; {first['name']}: 540 of 540 right." in " ".join(Page(page).text)


def test_every_measured_row_tells_its_bytes_its_figures_and_its_contract(report: dict[str, Any]) -> None:
    text = " ".join(Page(render(report)).text)
    measured = [row for row in report["rows"] if row.get("contract")]
    assert len(measured) > 3
    for row in measured:
        assert f"Contract and figures of {row['variant']}/{row['backend']}/{row['precision']}/b{row['batch']}" in text
        assert row["artifact"]["sha256"] in text
    assert text.count("latency_ms.host.std") == text.count("contract.clock") == len(measured)


def test_too_many_classes_become_a_table_of_worst_pairs(report: dict[str, Any]) -> None:
    n = 200
    matrix = [[50 if i == j else 0 for j in range(n)] for i in range(n)]
    matrix[3][7] = 9
    for variant in report["variants"]:
        variant["details"] = {"confusion": matrix, "classes": [f"class {i}" for i in range(n)]}
    text = " ".join(Page(render(report)).text)
    assert "200 classes are too many to draw" in text
    assert "class 7" in text
    assert "class 8" not in text


def test_regression_units_and_direction(report: dict[str, Any]) -> None:
    report["task"] = {"name": "regression", "primary": "mae", "unit": "years", "higher_is_better": False}
    for row in report["rows"]:
        if row["accuracy"]:
            row["accuracy"] = {"primary": "mae", "mae": 4.2 if row["variant"] == "finetune" else 4.4}
    text = " ".join(Page(render(report)).text)
    assert "4.200 years" in text
    assert "Better is down and to the left" in text


@pytest.mark.parametrize("missing", ["curves", "details", "accuracy", "macs", "params", "size_bytes"])
def test_parts_that_a_run_lacks_are_left_out(report: dict[str, Any], missing: str) -> None:
    for variant in report["variants"]:
        variant[missing] = None
    assert not Page(render(report)).open


def test_a_report_without_rows(report: dict[str, Any]) -> None:
    report.update(rows=[], variants=[], recommended=None, budget={"met": True, "violations": []})
    assert "no deployable row was measured" in " ".join(Page(render(report)).text)
