"""The closing summary on a terminal. Fits 100 columns; narrower ones lose their least important columns, never wrap inside a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from deployopt.report import summary, units
from deployopt.report.summary import JsonRow, Report
from deployopt.report.verdict import headline

STATUS_STYLE = {"ok": "green", "built": "cyan", "unavailable": "yellow", "failed": "red", "invalid": "magenta"}


class Column(NamedTuple):
    """A column and how soon it goes when the terminal is narrow (0: never; else the highest goes first)."""

    header: str
    cells: Sequence[str]
    shed: int = 0
    right: bool = True


def table(columns: Sequence[Column], console: Console, styles: Sequence[str] | None = None) -> Table:
    """A table of the columns that fit; every row stays on one line."""
    shown = [c for c in columns if any(c.cells)]
    while True:
        grid = Table(box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False, show_edge=False, collapse_padding=True, header_style="bold")
        for index, column in enumerate(shown):
            grid.add_column(Text(column.header), justify="right" if column.right else "left", no_wrap=True, overflow="ellipsis")
            grid.columns[index].min_width = 3
        for number in range(len(shown[0].cells)):
            grid.add_row(*(Text(c.cells[number]) for c in shown), style=styles[number] if styles else None)
        droppable = [c for c in shown if c.shed]
        if not droppable or Measurement.get(console, console.options.update(max_width=10_000), grid).maximum <= console.width:
            return grid
        shown.remove(max(droppable, key=lambda c: c.shed))


def _print_prose(console: Console, markup: str) -> None:
    """A sentence, folded at words."""
    console.print(Text.from_markup(markup))


def _variants(report: Report, console: Console) -> None:
    variants, task = report["variants"], summary.task_of(report)
    if not variants:
        return
    columns = [
        Column("variant", [v["name"] for v in variants], right=False),
        Column("stage", [v.get("stage") or "" for v in variants], 3, right=False),
        Column("params", [units.count(v.get("params")) for v in variants]),
        Column("MACs", [units.count(v.get("macs")) for v in variants]),
        Column("size", [units.size(v.get("size_bytes")) for v in variants]),
        Column(units.metric_name(task["primary"]), [units.score((v.get("accuracy") or {}).get(task["primary"]), task) for v in variants]),
        Column("took", ["cached" if v.get("cached") else units.seconds(v.get("seconds")) for v in variants], 2),
    ]
    console.print(table(spaced(columns), console))
    console.print()


def spaced(columns: Sequence[Column]) -> list[Column]:
    """Two spaces between columns, as part of the cells, so that a measured width is the printed width."""
    return [columns[0], *(c._replace(header=f" {c.header}", cells=[f" {cell}" if cell else "" for cell in c.cells]) for c in columns[1:])]


def _rows(report: Report, console: Console) -> None:
    rows, variants, task = report["rows"], report["variants"], summary.task_of(report)
    reference = summary.dense_score(rows, variants, task)
    recommended = (report.get("recommended") or {}).get("row")
    for batch in summary.batches(rows):
        shown = [(index, r) for index, r in enumerate(rows) if r["batch"] == batch and r["status"] != "unavailable"]
        if not shown:
            continue
        console.print(Text.assemble((f"batch {batch}", "bold"), ("  ms on the host clock, speed-up over dense FP32 there; ±, –: 95 % intervals", "dim")))
        bases = [summary.dense_row(rows, variants, r["backend"], batch) is r for _, r in shown]
        columns = _row_columns([r for _, r in shown], bases, reference, task)
        console.print(table(columns, console, ["bold green" if i == recommended else "" for i, _ in shown]))
        console.print()


def _row_columns(rows: Sequence[JsonRow], bases: Sequence[bool], reference: float | None, task: Mapping[str, Any]) -> list[Column]:
    def each(figure: Callable[[JsonRow], str]) -> list[str]:
        return [figure(r) for r in rows]

    percent = units.is_fraction(task)

    def score(row: JsonRow) -> str:
        value = summary.primary_score(row, task)
        return "" if value is None else f"{100 * value:.2f}" if percent else units.significant(value, 4)

    def median(row: JsonRow) -> str:
        return units.significant(summary.p50_ms(row)) if row["status"] == "ok" and summary.p50_ms(row) is not None else row["status"]

    def speed_interval(row: JsonRow, is_base: bool) -> str:
        return "" if is_base else units.interval(row.get("speedup_ci95"), decimals=2)

    return spaced(
        [
            Column("variant", each(lambda r: r["variant"]), right=False),
            Column("backend", each(lambda r: r["backend"]), right=False),
            Column("prec", each(lambda r: r["precision"]), right=False),
            Column(units.metric_name(task["primary"]) + ("%" if percent else ""), each(score)),
            Column("Δ", each(lambda r: summary.accuracy_cell(r, reference, task)[1]), 1),
            Column("p50", each(median)),
            Column("±", each(_half_width), 6),
            Column("p99", each(lambda r: units.significant(summary.host(r).get("p99")) if summary.host(r) else ""), 5),
            Column("speed", each(lambda r: units.factor(r["speedup"]) if r.get("speedup") is not None else "")),
            Column("[95 %]", [speed_interval(r, base) for r, base in zip(rows, bases, strict=True)], 4),
            Column("INT8", each(summary.quantized_cell), 2),
            Column("size", each(lambda r: units.size(summary.size_bytes(r)) if summary.size_bytes(r) else ""), 3),
        ]
    )


def _half_width(row: JsonRow) -> str:
    """The wider half of the median's 95 % interval, relative to the median."""
    median, bounds = summary.p50_ms(row), summary.host(row).get("p50_ci95")
    if not median or not bounds:
        return ""
    return f"{100 * max(bounds[1] - median, median - bounds[0]) / median:.1f}%"


