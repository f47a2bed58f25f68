"""Pruning's facts in the report: sentences, the search's trace, the sensitivity table and its bars."""

import io
import re
from html import unescape
from typing import Any

import pytest
from rich.console import Console

from deployopt.report import html, markdown, terminal

READING = {"ratio": 0.497, "ratio_ci95": [0.49, 0.504], "ms": 1.02, "parent_ms": 2.05, "blocks": 40, "invalid": None}
FACTS = {
    "target": {"latency": {"backend": "openvino", "batch": 1, "ratio": 0.5}},
    "reached": {"macs": 0.41, "params": 0.37},
    "alignment": {"round_to": 8, "backend": "openvino", "batch": 1, "ratio": {"1": 0.6, "8": 0.5}, "p50_ms": {"1": 1.2, "8": 1.0}},
    "sparse": {"strength": 5e-4, "alpha": 4.0, "small_channels": {"before": 0.0, "after": 0.31}},
    "latency": [{"iteration": 1, "goal": 0.5, "reached": READING, "trace": [{"macs_ratio": 0.41, **READING, "confirming": True}]}],
    "against_parent": {"backend": "openvino", "batch": 1, **READING},
    "sensitivity": {
        "metric": "top1",
        "n": 360,
        "whole": 0.98,
        "ratios": [0.25, 0.5],
        "groups": [{"name": "body.conv1", "channels": 64, "scores": [0.97, 0.61]}, {"name": "body.<i>", "channels": 32, "scores": [0.98, 0.985]}],
    },
    "whole": {
        "groups": 12,
        "left": [
            *({"name": f"body.{n}.conv1", "channels": 8, "why": "round_to 8 leaves nothing to cut"} for n in range(8)),
            {"name": "body.<p>", "channels": 16, "why": "the network's code takes their number for granted"},
        ],
    },
    "parametrizations_removed": ["body.stem"],
}


@pytest.fixture
def pruned(report: dict[str, Any]) -> dict[str, Any]:
    next(v for v in report["variants"] if v["name"] == "prune")["record"] = {"pruning": FACTS}
    return report


def test_both_formats_say_what_was_reached_and_measured(pruned: dict[str, Any]) -> None:
    for text in (html.render(pruned), markdown.render(pruned).replace("\\", "")):
        assert "body.<i>" not in text
        assert "arget 0.5 of the latency on openvino at batch 1 in FP32; kept 41.0 % of the MACs" in text
        assert "multiples of 8, the fastest on openvino at batch 1 in FP32 (1: 1.20 ms, 8: 1.00 ms)" in text
        assert "faster than the uncut network on openvino at batch 1: 0.497 of its p50 (95 % 0.490–0.504, 40 blocks" in text
        assert "from 0.0 % to 31.0 %" in text
        assert "confirming" in text
        assert "9 of 12 groups of channels stayed whole: body.0.conv1 (8), " in text
        assert "body.5.conv1 (8) and 2 more, since round_to 8 leaves nothing to cut, body.<p> (16), since the network's code takes" in unescape(text)
        assert "without what parametrised them, in body.stem" in text
        assert "61.00 %" in text


def test_a_cut_of_every_group_says_nothing_of_whole_ones(pruned: dict[str, Any]) -> None:
    cut = {**FACTS, "whole": {"groups": 12, "left": []}, "parametrizations_removed": []}
    next(v for v in pruned["variants"] if v["name"] == "prune")["record"] = {"pruning": cut}
    text = markdown.render(pruned)
    assert "kept 41.0 % of the MACs" in text
    assert "whole" not in text
    assert "parametrised" not in text


def test_an_alignment_as_good_as_the_fastest_is_not_called_that(pruned: dict[str, Any]) -> None:
    alignment = {**FACTS["alignment"], "round_to": 8, "fastest": 1}
    next(v for v in pruned["variants"] if v["name"] == "prune")["record"] = {"pruning": {**FACTS, "alignment": alignment}}
    assert "multiples of 8, not shown to be slower than 1, the fastest, on openvino" in markdown.render(pruned).replace("\\", "")


