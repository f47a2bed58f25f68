"""What rows say beside latency: throughput, start-up, memory, power; and how latency and throughput go with batch size and threads. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from deployopt.report import summary, units
from deployopt.report.summary import JsonRow

Axis = Literal["batch", "threads"]
Figure = Literal["latency", "throughput"]
HEADERS = ("device p50 ms [95 %]", "images/s [95 %]", "first inference ms", "load ms", "peak memory", "GPU memory", "GPU power")


class Curve(NamedTuple):
    """One session's figure over batch sizes or threads. `points`: (batch or threads, value, tip), by rising x."""

    session: str
    offline: bool
    points: Sequence[tuple[int, float, str]]


def scenario_name(row: JsonRow) -> str:
    """ "single stream, 2 threads"; "threads unknown" where the report does not tell."""
    threads = row.get("threads")
    return f"{str(row.get('scenario') or 'single_stream').replace('_', ' ')}, {'threads unknown' if threads is None else units.plural(threads, 'thread')}"


def table(rows: Sequence[JsonRow]) -> tuple[list[str], list[list[str]]] | None:
    """Every measured row's figures under headers; columns that no row fills are left out. None without measured rows.

    Of an invalid row only what a disturbance does not touch: start-up and memory.
    """
    measured = [r for r in rows if r["status"] in {"ok", "invalid"} and r.get("latency_ms")]
    if not measured:
        return None
    figures = [_figures(r) for r in measured]
    kept = [i for i in range(len(HEADERS)) if any(f[i] for f in figures)]
    head = ["variant", "backend", "precision", "batch", "scenario", "p50 ms", "p90 ms", *(HEADERS[i] for i in kept)]
    body = []
    for row, cells in zip(measured, figures, strict=True):
        what = [str(row[k]) for k in ("variant", "backend", "precision", "batch")]
        disturbed = row["status"] == "invalid"
        latency = ["invalid", ""] if disturbed else [units.significant(summary.host(row).get(p)) for p in ("p50", "p90")]
        body.append([*what, scenario_name(row), *latency, *(cells[i] for i in kept)])
    return head, body


def _figures(row: JsonRow) -> list[str]:
    """As `HEADERS`; "" for what is not known."""
    contract = row.get("contract") or {}

    def size(key: str) -> str:
        return units.size(row[key]) if row.get(key) else ""

    def milliseconds(key: str) -> str:
        return units.significant(contract[key]) if contract.get(key) is not None else ""

    disturbed = row["status"] == "invalid"
    watts = None if disturbed else (contract.get("load") or {}).get("gpu_power_w")
    return [
        "" if disturbed else device(row),
        "" if disturbed else throughput(row),
        milliseconds("first_inference_ms"),
        milliseconds("load_ms"),
        size("peak_memory_bytes"),
        size("device_memory_bytes"),
        "" if watts is None else f"{watts:.0f} W",
    ]


def device(row: JsonRow) -> str:
    """ "0.31 [0.30–0.32]" ms by the device clock, which leaves copies out; "" where the runtime has none."""
    figures = summary.device(row)
    bounds = units.interval(figures.get("p50_ci95"))
    return (units.significant(figures["p50"]) + (f" [{bounds}]" if bounds else "")) if figures.get("p50") is not None else ""


def throughput(row: JsonRow) -> str:
    """ "2390 [2370–2410]" images a second."""
    if not row.get("throughput_per_s"):
        return ""
    bounds = units.interval(row.get("throughput_ci95"))
    return units.significant(row["throughput_per_s"]) + (f" [{bounds}]" if bounds else "")


def curves(rows: Iterable[JsonRow], axis: Axis, figure: Figure) -> Mapping[str, list[Curve]]:
    """By variant: each session measured at two batch sizes, or numbers of threads, or more.

    Over batch sizes with the run's own threads; over threads at the largest batch size. Latency is single stream's: under load it is not of interest.
    A row that does not tell its threads, or the figure, has no point.
    """
    valid = summary.measured(rows)
    own = {r.get("threads") for r in summary.own(valid)}
    largest = max(summary.batches(valid), default=0)
    shown = [r for r in valid if (r.get("threads") in own if axis == "batch" else r["batch"] == largest)]
    if figure == "latency":
        shown = [r for r in shown if r.get("scenario") != "offline"]
    sessions: dict[tuple[str, str, bool], list[JsonRow]] = {}
    for row in shown:
        offline = row.get("scenario") == "offline"
        sessions.setdefault((row["variant"], f"{row['backend']} {row['precision']}", offline), []).append(row)
    found: dict[str, list[Curve]] = {}
    for (variant, session, offline), members in sessions.items():
        known = ((r.get(axis), _value(r, figure), _tip(r, session)) for r in members)
        points = sorted(((x, y, tip) for x, y, tip in known if x is not None and y is not None), key=lambda p: p[0])
        if len(points) >= 2:
            found.setdefault(variant, []).append(Curve(session, offline, points))
    return found


def _value(row: JsonRow, figure: Figure) -> float | None:
    return summary.p50_ms(row) if figure == "latency" else row.get("throughput_per_s")


def _tip(row: JsonRow, session: str) -> str:
    return f"{session}\nbatch {row['batch']}, {scenario_name(row)}\np50 {units.milliseconds(summary.p50_ms(row))}\n{throughput(row) or '?'} images/s"
