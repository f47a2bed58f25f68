"""Renderers of a comparison (the JSON of `bench.comparison.Comparison`): terminal, Markdown, JUnit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from deployopt.report import junit, markdown, summary, terminal, units

JsonComparison = Mapping[str, Any]
STYLE = {"faster": "green", "slower": "red", "not comparable": "yellow", "added": "cyan", "removed": "cyan"}
CHANGED = ("faster", "slower", "same within noise")
GATED = {"latency": "slower", "throughput": "less throughput", "memory": "more peak memory", "size": "larger"}
CHANGES = ("throughput", "memory", "size")  # columns of their own
RECIPE_CHANGES_SHOWN = 5  # of the recipes; the JSON has all


def headline(comparison: JsonComparison) -> str:
    """How many rows went which way: "2 faster, 1 slower, 9 same within noise"."""
    verdicts = [r["verdict"] for r in comparison["rows"]]
    counts = [f"{verdicts.count(v)} {v}" for v in (*CHANGED, "not comparable", "added", "removed") if v in verdicts]
    return f"{comparison['base']} → {comparison['new']}: {', '.join(counts) or 'no rows'}"


def _ratio(row: Mapping[str, Any]) -> str:
    """What the verdict goes by: of latencies, or "throughput 1.031 [1.028–1.034]"."""
    prefix, key = ("throughput ", "throughput_ratio") if row["judged_by"] == "throughput" else ("", "ratio")
    if row[key] is None:
        return ""
    bounds = units.interval(row[f"{key}_ci95"], decimals=3)
    return f"{prefix}{row[key]:.3f}" + (f" [{bounds}]" if bounds else "")


def _accuracy(row: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    return "" if row["accuracy_change_pp"] is None else units.change(row["accuracy_change_pp"], task)


def _p50(value: float | None) -> str:
    return "" if value is None else units.significant(value)


def gate_sentence(comparison: JsonComparison) -> str:
    """Whether the gates hold, for how many rows, and how many could not be compared or are too wide to tell; "" if none was asked for."""
    gate = comparison["gate"]
    limits = [(gate[f"max_{name}_regression"], words) for name, words in GATED.items()]
    asked = [f"at most {100 * limit:g} % {words}" for limit, words in limits if limit is not None]
    if gate["max_accuracy_drop"] is not None:
        unit = comparison["task"]["unit"] or "pp"
        asked.append(f"at most {gate['max_accuracy_drop']:g} {unit} less accurate")
    if not asked:
        return ""
    total, lacking, wide = gate["rows"], gate["not_compared"], _undecided(comparison)
    word = "MISSED" if not gate["met"] else f"met for {total - lacking} of {total} rows" if lacking else "met"
    parts = [f"gate {word} ({', '.join(asked)})"]
    parts += [f"{lacking} could not be compared" if gate["met"] else f"{lacking} of {total} rows could not be compared"] if lacking else []
    parts += [f"the interval of {units.plural(wide, 'row')} reaches beyond it, so a regression can't be ruled out there"] if wide else []
    return "; ".join(parts)


def _undecided(comparison: JsonComparison) -> int:
    """Rows that meet a gate only because their interval is wide."""
    return sum(bool(row["undecided"]) for row in comparison["rows"])


def _gate_style(comparison: JsonComparison) -> str:
    gate = comparison["gate"]
    return "bold red" if not gate["met"] else "yellow" if gate["not_compared"] or _undecided(comparison) else "green"


def noise_sentence(comparison: JsonComparison) -> str:
    """How the intervals come about, with the noise floors that are stored."""
    if comparison["reran"]:
        how = "".join(f", {part}" for part in (_rerun_contract(comparison["rows"]), summary.versions_line(comparison["environment"])) if part)
        return f"measured again, interleaved on this machine{how}; intervals from the spread of process lifetimes"
    kinds = (("between process lifetimes", "noise_floor"), ("inside one run", "noise_floor_same_rounds"))
    known = [(where, [row[key] for row in comparison["rows"] if row[key] is not None]) for where, key in kinds]
    told = [f"±{100 * min(v):.1f}–{100 * max(v):.1f} % {where}" for where, v in known if v]
    return f"noise floor from A/A repeats: {', '.join(told)}" if told else ""


def _rerun_contract(rows: Sequence[Mapping[str, Any]]) -> str:
    """ "5–10 lifetimes of both processes, 2 threads on cpu", over all rows that were measured again; "" if there is none."""
    lifetimes, threads, devices = (sorted({row[name] for row in rows if row[name] is not None}) for name in ("lifetimes", "threads", "device"))
    if not lifetimes:
        return ""
    said = f"{_range(lifetimes)} lifetimes of both processes" + (f", {_range(threads)} thread{'' if threads == [1] else 's'}" if threads else "")
    return said + (f" on {', '.join(devices)}" if devices else "")


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]}–{values[-1]}"


def _relative(row: Mapping[str, Any], name: str) -> str:
    """A ratio's change as "+3.1 %"."""
    ratio = row[f"{name}_ratio"]
    return "" if ratio is None else f"{units.signed(100 * (ratio - 1), 1)} %"