def _reasons(rows: Sequence[JsonRow], console: Console) -> None:
    for absence in summary.absences(rows):
        remedy = f" → {escape(absence.remedy)}" if absence.remedy else ""
        _print_prose(
            console, f"[yellow]{absence.status}[/] [bold]{escape(absence.where)}[/] ({units.plural(absence.rows, 'row')}): {escape(absence.reason)}{remedy}"
        )
    for row in rows:
        if row["status"] in {"failed", "invalid"}:
            what, remedy = summary.split_remedy(row.get("reason"))
            mend = f" → {escape(remedy)}" if remedy else ""
            style = STATUS_STYLE[row["status"]]
            _print_prose(console, f"[{style}]{row['status']}[/] [bold]{escape(summary.row_key(row))}[/]: {escape(what)}{mend}")
    if any(r["status"] != "ok" for r in rows):
        console.print()


def render(report: Report, console: Console, run_dir: Path | None = None) -> None:
    """Print the summary: budget misses first, then what was measured, how, and where the files are.

    Args:
        run_dir: the run folder, for paths that can be pasted; default: its name as the report has it.
    """
    budget, rows = report.get("budget") or {}, report["rows"]
    for violation in budget.get("violations") or []:
        _print_prose(console, f"[bold red]BUDGET MISSED[/] {escape(violation['sentence'])}")
    console.print(Text(headline(report), style="bold"))
    console.print(Text(summary.environment_line(report.get("environment") or {}), style="dim"))
    console.print()
    _variants(report, console)
    _rows(report, console)
    _reasons(rows, console)
    for line in summary.contract_lines(rows):
        console.print(Text(line, style="dim"))
    _closing(report, console, Path(run_dir) if run_dir is not None else Path(str(report.get("run") or ".")))


def _closing(report: Report, console: Console, folder: Path) -> None:
    recommended = report.get("recommended")
    console.print()
    if recommended:
        row = report["rows"][recommended["row"]]
        label = "recommended" if recommended.get("within_budget", True) else "nearest"
        artifact = (row.get("artifact") or {}).get("path")
        _print_prose(console, f"[bold green]{label}[/] {escape(summary.row_key(row))}: {escape(recommended['why'])}")
        if artifact:
            console.print(Text(f"  {folder / artifact}"), soft_wrap=True)
    for name in ("report.json", "report.md", "report.html"):
        console.print(Text(f"{folder / name}"), soft_wrap=True)
