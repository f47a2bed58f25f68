"""What every renderer reads out of a report: the dense reference, accuracy changes, absences, contract, environment. Pure functions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from deployopt.artifact import INT8_PRECISIONS, TORCH
from deployopt.report import units
from deployopt.report.records import told

Report = Mapping[str, Any]
JsonRow = Mapping[str, Any]
FLAGS_SHOWN = 2  # of all rows together; each row's contract has its own
SAID_BY_FIGURES = ("the warm-up did not settle", "other processes used")  # flags of `bench.harness` that the lines give as figures
SEPARATOR = " · "
EARLIER = "measured when the variant was made, not in this run"  # said of latencies in the record of a cached variant
DEFAULT_TASK: Mapping[str, Any] = {"name": "classification", "primary": "top1", "unit": "", "higher_is_better": True}


def task_of(report: Report) -> Mapping[str, Any]:
    """The report's task; a report without one is of a classification."""
    return report.get("task") or DEFAULT_TASK


def row_key(row: JsonRow) -> str:
    """variant/backend/precision/bN and the sweep, as `artifact.Row.key`."""
    sweep = row.get("sweep")
    return f"{row['variant']}/{row['backend']}/{row['precision']}/b{row['batch']}" + (f"/{sweep}" if sweep else "")


def host(row: JsonRow) -> Mapping[str, Any]:
    """Latency statistics of the host clock in ms; empty where not measured."""
    return (row.get("latency_ms") or {}).get("host") or {}


def device(row: JsonRow) -> Mapping[str, Any]:
    """Latency statistics of the device clock in ms; empty where not measured, and where the runtime has no such clock."""
    return (row.get("latency_ms") or {}).get("device") or {}


def p50_ms(row: JsonRow) -> float | None:
    return host(row).get("p50")


def size_bytes(row: JsonRow) -> int | None:
    return (row.get("artifact") or {}).get("bytes")


def measured(rows: Iterable[JsonRow]) -> list[JsonRow]:
    """Rows whose latency counts."""
    return [r for r in rows if r["status"] == "ok" and p50_ms(r) is not None]


def own(rows: Iterable[JsonRow]) -> list[JsonRow]:
    """Rows of the run's own single stream: what is judged, recommended and compared in charts."""
    return [r for r in rows if not r.get("sweep")]


def swept(rows: Iterable[JsonRow]) -> list[JsonRow]:
    """Rows of the offline scenario and of other numbers of threads."""
    return [r for r in rows if r.get("sweep")]


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
    return next((r for r in own(rows) if (r["variant"], r["backend"], r["precision"], r["batch"]) == wanted), None)


def dense_score(rows: Sequence[JsonRow], variants: Sequence[Mapping[str, Any]], task: Mapping[str, Any]) -> float | None:
    """Primary metric of the dense variant in FP32, of PyTorch's row if there is one, else of the first runtime's."""
    name = dense_variant(variants)
    scored = [r for r in rows if r["variant"] == name and r["precision"] == "fp32" and primary_score(r, task) is not None]
    scored.sort(key=lambda r: r["backend"] != TORCH)
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


class SensitivityTable(NamedTuple):
    """A quantised variant's sensitivity by layer, ready to print.

    Attributes:
        distance: what `alone` and `spared` of `distances` are: "KL, nats" or "mean squared error".
        distances: (layer, with it alone in INT8, with it alone in float).
        rows: cells under `headers`; the last says whether mixed precision keeps the layer in float.
    """

    variant: str
    lead: str
    distance: str
    distances: list[tuple[str, float, float]]
    headers: list[str]
    rows: list[list[str]]


def sensitivities(variants: Sequence[Mapping[str, Any]], task: Mapping[str, Any]) -> list[SensitivityTable]:
    """One for each variant whose stage was asked for `sensitivity`."""
    known = ((v, told(v, "quantization")) for v in variants)
    return [_sensitivity(v, found, task) for v, found in known if "sensitivity" in found]


