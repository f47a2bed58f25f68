"""Where the time of a row goes, and what of an INT8 row is not INT8: sentences and tables that all renderers share. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deployopt.artifact import INT8_PRECISIONS
from deployopt.report import summary, units
from deployopt.report.summary import JsonRow

Profile = Mapping[str, Any]
Layer = Mapping[str, Any]
KINDS_NAMED, LAYERS_NAMED = 3, 4  # in a sentence
OVERVIEW = ("row", "time by kind of layer", "slowest layer", "not INT8", "layers' sum", "p50")
LAYERS = ("ONNX nodes", "kind", "precision", "µs", "share")
LEAD = (
    "By the runtimes' own profilers, which slow an inference down, in sessions of their own: shares count, not sums. Each p50 was measured before, without a "
    "profiler. In parentheses: layers that the runtime added."
)


def profiled(rows: Iterable[JsonRow]) -> list[JsonRow]:
    """Rows whose runtime told where their time goes."""
    return [row for row in rows if row.get("profile")]


def quantized(row: JsonRow) -> bool:
    """Whether a row is to compute in INT8, so that a layer that does not is worth a word."""
    return row["precision"] in INT8_PRECISIONS


def slowest(profile: Profile) -> list[Layer]:
    """All layers, the slowest first."""
    return sorted(profile["layers"], key=lambda layer: -layer["time_us"])


def called(layer: Layer) -> str:
    """A layer by its ONNX nodes; what the runtime added by the runtime's name."""
    return " + ".join(layer["nodes"]) if layer["nodes"] else f"({layer['name']})"


def share(time_us: float, profile: Profile) -> str:
    """ "12 %" of the time of all layers; "< 1 %"."""
    if not profile["total_us"]:
        return units.UNKNOWN
    percent = 100 * time_us / profile["total_us"]
    return f"{percent:.0f} %" if percent >= 0.5 or not percent else "< 1 %"


def by_kind(profile: Profile) -> str:
    """ "QLinearConv 76 %, Clip 12 %, QLinearAdd 7 %": the kinds of layers that take the most."""
    totals: dict[str, float] = {}
    for layer in profile["layers"]:
        totals[layer["kind"]] = totals.get(layer["kind"], 0.0) + layer["time_us"]
    most = sorted(totals.items(), key=lambda item: -item[1])[:KINDS_NAMED]
    return ", ".join(f"{kind} {share(time_us, profile)}" for kind, time_us in most)


def slowest_layer(profile: Profile) -> str:
    return _told(slowest(profile)[0], profile)


def _told(layer: Layer, profile: Profile) -> str:
    """ "fc (QGemm, int8) 2 %"."""
    name = called(layer) if layer["nodes"] else "added by the runtime"  # whose own names are too long for a sentence
    return f"{name} ({layer['kind']}, {layer['precision']}) {share(layer['time_us'], profile)}"


def _floats(profile: Profile) -> Sequence[Layer]:
    """Layers that do not compute in INT8, the slowest first."""
    return [layer for layer in slowest(profile) if layer["precision"] != "int8"]


def not_int8(profile: Profile, named: int = LAYERS_NAMED) -> str:
    """ "3 % of the time: fc (Gemm, fp32) 2 %, …": the layers that do not compute in INT8, the slowest by name; "no layer"."""
    layers = _floats(profile)
    if not layers:
        return "no layer"
    told = [_told(layer, profile) for layer in layers[:named]]
    if len(layers) > named:
        told.append(f"and {units.plural(len(layers) - named, 'more layer')}")
    return f"{share(sum_us(layers), profile)} of the time: {', '.join(told)}"


def caption(row: JsonRow) -> str:
    """ "qat/openvino/int8/b1: Convolution 79 %, Reorder 10 %, FakeQuantize 6 %; not INT8 6 %", the last of INT8 rows only."""
    profile = row["profile"]
    floats = f"; not INT8 {share(sum_us(_floats(profile)), profile)}" if quantized(row) else ""
    return f"{summary.row_key(row)}: {by_kind(profile)}{floats}"


def sums(row: JsonRow) -> str:
    """The layers' sum beside the latency that was measured."""
    profile = row["profile"]
    total = units.milliseconds(profile["total_us"] / 1e3)
    return f"layers' sum {total} over {units.plural(profile['runs'], 'profiled run')}, p50 {units.milliseconds(summary.p50_ms(row))} without the profiler"


def sentences(rows: Iterable[JsonRow]) -> list[tuple[str, str]]:
    """(row, where its time goes and what is not INT8) of the INT8 rows."""
    return [
        (summary.row_key(row), f"{by_kind(row['profile'])}; slowest {slowest_layer(row['profile'])}; not INT8: {not_int8(row['profile'])}")
        for row in profiled(rows)
        if quantized(row)
    ]


def overview(rows: Iterable[JsonRow]) -> list[list[str]]:
    """Cells under `OVERVIEW`, a line a profiled row."""
    return [[summary.row_key(row), *_overview(row)] for row in profiled(rows)]


def _overview(row: JsonRow) -> list[str]:
    profile = row["profile"]
    floats = not_int8(profile) if quantized(row) else ""
    return [by_kind(profile), slowest_layer(profile), floats, units.milliseconds(profile["total_us"] / 1e3), units.milliseconds(summary.p50_ms(row))]


def parted(profile: Profile, shown: int | None) -> tuple[Sequence[Layer], Sequence[Layer]]:
    """The slowest layers, at most so many (None: all), and the others."""
    layers = slowest(profile)
    kept = layers[:shown]
    return kept, layers[len(kept) :]


def table(profile: Profile, shown: int | None = None) -> list[list[str]]:
    """Cells under `LAYERS`, the slowest first.

    Args:
        shown: at most so many layers, and a line that sums up the others; None gives all.
    """
    kept, others = parted(profile, shown)
    cells = [[called(layer), layer["kind"], layer["precision"], *_time(layer["time_us"], profile)] for layer in kept]
    return [*cells, [units.plural(len(others), "other layer"), "", "", *_time(sum_us(others), profile)]] if others else cells


def _time(time_us: float, profile: Profile) -> list[str]:
    return [units.significant(time_us), share(time_us, profile)]


def sum_us(layers: Iterable[Layer]) -> float:
    return sum(float(layer["time_us"]) for layer in layers)
