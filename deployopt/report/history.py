"""A JSON-lines file with one line for each compared run: append, read, and show how every row went, as a table and as a page of curves."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from markupsafe import Markup
from pydantic import Field, FiniteFloat, TypeAdapter
from typing_extensions import TypedDict  # typing's has no types that pydantic can read on Python 3.11

from deployopt.errors import ArtifactError, UsageError
from deployopt.report import charts, form, html, markdown, summary, units
from deployopt.report.summary import Report

SCHEMA = 1
BARS = "▁▂▃▄▅▆▇█"
SPARKS = 20  # runs drawn in a table cell
ROW_KEY = re.compile(r"(.+)/([^/]+)/([^/]+)/b(\d+)(?:/([^/]+))?")
Entry = Mapping[str, Any]


class Machine(TypedDict):
    name: str
    fingerprint: str


class Figures(TypedDict):
    """Of one row."""

    p50_ms: Annotated[FiniteFloat, Field(gt=0)]
    p50_ci95_ms: form.PositiveInterval | None
    score: FiniteFloat | None


class Line(TypedDict):
    """What the table and the curves read of an entry."""

    schema: int
    time: str
    run: str
    machine: Machine
    task: form.Task
    rows: dict[str, Figures]


def entry(report: Report, comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The line for a comparison's new run: latency, accuracy and size of every row that was measured, and on which machine.

    Args:
        report: of the new run.
        comparison: JSON of `bench.comparison.Comparison`; where it measured again, the latencies are its own.
    """
    rows, task, reran = {summary.row_key(r): r for r in report["rows"]}, summary.task_of(report), comparison["reran"]
    figures: dict[str, Any] = {}
    for compared in comparison["rows"]:
        row = rows.get(compared["key"])
        if row is None or not (compared["ratio"] is not None if reran else summary.measured([row])):
            continue
        figures[compared["key"]] = {
            "p50_ms": compared["new_p50_ms"],
            "p50_ci95_ms": None if reran else summary.host(row).get("p50_ci95"),
            "score": summary.primary_score(row, task),
            "size_bytes": summary.size_bytes(row),
        }
    return {
        "schema": SCHEMA,
        "time": comparison["time"],
        "run": comparison["new"],
        "base": comparison["base"],
        "recipe": (report.get("recipe") or {}).get("name"),
        "recipe_sha256": report.get("recipe_sha256"),
        "deployopt": report.get("deployopt"),
        "machine": _machine(comparison["environment"]),
        "reran": reran,
        "gate_met": comparison["gate"]["met"] if comparison["gate"]["asked"] else None,
        "task": dict(task),
        "rows": figures,
    }


def _machine(environment: Mapping[str, Any]) -> dict[str, str]:
    """What it is called, and a fingerprint of what latency depends on: CPU model, cores, ISA, and each GPU with its driver."""
    cpu = environment.get("cpu") or {}
    gpus = [[g.get("name"), g.get("driver")] if isinstance(g, Mapping) else [g, None] for g in environment.get("gpus") or []]
    facts = [cpu.get("model"), cpu.get("cores"), sorted(cpu.get("isa") or []), gpus]
    name = ", ".join([str(cpu.get("model") or "unknown CPU"), *(str(g[0]) for g in gpus)])
    return {"name": name, "fingerprint": hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}