def _sensitivity(variant: Mapping[str, Any], quantization: Mapping[str, Any], task: Mapping[str, Any]) -> SensitivityTable:
    table, kept, chosen = quantization["sensitivity"], quantization.get("float_layers", []), quantization.get("mixed_precision") or {}
    distance = {"kl": "KL, nats", "mse": "mean squared error"}.get(table["distance"], table["distance"])
    metric, costs = units.metric_name(task["primary"]), chosen.get("latency_cost") or {}
    headers = ["layer", f"alone in INT8: {distance}", metric, f"alone in float: {distance}", metric, "latency in float", "kept in float"]
    rows, distances = [], []
    for row in table["layers"]:
        name, cost = row["layer"], costs.get(row["layer"])
        cells = [text for key in ("alone", "spared") for text in (units.significant(row[key]["distance"]), units.score(row[key]["primary"], task))]
        rows.append([name, *cells, "" if cost is None else f"{units.signed(100 * cost, 1)} %", "yes" if name in kept else ""])
        distances.append((name, row["alone"]["distance"], row["spared"]["distance"]))
    lead = (
        f"Distance of the outputs from the float parent's on {table['images']} validation images. All in INT8: {units.significant(table['int8']['distance'])}, "
        f"{metric} {units.score(table['int8']['primary'], task)}; the same weights all in float: {units.significant(table['float']['distance'])}, "
        f"{units.score(table['float']['primary'], task)}. Kept in float: {', '.join(kept) or 'none'}."
    )
    if chosen:
        steps = [step for step in chosen["trace"] if step["layer"]]
        said = [f"{step['layer']} {'to float' if step['kept'] else 'back to INT8'} {units.score(step['primary'], task)}" for step in steps]
        lead += f" Chosen for a drop of at most {chosen['max_accuracy_drop_pp']:g} from {units.score(chosen['parent'], task)}, timed on {chosen['backend']}"
        lead += f": {'; '.join(said)}." if said else ": the whole network in INT8 meets it."
    if costs and variant.get("cached"):
        lead += f" Latencies were {EARLIER}."
    return SensitivityTable(variant["name"], lead, distance, distances, headers, rows)


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
    """Rows that did not run for one reason. `where` is a backend and its precisions."""

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
    found = []
    for (backend, status, reason), members in groups.items():
        precisions = ", ".join(dict.fromkeys(r["precision"] for r in members))
        found.append(Absence(f"{backend} {precisions}", "built, not run" if status == "built" else status, len(members), *split_remedy(reason)))
    return found