@pytest.mark.parametrize(
    ("found", "warning"),
    [
        ({**READING, "ratio": 1.2, "ratio_ci95": [1.1, 1.3]}, "warning prune: slower than the uncut network on openvino at batch 1: 1.200 of its p50"),
        ({**READING, "ratio": 0.97, "ratio_ci95": [0.9, 1.04]}, "warning prune: not shown to be faster than the uncut network on openvino at batch 1: 0.970"),
        ({**READING, "ratio_ci95": None}, "warning prune: not shown to be faster than"),
        ({"reason": "no driver"}, "warning prune: whether it is faster than the uncut network on openvino at batch 1 is not known: no driver"),
        (READING, None),
    ],
)
def test_the_terminal_warns_of_what_is_not_shown_to_be_faster(pruned: dict[str, Any], found: dict[str, Any], warning: str | None) -> None:
    variant = next(v for v in pruned["variants"] if v["name"] == "prune")
    variant["record"] = {"pruning": {**FACTS, "against_parent": {"backend": "openvino", "batch": 1, **found}}}
    for variant["cached"] in (False, True):
        console = Console(file=io.StringIO(), width=100)
        terminal.render(pruned, console)
        text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
        assert (warning in text) if warning else "warning" not in text
        assert ("measured when the variant was made, not in this run" in text) == (variant["cached"] and warning is not None)


def test_latencies_of_a_cached_variant_are_not_told_as_new(pruned: dict[str, Any]) -> None:
    for cached in (False, True):
        next(v for v in pruned["variants"] if v["name"] == "prune")["cached"] = cached
        for text in (html.render(pruned), markdown.render(pruned)):
            assert ("these latencies were measured when the variant was made, not in this run" in text) == cached


def test_sections_have_ids_of_their_own(pruned: dict[str, Any]) -> None:
    ids = re.findall(r' id="([^"]+)"', html.render(pruned))
    assert {"group-sensitivity-0", "layer-sensitivity-0"} <= set(ids)
    assert len(set(ids)) == len(ids)


def test_sensitivity_is_drawn_as_a_bar_a_group_for_each_share(pruned: dict[str, Any]) -> None:
    page = html.render(pruned)
    assert page.count('aria-label="body.conv1: −37.00 pp"') == 2  # for desks and for phones
    assert page.count('aria-label="body.conv1: −1.00 pp"') == 2
    assert "25 % of the channels cut" in page


def test_a_run_without_pruning_says_nothing_of_it(report: dict[str, Any]) -> None:
    assert "Pruning:" not in markdown.render(report)
    assert "Pruning:" not in html.render(report)


def test_what_could_not_be_measured_is_said(pruned: dict[str, Any]) -> None:
    facts = {**FACTS, "target": {"macs": 0.5}, "alignment": {"round_to": 8}, "against_parent": {"backend": "tensorrt", "batch": 1, "reason": "no driver"}}
    next(v for v in pruned["variants"] if v["name"] == "prune")["record"] = {"pruning": facts}
    text = markdown.render(pruned)
    assert "whether it is faster than the uncut network on tensorrt at batch 1 is not known: no driver" in text
    assert "target macs ratio 0.5" in text


@pytest.mark.parametrize("part", FACTS)
def test_of_an_older_record_what_is_there_is_told(pruned: dict[str, Any], part: str) -> None:
    whole = {render: render(pruned) for render in (html.render, markdown.render)}
    next(v for v in pruned["variants"] if v["name"] == "prune")["record"] = {"pruning": {k: v for k, v in FACTS.items() if k != part}}
    for render, text in whole.items():
        less = render(pruned)
        assert len(less) < len(text)
        assert "uning: prune" in less


@pytest.mark.parametrize(
    "facts",
    ["halved", ["conv1"], 0.5, {"ratio": 0.5}, {"target": {"latency": "less"}, "alignment": 8, "latency": [{"trace": None}], "sensitivity": {"whole": 1}}],
)
def test_a_third_partys_pruning_is_its_own_affair(pruned: dict[str, Any], facts: Any) -> None:
    next(v for v in pruned["variants"] if v["name"] == "prune")["record"] = {"pruning": facts, "quantization": facts}
    assert "Pruning:" not in markdown.render(pruned)
    assert "Pruning:" not in html.render(pruned)


def test_half_a_comparison_is_none(pruned: dict[str, Any]) -> None:
    facts = {**FACTS, "against_parent": {"backend": "openvino", "batch": 1}, "alignment": {"round_to": 8, "p50_ms": {"8": 1.0}}}
    next(v for v in pruned["variants"] if v["name"] == "prune")["record"] = {"pruning": facts}
    text = markdown.render(pruned)
    assert "than the uncut network" not in text
    assert "multiples of" not in text
    assert "kept 41.0 % of the MACs" in text
