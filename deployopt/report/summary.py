"""What every renderer reads out of a report: the dense reference, accuracy changes, absences, contract, environment. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from deployopt.report import units

Report = Mapping[str, Any]
JsonRow = Mapping[str, Any]
FLAGS_SHOWN = 2  # of all rows together; each row's contract has its own
DEFAULT_TASK: Mapping[str, Any] = {"name": "classification", "primary": "top1", "unit": "", "higher_is_better": True}


def task_of(report: Report) -> Mapping[str, Any]:
    """The report's task; a report without one is of a classification."""
    return report.get("task") or DEFAULT_TASK


def row_key(row: JsonRow) -> str:
    """variant/backend/precision/bN, as `artifact.Row.key`."""
    return f"{row['variant']}/{row['backend']}/{row['precision']}/b{row['batch']}"


def host(row: JsonRow) -> Mapping[str, Any]:
    """Latency statistics of the host clock in ms; empty where not measured."""
    return (row.get("latency_ms") or {}).get("host") or {}


def p50_ms(row: JsonRow) -> float | None:
    return host(row).get("p50")


def size_bytes(row: JsonRow) -> int | None:
    return (row.get("artifact") or {}).get("bytes")


def measured(rows: Iterable[JsonRow]) -> list[JsonRow]:
    """Rows whose latency counts."""
    return [r for r in rows if r["status"] == "ok" and p50_ms(r) is not None]


def batches(rows: Iterable[JsonRow]) -> list[int]:
    return sorted({r["batch"] for r in rows})


def primary_score(row: JsonRow, task: Mapping[str, Any]) -> float | None:
    return (row.get("accuracy") or {}).get(task["primary"])


def dense_variant(variants: Sequence[Mapping[str, Any]]) -> str | None:
    """Name of the first float variant: what everything is compared with."""
    return next((v["name"] for v in variants if v.get("family", "float") == "float"), None)


def dense_row(rows: Iterable[JsonRow], variants: Sequence[Mapping[str, Any]], backend: str, batch: int) -> JsonRow | None:
    """The dense FP32 row of a backend and batch: the base of its speed-ups."""
    wanted = (dense_variant(variants), backend, "fp32", batch)
    return next((r for r in rows if (r["variant"], r["backend"], r["precision"], r["batch"]) == wanted), None)


def dense_score(rows: Sequence[JsonRow], variants: Sequence[Mapping[str, Any]], task: Mapping[str, Any]) -> float | None:
    """Primary metric of the dense variant in FP32, of PyTorch's row if there is one, else of the first runtime's."""
    name = dense_variant(variants)
    scored = [r for r in rows if r["variant"] == name and r["precision"] == "fp32" and primary_score(r, task) is not None]
    scored.sort(key=lambda r: r["backend"] != "torch")
    return primary_score(scored[0], task) if scored else None


def accuracy_change(value: float | None, reference: float | None, task: Mapping[str, Any]) -> float | None:
    """value − reference; in percentage points for a fraction, else in the task's unit."""
    if value is None or reference is None:
        return None
    return (value - reference) * (100 if units.is_fraction(task) else 1)


def accuracy_drop(value: float | None, reference: float | None, task: Mapping[str, Any]) -> float | None:
    """How much worse `value` is (positive is worse), in the unit of `accuracy_change`."""
    difference = accuracy_change(value, reference, task)
    if difference is None:
        return None
    return -difference if task["higher_is_better"] else difference


