"""Where the time of each row goes, by layer: sentences and tables that all renderers share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deployopt.artifact import INT8_PRECISIONS
from deployopt.report import summary, units
from deployopt.report.summary import JsonRow

Layer = Mapping[str, Any]
SLOWEST = 3  # layers named for each row of the overview
OVERVIEW = ("row", "layers' sum", "p50", "not in INT8", "slowest layers")
LAYERS = ("ONNX nodes", "kind", "precision", "µs", "share")
LEAD = "Times of the runtimes' own profilers, which slow an inference down: shares count, not sums. The p50 beside a sum was measured without them."


def profiled(rows: Iterable[JsonRow]) -> list[JsonRow]:
    """Rows whose runtime told where their time goes."""
    return [row for row in rows if row.get("profile")]


def called(layer: Layer) -> str:
    """A layer by its ONNX nodes; what the runtime added by the runtime's name."""
    return " + ".join(layer["nodes"]) if layer["nodes"] else f"({layer['name']})"


def share(layer: Layer, profile: Mapping[str, Any]) -> str:
    return _percent(layer["time_us"], profile)


def not_int8(profile: Mapping[str, Any]) -> str:
    """Share of the time in layers that do not compute in INT8."""
    return _percent(profile["total_us"] - profile["precision_us"].get("int8", 0.0), profile)


def _percent(time_us: float, profile: Mapping[str, Any]) -> str:
    return f"{100 * time_us / profile['total_us']:.0f} %" if profile["total_us"] else units.UNKNOWN


def sums(row: JsonRow) -> str:
    """The layers' sum beside the latency that was measured."""
    return f"layers' sum {units.milliseconds(row['profile']['total_us'] / 1e3)}, p50 {units.milliseconds(summary.p50_ms(row))}"


def lines(rows: Iterable[JsonRow]) -> list[tuple[str, str]]:
    """(row, what is not in INT8 and which layer is slowest) of the INT8 rows."""
    found = []
    for row in profiled(rows):
        if row["precision"] in INT8_PRECISIONS:
            profile, slowest = row["profile"], row["profile"]["layers"][0]
            told = f"{not_int8(profile)} of the time not in INT8; slowest: {called(slowest)}, {slowest['precision']}, {share(slowest, profile)}"
            found.append((summary.row_key(row), told))
    return found


def overview(rows: Iterable[JsonRow]) -> list[list[str]]:
    """Cells under `OVERVIEW`, a line a profiled row."""
    return [[summary.row_key(row), *_overview(row)] for row in profiled(rows)]


def _overview(row: JsonRow) -> list[str]:
    profile = row["profile"]
    slowest = ", ".join(f"{called(layer)} ({layer['precision']}) {share(layer, profile)}" for layer in profile["layers"][:SLOWEST])
    return [units.milliseconds(profile["total_us"] / 1e3), units.milliseconds(summary.p50_ms(row)), not_int8(profile), slowest]


def layers(row: JsonRow, shown: int | None = None) -> list[list[str]]:
    """Cells under `LAYERS`, the slowest first; the last line sums up those left out.

    Args:
        shown: at most so many of the profile's layers; None gives all it has.
    """
    profile = row["profile"]
    kept: Sequence[Layer] = profile["layers"][:shown]
    cells = [[called(layer), layer["kind"], layer["precision"], units.significant(layer["time_us"]), share(layer, profile)] for layer in kept]
    left = len(profile["layers"]) - len(kept) + profile["others"]["layers"]
    if left:
        rest_us = max(0.0, profile["total_us"] - sum(layer["time_us"] for layer in kept))
        cells.append([f"{units.plural(left, 'other layer')}", "", "", units.significant(rest_us), _percent(rest_us, profile)])
    return cells