def notes(rows: Sequence[JsonRow]) -> list[tuple[str, str]]:
    """(whom it concerns, note) for each different note of the rows, in their order; a backend's variants of one precision share a line."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for note in row.get("notes") or []:
            found.setdefault((f"{row['backend']} {row['precision']}", " ".join(note.split())), []).append(row["variant"])
    return [(f"{', '.join(dict.fromkeys(variants))} {where}", note) for (where, note), variants in found.items()]


def _span(values: Iterable[Any], show: Any = str) -> str:
    """One value, or the range of several: "20" or "20–40"; "" if none is known."""
    known = sorted({v for v in values if v is not None})
    if not known:
        return ""
    return show(known[0]) if len(known) == 1 else f"{show(known[0])}–{show(known[-1])}"


def contract_lines(rows: Sequence[JsonRow], environment: Mapping[str, Any] | None = None) -> list[str]:
    """The measurement contract of all measured rows: what was timed, how long, how steady the machine was, and how layers were timed; one line each.

    Args:
        environment: where; None leaves the processor out.
    """
    contracts = [r["contract"] for r in rows if r["status"] in {"ok", "invalid"} and r.get("contract")]
    if not contracts:
        return []
    what = [_clock(contracts), _graphs(contracts), _spans(contracts, "threads", "thread"), _streams(contracts), _processor(environment) if environment else ""]
    lines = [
        SEPARATOR.join(part for part in what if part),
        SEPARATOR.join([_blocks(contracts), *_inputs(contracts)]),
        SEPARATOR.join([_warm_up(contracts), *_load(contracts), "p50 and images/s: medians over blocks of one process, intervals: their 95 % bootstrap"]),
    ]
    if profiled := [row["profile"] for row in rows if row.get("profile")]:
        how = SEPARATOR.join(dict.fromkeys(part for profile in profiled for part in str(profile["how"]).split(", ")))
        lines.append(f"layers: {_span(profile['runs'] for profile in profiled)} runs {how}")
    flags = Counter(str(f) for c in contracts for f in c.get("flags") or [] if not str(f).startswith(SAID_BY_FIGURES))
    if flags:
        said = [f"{flag} ({units.plural(n, 'row')})" for flag, n in flags.items()]
        lines.append(f"flags: {units.listed(said, FLAGS_SHOWN)}")
    return lines


def _clock(contracts: Sequence[Mapping[str, Any]]) -> str:
    clocks = ", ".join(dict.fromkeys(str(c["clock"]) for c in contracts if c.get("clock"))) or "unrecorded"
    copies = ", ".join(dict.fromkeys(str(c["copies"]).removesuffix(" by the host clock") for c in contracts if c.get("copies") is not None))
    return f"{clocks} clock" + (f", copies {copies}" if copies else "")


def _graphs(contracts: Sequence[Mapping[str, Any]]) -> str:
    """ "CUDA graph on", or for how many rows each; "" where no runtime has them."""
    counts = Counter(str(c["cuda_graph"]) for c in contracts if c.get("cuda_graph"))
    said = ", ".join(how if len(counts) == 1 else f"{how} ({units.plural(n, 'row')})" for how, n in counts.items())
    return f"CUDA graph {said}" if said else ""


def _spans(contracts: Iterable[Mapping[str, Any]], key: str, noun: str) -> str:
    """ "2 threads", "1–2 threads", or "" if it is not recorded."""
    text = _span(c.get(key) for c in contracts)
    return f"{text} {noun}{'' if text == '1' else 's'}" if text else ""


def _streams(contracts: Iterable[Mapping[str, Any]]) -> str:
    """ "offline 1–2 streams", or "" where every row is of a single stream."""
    text = _spans([c for c in contracts if c.get("scenario") == "offline"], "streams", "stream")
    return f"offline {text}" if text else ""


def _processor(environment: Mapping[str, Any]) -> str:
    cpu = environment.get("cpu") or {}
    isa = ", ".join(str(i) for i in cpu.get("isa") or [])
    return str(cpu.get("model") or "unknown CPU") + (f" ({isa})" if isa else "")


def _blocks(contracts: Sequence[Mapping[str, Any]]) -> str:
    text = f"{_span(c.get('blocks') for c in contracts) or '?'} blocks × {_span(c.get('iterations') for c in contracts) or '?'} iterations"
    duration = _span((c.get("duration_s") for c in contracts), lambda v: units.significant(v, 2))
    if duration:
        text += f", {duration} s a row"
    others = max(len(c.get("interleaved_with") or []) for c in contracts)
    shuffled = " in shuffled rounds" if all(c.get("shuffled") for c in contracts) else ""
    return text + SEPARATOR + (f"interleaved{shuffled} with up to {units.plural(others, 'other')}" if others else "not interleaved")


def _inputs(contracts: Sequence[Mapping[str, Any]]) -> list[str]:
    inputs = [c["inputs"] for c in contracts if c.get("inputs")]
    source = ", ".join(dict.fromkeys(str(i["source"]) for i in inputs if i.get("source")))
    return [f"images: {source}, {_span(i.get('buffers') for i in inputs)} buffers rotated"] if source else []


def _warm_up(contracts: Sequence[Mapping[str, Any]]) -> str:
    warm_up = [c.get("warm_up") or {} for c in contracts]
    seconds = _span((w.get("seconds") for w in warm_up), lambda v: units.significant(v, 2))
    unsettled = sum(w.get("settled") is False for w in warm_up)
    return f"warm-up: {_span(w.get('runs') for w in warm_up) or '?'} runs, {seconds or '?'} s" + (
        f" ({units.plural(unsettled, 'row')} did not settle)" if unsettled else ""
    )


def _load(contracts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The worst that other processes and other guests took from any row."""
    found = []
    for key, noun in (("other_cpu_percent", "other processes"), ("steal_percent", "steal")):
        values = [float(v) for c in contracts if (v := (c.get("load") or {}).get(key)) is not None]
        if values:
            found.append(f"{noun} ≤ {max(values):.0f} %")
    return found


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
    """Processor, GPUs with their driver, Python and system in one line."""
    cpu = environment.get("cpu") or {}
    isa = ", ".join(str(i) for i in cpu.get("isa") or [])
    parts = [str(cpu.get("model") or "unknown CPU")]
    if cpu.get("cores"):
        parts.append(units.plural(int(cpu["cores"]), "core") + (f" ({isa})" if isa else ""))
    gpus = environment.get("gpus") or []
    parts.append(", ".join(_gpu(g) for g in gpus) or "no GPU")
    if environment.get("python"):
        parts.append(f"Python {environment['python']}")
    if environment.get("os"):
        parts.append(str(environment["os"]))
    if environment.get("container"):
        parts.append("in a container" if environment["container"] is True else f"in {environment['container']}")
    return SEPARATOR.join(parts)


def _gpu(gpu: Any) -> str:
    if not isinstance(gpu, Mapping):
        return str(gpu)
    return str(gpu.get("name", gpu)) + (f", driver {gpu['driver']}" if gpu.get("driver") else "")


def versions_line(environment: Mapping[str, Any]) -> str:
    """What is installed of the recorded distributions: "numpy 2.3 · onnxruntime 1.31"."""
    return SEPARATOR.join(f"{name} {version}" for name, version in (environment.get("versions") or {}).items() if version)


def accuracy_cell(row: JsonRow, reference: float | None, task: Mapping[str, Any]) -> tuple[str, str]:
    """A row's score and its change against dense, as text."""
    value = primary_score(row, task)
    return units.score(value, task), "" if value is None else units.signed(accuracy_change(value, reference, task), 2 if units.is_fraction(task) else 3)


def quantized_cell(row: JsonRow) -> str:
    """Layers that really run in INT8: "21/21", "19/21, 2 kept in float"; – where none is wanted, ? where the runtime does not tell."""
    verified = row.get("verified")
    if row["precision"] not in INT8_PRECISIONS and not (verified and verified["quantized_layers"]):
        return units.UNKNOWN
    if not verified:
        return "?"
    kept = verified.get("kept_in_float")
    return f"{verified['quantized_layers']}/{verified['quantizable_layers']}" + (f", {kept} kept in float" if kept else "")