def lineage(name: str, variants: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The variant and its ancestors, oldest first."""
    by_name = {v["name"]: v for v in variants}
    chain: list[Mapping[str, Any]] = []
    current: str | None = name
    while current in by_name and by_name[current] not in chain:
        chain.insert(0, by_name[current])
        current = by_name[current].get("parent")
    return chain


def describe(row: JsonRow, variants: Sequence[Mapping[str, Any]]) -> str:
    """What a row is in the field's words: "pruned INT8", "dense FP16"."""
    pruned = any((v.get("stage") or v["name"]) == "prune" for v in lineage(row["variant"], variants))
    return f"{'pruned' if pruned else 'dense'} {row['precision'].upper()}"


def model_name(report: Report) -> str:
    """The architecture as its authors spell it: resnet18 → ResNet-18."""
    arch = str(((report.get("recipe") or {}).get("model") or {}).get("arch") or "model")
    match = re.fullmatch(r"(wide_)?resnet(\d+)(.*)", arch)
    return f"{'Wide ' if match[1] else ''}ResNet-{match[2]}{match[3].replace('_', '-')}" if match else arch


def split_remedy(reason: str | None) -> tuple[str, str]:
    """A reason as (what is wrong, what mends it): the two lines of `DeployoptError.__str__`."""
    what, _, remedy = (reason or "no reason was recorded").partition("→")
    return " ".join(what.split()), " ".join(remedy.split())


class Absence(NamedTuple):
    """Rows that did not run for one reason. `where` is a backend, with the precisions if its reasons differ."""

    where: str
    status: str
    rows: int
    reason: str
    remedy: str


def absences(rows: Sequence[JsonRow]) -> list[Absence]:
    """Rows that are unavailable, or built and with a reason not run: one entry a backend and reason, in the rows' order."""
    groups: dict[tuple[str, str, str | None], list[JsonRow]] = {}
    for row in rows:
        if row["status"] == "unavailable" or (row["status"] == "built" and row.get("reason")):
            groups.setdefault((row["backend"], row["status"], row.get("reason")), []).append(row)
    reasons_of = [(backend, status) for backend, status, _ in groups]
    found = []
    for (backend, status, reason), members in groups.items():
        precisions = ", ".join(dict.fromkeys(r["precision"] for r in members))
        where = f"{backend} {precisions}" if reasons_of.count((backend, status)) > 1 else backend
        found.append(Absence(where, "built, not run" if status == "built" else status, len(members), *split_remedy(reason)))
    return found


def _span(values: Iterable[Any], show: Any = str) -> str:
    """One value, or the range of several: "20" or "20–40"; "" if none is known."""
    known = sorted({v for v in values if v is not None})
    if not known:
        return ""
    return show(known[0]) if len(known) == 1 else f"{show(known[0])}–{show(known[-1])}"


def contract_lines(rows: Sequence[JsonRow]) -> list[str]:
    """The measurement contract of all measured rows in at most three sentences."""
    contracts = [r["contract"] for r in rows if r["status"] in {"ok", "invalid"} and r.get("contract")]
    if not contracts:
        return []

    def of(key: str) -> list[Any]:
        return [c.get(key) for c in contracts]

    warm_up = [c.get("warm_up") or {} for c in contracts]
    clocks = ", ".join(dict.fromkeys(str(c) for c in of("clock") if c)) or "not recorded"
    copies = dict.fromkeys(str(c) for c in of("copies") if c is not None)
    what = f"Clock: {clocks}" + (f" (copies: {', '.join(copies)})" if copies else "")
    threads = _span(of("threads"))
    if threads:
        what += f"; threads: {threads}"
    how = f"{_span(of('blocks')) or '?'} blocks × {_span(of('iterations')) or '?'} iterations"
    duration = _span(of("duration_s"), units.significant)
    if duration:
        how += f", {duration} s a row"
    together = max((len(c.get("interleaved_with") or []) + 1 for c in contracts), default=1)
    how += f", interleaved with up to {units.plural(together - 1, 'other row')}" if together > 1 else ", not interleaved"
    warm = f"Warm-up: {_span(w.get('runs') for w in warm_up) or '?'} runs, {_span((w.get('seconds') for w in warm_up), units.significant) or '?'} s"
    unsettled = sum(w.get("settled") is False for w in warm_up)
    if unsettled:
        warm += f" ({units.plural(unsettled, 'row')} did not settle)"
    flags = list(dict.fromkeys(str(f) for c in contracts for f in c.get("flags") or []))
    if flags:
        more = f" and {len(flags) - FLAGS_SHOWN} more" if len(flags) > FLAGS_SHOWN else ""
        warm += f"; flags: {', '.join(flags[:FLAGS_SHOWN])}{more}"
    return [f"{what}.", f"{how}.", f"{warm}; intervals are 95 % bootstrap of block medians."]


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A JSON value as (dotted key, text) pairs, for tables of anything."""
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in flatten(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list | tuple):
        if any(isinstance(item, Mapping) for item in value):
            return [pair for index, item in enumerate(value) for pair in flatten(item, f"{prefix}[{index}]")]
        return [(prefix, ", ".join(str(item) for item in value) or UNSET)]
    return [(prefix, UNSET if value is None else str(value))]


UNSET = "none"


def environment_line(environment: Mapping[str, Any]) -> str:
    """Processor, GPUs, Python and system in one line."""
    cpu = environment.get("cpu") or {}
    isa = ", ".join(str(i) for i in cpu.get("isa") or [])
    parts = [str(cpu.get("model") or "unknown CPU")]
    if cpu.get("cores"):
        parts.append(units.plural(int(cpu["cores"]), "core") + (f" ({isa})" if isa else ""))
    gpus = environment.get("gpus") or []
    parts.append(", ".join(str(g.get("name", g)) if isinstance(g, Mapping) else str(g) for g in gpus) or "no GPU")
    if environment.get("python"):
        parts.append(f"Python {environment['python']}")
    if environment.get("os"):
        parts.append(str(environment["os"]))
    if environment.get("container"):
        parts.append("in a container" if environment["container"] is True else f"in {environment['container']}")
    return " · ".join(parts)


def accuracy_cell(row: JsonRow, reference: float | None, task: Mapping[str, Any]) -> tuple[str, str]:
    """A row's score and its change against dense, as text."""
    value = primary_score(row, task)
    return units.score(value, task), "" if value is None else units.signed(accuracy_change(value, reference, task), 2 if units.is_fraction(task) else 3)


def quantized_cell(row: JsonRow) -> str:
    """Layers that really run in INT8: "21/21"."""
    verified = row.get("verified")
    return f"{verified['quantized_layers']}/{verified['quantizable_layers']}" if verified else ""
