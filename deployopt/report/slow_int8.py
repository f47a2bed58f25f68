"""INT8 that is slower than 16-bit floats, and the layers to blame. Pure functions over the report's rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deployopt.artifact import INT8_PRECISIONS
from deployopt.report import summary, units
from deployopt.report.summary import JsonRow

HALVES = ("fp16", "bf16")
NAMED = 3  # layers in a sentence


def notes(rows: Sequence[JsonRow], variants: Sequence[Mapping[str, Any]]) -> Iterator[tuple[JsonRow, str]]:
    """Each INT8 row that is slower than its float parent in FP16 or BF16 on the same backend, batch size and scenario, with a note that says so.

    Slower: the 95 % intervals of the medians do not touch.

    Args:
        rows, variants: as in report.json.
    """
    for row in summary.measured(rows):
        if row["precision"] not in INT8_PRECISIONS:
            continue
        half = _fastest_half(row, rows, variants)
        if half is not None and _interval(row)[0] > _interval(half)[1]:
            factor = units.significant(summary.host(row)["p50"] / summary.host(half)["p50"])
            yield row, f"{factor}x slower than {half['variant']} in {half['precision'].upper()} at the same batch: {_blame(row, rows)}"


def _fastest_half(row: JsonRow, rows: Sequence[JsonRow], variants: Sequence[Mapping[str, Any]]) -> JsonRow | None:
    """The fastest 16-bit row of the nearest variant it descends from that has one; the INT8 network has that one's layers."""
    for variant in reversed(summary.lineage(row["variant"], variants)):
        like = (variant["name"], row["backend"], row["batch"], row.get("sweep"))
        found = [r for r in summary.measured(rows) if r["precision"] in HALVES and (r["variant"], r["backend"], r["batch"], r.get("sweep")) == like]
        if found:
            return min(found, key=lambda r: float(summary.host(r)["p50"]))
    return None


def _interval(row: JsonRow) -> Sequence[float]:
    bounds: Sequence[float] = summary.host(row)["p50_ci95"]
    return bounds


def _blame(row: JsonRow, rows: Sequence[JsonRow]) -> str:
    """The layers that do not compute in INT8, by their time where a profile of the artifact tells it, else by what the build verified."""
    same = ("variant", "backend", "precision")
    profiled = next((r for r in (row, *rows) if r.get("profile") and all(r[k] == row[k] for k in same)), None)
    if profiled is not None:
        return _by_time(profiled["profile"], "" if profiled["batch"] == row["batch"] else f" at batch {profiled['batch']}")
    verified = row.get("verified")
    if not verified:
        return "what its layers run in is not known; profile it to see which take the time"
    floats = {kind: n for kind, n in verified["executed"].items() if kind != "int8"}
    if floats:
        said = ", ".join(f"{n} in {kind}" for kind, n in sorted(floats.items()))
        return f"{said} of its {verified['quantizable_layers']} convolutions and matrix products"
    return "all its convolutions and matrix products run in INT8, so the time goes into what is between them: profile it to see"


def _by_time(profile: Mapping[str, Any], where: str) -> str:
    """`where`: " at batch 1" if the profile is of another batch size than the row."""
    slow = sorted((layer for layer in profile["layers"] if layer["precision"] != "int8"), key=lambda layer: -layer["time_us"])
    if not slow:
        return f"every layer runs in INT8{where}"
    total, taken = float(profile["total_us"]), sum(layer["time_us"] for layer in slow)
    named = units.listed([f"{' + '.join(layer['nodes']) or layer['name']} ({layer['kind']}, {layer['precision']})" for layer in slow], NAMED)
    return f"{100 * taken / total:.0f} % of its time{where} goes into layers that are not INT8: {named}"