def _notes(comparison: JsonComparison) -> list[str]:
    """What is said of all rows."""
    changes = comparison["recipe_changes"]
    shown = "; ".join(changes[:RECIPE_CHANGES_SHOWN]) + (f"; and {len(changes) - RECIPE_CHANGES_SHOWN} more" if len(changes) > RECIPE_CHANGES_SHOWN else "")
    return [*([noise_sentence(comparison)] if noise_sentence(comparison) else []), *comparison["notes"], *([f"the recipes differ: {shown}"] if changes else [])]


def render_terminal(comparison: JsonComparison, console: Console) -> None:
    """Misses first, then one line a row, then why some rows are not compared."""
    gate = comparison["gate"]
    for miss in gate["misses"]:
        console.print(Text.assemble(("REGRESSION ", "bold red"), miss))
    console.print(Text(headline(comparison), style="bold"))
    if gate_sentence(comparison):
        console.print(Text(gate_sentence(comparison), style=_gate_style(comparison)))
    console.print()
    rows = comparison["rows"]
    if rows:
        columns = [
            terminal.Column("row", [r["key"] for r in rows], right=False),
            terminal.Column("base ms", [_p50(r["base_p50_ms"]) for r in rows], 2),
            terminal.Column("new ms", [_p50(r["new_p50_ms"]) for r in rows], 3),
            terminal.Column("new/base [95 %]", [_ratio(r) for r in rows], 1),
            terminal.Column("throughput", [_relative(r, "throughput") for r in rows], 4),
            terminal.Column("memory", [_relative(r, "memory") for r in rows], 5),
            terminal.Column("size", [_relative(r, "size") for r in rows], 6),
            terminal.Column("accuracy", [_accuracy(r, comparison["task"]) for r in rows]),
            terminal.Column("verdict", [r["verdict"] for r in rows], right=False),
        ]
        console.print(terminal.table(terminal.spaced(columns), console, [STYLE.get(r["verdict"], "") for r in rows]))
        console.print()
    for note in _notes(comparison):
        console.print(Text(note, style="dim"))
    for reason, keys in _remarks(comparison).items():
        console.print(Text.assemble((f"{units.plural(len(keys), 'row')}: ", "yellow"), f"{reason} ({keys[0]}{', …' if len(keys) > 1 else ''})"))


def _remarks(comparison: JsonComparison) -> dict[str, list[str]]:
    """Rows by what is said about them."""
    found: dict[str, list[str]] = {}
    for row in comparison["rows"]:
        if row["why"]:
            found.setdefault(f"{row['verdict']}: {row['why']}", []).append(row["key"])
    return found


def render_markdown(comparison: JsonComparison) -> str:
    """For a pull-request comment; ends with a newline."""
    gate = comparison["gate"]
    parts = [f"## deployopt compare\n\n**{markdown.cell(headline(comparison))}**"]
    if gate_sentence(comparison):
        parts.append(f"{'✅' if gate['met'] else '❌'} {markdown.cell(gate_sentence(comparison))}")
    parts.append("\n".join(f"- ❌ {markdown.cell(miss)}" for miss in gate["misses"]))
    headers = ["row", "verdict", "base ms", "new ms", "new/base [95 %]", *CHANGES, "accuracy"]
    body = [
        [
            *(r["key"], r["verdict"], _p50(r["base_p50_ms"]), _p50(r["new_p50_ms"]), _ratio(r)),
            *(_relative(r, name) for name in CHANGES),
            _accuracy(r, comparison["task"]),
        ]
        for r in comparison["rows"]
    ]
    parts.append(markdown.table(headers, body, left=2) if body else "")
    parts.append("\n".join(f"- {markdown.cell(note)}" for note in _notes(comparison)))
    remarks = [f"- {markdown.cell(reason)}: {markdown.cell(', '.join(keys))}" for reason, keys in _remarks(comparison).items()]
    parts.append(markdown.folded("Remarks", "\n".join(remarks)) if remarks else "")
    return "\n\n".join(p for p in parts if p) + "\n"


def _told(row: Mapping[str, Any]) -> str:
    verdict = f"{row['verdict']} {_ratio(row)}".strip()
    return f"{verdict}: {row['why']}" if row["undecided"] else verdict


def render_junit(comparison: JsonComparison) -> str:
    """Each row a test case: regressions fail, rows that cannot be compared are skipped; gate misses of no row are cases of their own."""
    cases = []
    misses: list[str] = list(comparison["gate"]["misses"])
    for row in comparison["rows"]:
        own = [m for m in misses if m.startswith(f"{row['key']}: ")]
        outcome = "failure" if row["regressions"] else "skipped" if row["verdict"] not in CHANGED else "passed"
        message = "; ".join(own) if row["regressions"] else f"{row['verdict']}: {row['why']}" if outcome == "skipped" else ""
        cases.append(junit.Case("deployopt.compare", row["key"], outcome=outcome, message=message, output=_told(row)))
    claimed = {m for r in comparison["rows"] for m in misses if m.startswith(f"{r['key']}: ")}
    cases += [junit.Case("deployopt.compare", "gate", outcome="failure", message=m) for m in misses if m not in claimed]
    return junit.document(f"deployopt compare {comparison['base']} {comparison['new']}", {"compare": cases})
