"""The report as GitHub Markdown: fits a pull-request comment or a job summary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from deployopt.report import fusion, profiles, pruning, summary, sweeps, units
from deployopt.report.summary import JsonRow, Report
from deployopt.report.verdict import headline


def cell(value: Any) -> str:
    """Text that cannot break a table, start markup or inject HTML."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """A table whose first `left` columns are text and whose others are figures."""
    head = f"| {' | '.join(headers)} |"
    rule = f"|{'|'.join(' :-- ' if i < left else ' --: ' for i in range(len(headers)))}|"
    return "\n".join([head, rule, *(f"| {' | '.join(cell(c) for c in row)} |" for row in rows)])


def _latency(row: JsonRow) -> str:
    if summary.p50_ms(row) is None or row["status"] not in {"ok", "invalid"}:
        return ""
    return f"{units.significant(summary.p50_ms(row))} [{units.interval(summary.host(row).get('p50_ci95'))}]"


def _speedup(row: JsonRow) -> str:
    if row.get("speedup") is None:
        return ""
    bounds = units.interval(row.get("speedup_ci95"))
    return units.factor(row["speedup"]) + (f" [{bounds}]" if bounds else "")


def _rows(report: Report) -> str:
    rows, task = report["rows"], summary.task_of(report)
    reference = summary.dense_score(rows, report["variants"], task)
    name = units.metric_name(task["primary"])
    headers = ["variant", "backend", "precision", "batch", "status", name, "vs. dense", "p50 ms [95 %]", "p99 ms", "speed-up [95 %]", "INT8 layers", "size"]
    body = []
    for row in (r for r in summary.own(rows) if r["status"] != "unavailable"):
        accuracy, difference = summary.accuracy_cell(row, reference, task)
        p99 = units.significant(summary.host(row).get("p99")) if summary.host(row) else ""
        body.append(
            [
                *(row[k] for k in ("variant", "backend", "precision", "batch", "status")),
                *(accuracy, difference, _latency(row), p99, _speedup(row), summary.quantized_cell(row), units.size(summary.size_bytes(row))),
            ]
        )
    return table(headers, body, left=3) if body else ""


def _reasons(rows: Sequence[JsonRow]) -> str:
    lines = [f"- **{cell(a.where)}** {a.status} ({units.plural(a.rows, 'row')}): {cell(a.reason)}{_remedy(a.remedy)}" for a in summary.absences(rows)]
    for row in rows:
        if row["status"] in {"failed", "invalid"}:
            what, remedy = summary.split_remedy(row.get("reason"))
            lines.append(f"- **{cell(summary.row_key(row))}** {row['status']}: {cell(what)}{_remedy(remedy)}")
    lines += [f"- **{cell(where)}** note: {cell(note)}" for where, note in summary.notes(rows)]
    return "\n".join(lines)


def _remedy(remedy: str) -> str:
    return f" → {cell(remedy)}" if remedy else ""


def folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def _pruning(report: Report) -> list[str]:
    """What each prune stage reached and measured; long tables are folded."""
    parts = []
    for name, facts, cached in pruning.variants(report):
        if said := pruning.sentences(facts, cached):
            parts.append("\n".join([f"**Pruning: {cell(name)}**", "", *(f"- {cell(sentence)}" for sentence in said)]))
        if (trace := pruning.trace(facts)) is not None:
            parts.append(folded(f"Search for the latency: {cell(name)}", table(*trace)))
        if (scores := pruning.sensitivity(facts, summary.task_of(report))) is not None:
            lead = cell(pruning.lead(facts["sensitivity"], summary.task_of(report)))
            parts.append(folded(f"Sensitivity: {cell(name)}", f"{lead}\n\n{table(*scores)}"))
    return parts


def render(report: Report) -> str:
    """The report as Markdown; ends with a newline."""
    task, variants = summary.task_of(report), report["variants"]
    violations = (report.get("budget") or {}).get("violations") or []
    recommended = report.get("recommended")
    parts = [f"## deployopt: {cell((report.get('recipe') or {}).get('name') or report.get('run') or 'report')}"]
    parts += ["\n".join(f"- ❌ **Budget missed**: {cell(v['sentence'])}" for v in violations), f"**{cell(headline(report))}**"]
    if recommended:
        row = report["rows"][recommended["row"]]
        path = (row.get("artifact") or {}).get("path")
        kind = "Recommended" if recommended.get("within_budget", True) else "Nearest"
        parts.append(f"{kind}: {cell(summary.row_key(row))}{f' (`{path}`)' if path else ''}: {cell(recommended['why'])}.")
    name = units.metric_name(task["primary"])
    figures = [
        [
            v["name"],
            units.count(v.get("params")),
            units.count(v.get("macs")),
            units.size(v.get("size_bytes")),
            units.score((v.get("accuracy") or {}).get(task["primary"]), task),
            "cached" if v.get("cached") else units.seconds(v.get("seconds")),
        ]
        for v in variants
    ]
    parts.append(table(["variant", "params", "MACs", "size", name, "took"], figures) if figures else "")
    parts += [_rows(report), _reasons(report["rows"]), *_pruning(report)]
    if (costs := sweeps.table(report["rows"])) is not None:
        parts.append(folded("Throughput, start-up and memory", table(*costs, left=5)))
    for found in summary.sensitivities(variants, task):
        parts.append(folded(f"Sensitivity of each layer: {cell(found.variant)}", f"{cell(found.lead)}\n\n{table(found.headers, found.rows)}"))
    if (engines := fusion.table(report["rows"])) is not None:
        parts.append(folded(fusion.TITLE, f"{cell(fusion.LEAD)}\n\n{table(*engines)}"))
    if overview := profiles.overview(report["rows"]):
        parts.append(folded("Where the time goes", f"{cell(profiles.LEAD)}\n\n{table(profiles.OVERVIEW, overview, left=4)}"))
    contract = [
        *(cell(line) for line in summary.contract_lines(report["rows"], report.get("environment") or {})),
        cell(summary.environment_line(report.get("environment") or {})),
    ]
    parts.append(folded("How it was measured", "\n".join(f"- {line}" for line in contract)))
    return "\n\n".join(p for p in parts if p) + "\n"