def append(path: Path, line: Entry) -> None:
    """Add one line, durably; the file is made if it is not there. One write, so that jobs that append at once do not mix their lines.

    Raises:
        ArtifactError: the file is not a history, or its last line is cut off; nothing is written.
    """
    if path.is_file() and path.stat().st_size:
        read(path)
        with path.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            if stream.read() != b"\n":
                raise ArtifactError(f"{path}: its last line does not end, so the next would be lost in it", "end it with a line break")
    with path.open("ab", buffering=0) as stream:
        stream.write((json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n").encode())
        os.fsync(stream.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Every line, the oldest first.

    Raises:
        UsageError: no such file.
        ArtifactError: empty, or a line that is no entry of this schema; names it.
    """
    if not path.is_file():
        raise UsageError(f"wanted a history, found no file at {path}", "deployopt compare BASE NEW --history FILE writes one")
    entries = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as exc:
        raise ArtifactError(f"{path} is not a history: {exc}", "give the file that `deployopt compare --history` wrote") from exc
    for number, text in enumerate(lines, 1):
        try:
            found = json.loads(text)
        except json.JSONDecodeError as exc:
            raise ArtifactError(f"{path}:{number} is not whole JSON ({exc})", f"remove line {number}: a write was cut off") from exc
        if wrong := form.mismatch(_line(), found):
            raise ArtifactError(f"{path}:{number} is no entry of a history: {wrong}", f"remove line {number}")
        if found["schema"] != SCHEMA:
            raise ArtifactError(f"{path}:{number}: wanted history schema {SCHEMA}, found {found['schema']}", "read it with the deployopt that wrote it")
        entries.append(found)
    if not entries:
        raise ArtifactError(f"{path} is empty", "deployopt compare BASE NEW --history FILE appends to it")
    return entries


@cache
def _line() -> TypeAdapter[Line]:
    return TypeAdapter(Line)


def _keys(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(key for e in entries for key in e["rows"]))


def _spark(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return "".join(BARS[round((v - low) / (high - low) * (len(BARS) - 1)) if high > low else 0] for v in values)


def render_markdown(entries: Sequence[Entry]) -> str:
    """A line for each row: its latencies on the machine of the newest entry, from lowest (▁) to highest (█), and its accuracy."""
    latest = entries[-1]
    same = [e for e in entries if e["machine"]["fingerprint"] == latest["machine"]["fingerprint"]]
    body = []
    for key in _keys(same):
        known = [e["rows"][key] for e in same if key in e["rows"]]
        p50, task = [row["p50_ms"] for row in known], latest["task"]
        change = f"{units.signed(100 * (p50[-1] / p50[-2] - 1), 1)} %" if len(p50) > 1 else ""
        body.append(
            [key, _spark(p50[-SPARKS:]), len(p50), *map(units.significant, (min(p50), p50[-1])), change, units.score(known[-1]["score"], task)],
        )
    headers = ["row", "p50", "runs", "lowest ms", "newest ms", "vs. before", units.metric_name(latest["task"]["primary"])]
    others = len(entries) - len(same)
    lead = f"{units.plural(len(same), 'run')} on {latest['machine']['name']}, the newest {latest['time']}"
    lead += f"; {units.plural(others, 'run')} on other machines left out" if others else ""
    shown = markdown.table(headers, body, left=2) if body else "No row was measured."
    return f"## deployopt history\n\n{markdown.cell(lead)}\n\n{shown}\n"


def _series(entries: Sequence[Entry], key: str, label: str, colour: int, field: str, task: Mapping[str, Any]) -> charts.Series:
    """One row's curve; it breaks where the machine changed, and where a run did not measure the row."""
    points: list[tuple[float, float, str] | None] = []
    machine = None
    for number, e in enumerate(entries, 1):
        row = e["rows"].get(key)
        if row is None or row[field] is None or e["machine"]["fingerprint"] != machine:
            points.append(None)
        machine = e["machine"]["fingerprint"]
        if row is None or row[field] is None:
            continue
        bounds = units.interval(row["p50_ci95_ms"]) if field == "p50_ms" else ""
        shown = units.milliseconds(row[field]) + (f" [{bounds}]" if bounds else "") if field == "p50_ms" else units.score(row[field], task)
        points.append((number, row[field], f"{key}\n{shown}\n{e['time']}\n{e['run']}\n{e['machine']['name']}"))
    return charts.Series(label, colour, False, points)


def _figure(entries: Sequence[Entry], title: str, keys: Mapping[str, str], field: str) -> html.Figure | None:
    """Curves of rows by label; None if no entry has their figures."""
    task = entries[-1]["task"]
    curves = [_series(entries, key, label, i, field, task) for i, (label, key) in enumerate(keys.items())]
    drawn = [s for s in curves if any(s.points)]
    if not drawn:
        return None

    def show(value: float) -> str:
        return f"{100 * value:.4g} %" if field == "score" and units.is_fraction(task) else charts.tick_label(value)

    def draw(width: float) -> Markup:
        y_title = "p50, ms" if field == "p50_ms" else units.metric_name(task["primary"])
        return charts.curves(drawn, [(1, "")], width, x_title="run, the oldest first", y_title=y_title, show_y=show, label=title)

    return html.Figure(title, charts.responsive(draw), charts.legend([(s.name, charts.stroke(s.colour, s.dashed)) for s in drawn]))


def _parts(key: str) -> Sequence[str]:
    """Variant, backend, precision, batch and sweep ("" if none) of a `summary.row_key`."""
    found = ROW_KEY.fullmatch(key)
    return found.groups(default="") if found else (key, "", "", "", "")


def _gates(entry: Entry) -> str:
    """Whether they were met; "–" where none was asked for. Lines of older versions say "met" there, too."""
    met = entry.get("gate_met")
    return units.UNKNOWN if met is None else "met" if met else "missed"


def render_html(entries: Sequence[Entry]) -> str:
    """One page that opens offline: latency of each backend and batch size, then accuracy, over the runs. A line breaks where the machine changed."""
    groups: dict[str, dict[str, str]] = {}
    scored: dict[str, str] = {}
    for key in _keys(entries):
        variant, backend, precision, batch, sweep = _parts(key)
        groups.setdefault(f"{backend}, batch {batch}" + (f", {sweep}" if sweep else ""), {})[f"{variant} {precision}"] = key
        scored.setdefault(f"{variant}/{backend}/{precision}", key)
    figures = [_figure(entries, f"Latency: {title}", keys, "p50_ms") for title, keys in groups.items()]
    figures.append(_figure(entries, "Accuracy", scored, "score"))
    latest, machines = entries[-1], {e["machine"]["fingerprint"]: e["machine"]["name"] for e in entries}
    table = [[e["time"], e["run"], e["machine"]["name"], units.plural(len(e["rows"]), "row"), _gates(e)] for e in entries]
    return html.template("history.html.j2").render(
        name=latest.get("recipe") or latest["run"],
        headline=f"{units.plural(len(entries), 'run')} on {units.plural(len(machines), 'machine')}, the newest {latest['time']}",
        machines=list(machines.values()),
        figures=[f for f in figures if f is not None],
        headers=["time", "run", "machine", "measured", "gates"],
        runs=table[::-1],
    )
