"""The closing summary on a terminal. Fits 100 columns; narrower ones lose their least important columns, never wrap inside a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from deployopt.report import profiles, pruning, summary, sweeps, units
from deployopt.report.summary import JsonRow, Report
from deployopt.report.verdict import headline

STATUS_STYLE = {"ok": "green", "built": "cyan", "unavailable": "yellow", "failed": "red", "invalid": "magenta"}
LAYERS_SHOWN = 12  # of a profile, the slowest
NODES_LEAVE = 44  # columns beside their names, for the others of that table


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


def _print_item(console: Console, head: Text, body: str | Text) -> None:
    """Head and body on one line if they fit, else the body indented below."""
    body = Text(body) if isinstance(body, str) else body
    if head.cell_len + 1 + body.cell_len <= console.width:
        console.print(Text.assemble(head, " ", body))
    else:
        console.print(head)
        for line in body.wrap(console, console.width - 2):
            line.rstrip()
            console.print(Text("  ") + line)


def _print_parts(console: Console, line: str, style: str) -> None:
    """A line of parts joined by " · ", broken only between parts where it must be."""
    shown = ""
    for part in line.split(summary.SEPARATOR):
        longer = f"{shown}{summary.SEPARATOR}{part}" if shown else part
        if shown and cell_len(longer) > console.width:
            console.print(Text(shown, style=style))
            longer = f"  {part}"
        shown = longer
    console.print(Text(shown, style=style))


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
    for name, told in pruning.warnings(report):
        _print_item(console, Text.assemble(("warning", "yellow"), " ", (name, "bold"), ":"), told)
    console.print()


def spaced(columns: Sequence[Column]) -> list[Column]:
    """Two spaces between columns, as part of the cells, so that a measured width is the printed width."""
    return [columns[0], *(c._replace(header=f" {c.header}", cells=[f" {cell}" if cell else "" for cell in c.cells]) for c in columns[1:])]


def _rows(report: Report, console: Console) -> None:
    rows, variants, task = report["rows"], report["variants"], summary.task_of(report)
    reference = summary.dense_score(rows, variants, task)
    recommended = (report.get("recommended") or {}).get("row")
    for batch in summary.batches(rows):
        shown = [(index, r) for index, r in enumerate(rows) if r["batch"] == batch and r["status"] != "unavailable" and not r.get("sweep")]
        if not shown:
            continue
        console.print(Text.assemble((f"batch {batch}", "bold"), ("  ms (host clock); speed-up over its dense FP32; ±, [ ]: 95 % CI", "dim")))
        bases = [summary.dense_row(rows, variants, r["backend"], batch) is r for _, r in shown]
        columns = _row_columns([r for _, r in shown], bases, reference, task)
        console.print(table(columns, console, ["bold green" if i == recommended else "" for i, _ in shown]))
        console.print()


def _swept(rows: Sequence[JsonRow], console: Console) -> None:
    """Throughput of the offline scenario and of other numbers of threads."""
    shown = [r for r in summary.swept(rows) if summary.host(r)]
    if not shown:
        return
    console.print(Text.assemble(("other scenarios", "bold"), ("  [ ]: 95 % CI; speed-up over its dense FP32 in the same scenario", "dim")))
    columns = [
        Column("variant", [r["variant"] for r in shown], right=False),
        Column("backend", [r["backend"] for r in shown], right=False),
        Column("prec", [r["precision"] for r in shown], right=False),
        Column("batch", [str(r["batch"]) for r in shown]),
        Column("scenario", [sweeps.scenario_name(r) for r in shown], right=False),
        Column("images/s [95 %]", [sweeps.throughput(r) if r["status"] == "ok" else r["status"] for r in shown]),
        Column("p50", [units.significant(summary.p50_ms(r)) for r in shown], 2),
        Column("speed", [units.factor(r["speedup"]) if r.get("speedup") is not None else "" for r in shown], 1),
    ]
    console.print(table(spaced(columns), console))
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
            Column("device", each(lambda r: units.significant(summary.device(r).get("p50")) if summary.device(r) else ""), 7),
            Column("p99", each(lambda r: units.significant(summary.host(r).get("p99")) if summary.host(r) else ""), 5),
            Column("speed", each(lambda r: units.factor(r["speedup"]) if r.get("speedup") is not None else "")),
            Column("[95 %]", [speed_interval(r, base) for r, base in zip(rows, bases, strict=True)], 4),
            Column("INT8", each(summary.quantized_cell), 2),
            Column("size", each(lambda r: units.size(summary.size_bytes(r)) if summary.size_bytes(r) else ""), 3),
        ]
    )


def _where_time_goes(rows: Sequence[JsonRow], console: Console) -> None:
    """What takes the time of each profiled INT8 row, and what of it is not INT8."""
    told = profiles.sentences(rows)
    if not told:
        return
    console.print(Text.assemble(("where the time goes", "bold"), ("  INT8 rows, by the runtimes' own profilers", "dim")))
    for where, what in told:
        _print_item(console, Text(f"{where}:"), what)
    console.print()


def _half_width(row: JsonRow) -> str:
    """The wider half of the median's 95 % interval, relative to the median."""
    median, bounds = summary.p50_ms(row), summary.host(row).get("p50_ci95")
    if not median or not bounds:
        return ""
    return f"{100 * max(bounds[1] - median, median - bounds[0]) / median:.1f}%"


def _reasons(rows: Sequence[JsonRow], console: Console, key: Callable[[JsonRow], str] = summary.row_key) -> None:
    for absence in summary.absences(rows):
        remedy = f" → {absence.remedy}" if absence.remedy else ""
        head = Text.assemble((absence.status, "yellow"), " ", (absence.where, "bold"), f" ({units.plural(absence.rows, 'row')}):")
        _print_item(console, head, f"{absence.reason}{remedy}")
    for row in rows:
        if row["status"] in {"failed", "invalid"}:
            what, remedy = summary.split_remedy(row.get("reason"))
            head = Text.assemble((row["status"], STATUS_STYLE[row["status"]]), " ", (key(row), "bold"), ":")
            _print_item(console, head, f"{what} → {remedy}" if remedy else what)
    noted = summary.notes(rows)
    for where, note in noted:
        _print_item(console, Text.assemble(("note", "yellow"), " ", (where, "bold"), ":"), note)
    if noted or any(r["status"] != "ok" for r in rows):
        console.print()


def render(report: Report, console: Console, run_dir: Path | None = None) -> None:
    """Print the summary: budget misses first, then what was measured, how, and where the files are.

    Args:
        run_dir: the run folder, for paths that can be pasted; default: its name as the report has it.
    """
    budget, rows = report.get("budget") or {}, report["rows"]
    for violation in budget.get("violations") or []:
        _print_prose(console, f"[bold red]BUDGET MISSED[/] {escape(violation['sentence'])}")
    subject, colon, bought = headline(report).partition(": ")
    _print_item(console, Text(f"{subject}{colon.strip()}", style="bold"), Text(bought, style="bold"))
    _print_parts(console, summary.environment_line(report.get("environment") or {}), "dim")
    console.print()
    _variants(report, console)
    _rows(report, console)
    _swept(rows, console)
    _where_time_goes(rows, console)
    _reasons(rows, console)
    for line in summary.contract_lines(rows, report.get("environment") or {}):
        _print_parts(console, line, "dim")
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


def render_bench(rows: Sequence[JsonRow], console: Console) -> None:
    """What `deployopt bench` measured: a table a batch size, who is faster than the first, what failed and why, where, and the contract.

    Args:
        rows: `artifact.Row`s as JSON; `variant` is the artifact's name, the first one is the baseline.
    """
    for batch in summary.batches(rows):
        shown = [r for r in rows if r["batch"] == batch]
        console.print(Text.assemble((f"batch {batch}", "bold"), ("  ms (host clock); speed-up over the first; [ ]: 95 % CI", "dim")))
        console.print(table(_bench_columns(shown), console))
        for row in shown[1:]:
            console.print(Text(bench_verdict(row, shown[0])))
        console.print()
    for row in profiles.profiled(rows):
        _layers(row, console)
    _reasons(rows, console, lambda r: f"{r['variant']} b{r['batch']}")
    where = next((r["contract"]["environment"] for r in rows if (r.get("contract") or {}).get("environment")), None)
    for line in [*([summary.environment_line(where), summary.versions_line(where)] if where else []), *summary.contract_lines(rows)]:
        _print_parts(console, line, "dim")


def _layers(row: JsonRow, console: Console) -> None:
    """A profiled artifact's slowest layers."""
    profile = row["profile"]
    console.print(Text.assemble((f"{row['variant']} b{row['batch']}: where the time goes", "bold"), (f"  {profiles.by_kind(profile)}", "dim")))
    if profiles.quantized(row):
        _print_item(console, Text("not INT8:"), profiles.not_int8(profile))
    columns = zip(profiles.LAYERS, zip(*profiles.table(profile, LAYERS_SHOWN), strict=True), strict=True)
    nodes, kind, *others = (Column(header, cells, right=header in profiles.LAYERS[3:]) for header, cells in columns)
    room = max(20, console.width - NODES_LEAVE)
    clipped = nodes._replace(cells=[_clipped(text, room) for text in nodes.cells])
    console.print(table(spaced([clipped, kind._replace(shed=1), *others]), console))
    console.print(Text(profiles.sums(row), style="dim"))
    console.print()


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _bench_columns(rows: Sequence[JsonRow]) -> list[Column]:
    def each(figure: Callable[[JsonRow], str]) -> list[str]:
        return [figure(r) for r in rows]

    def host(name: str) -> list[str]:
        return each(lambda r: units.significant(summary.host(r).get(name)) if summary.host(r) else "")

    def bracketed(bounds: list[float] | None, decimals: int | None = None) -> str:
        text = units.interval(bounds, decimals)
        return f"[{text}]" if text else ""

    quantized = each(summary.quantized_cell)
    return spaced(
        [
            Column("artifact", each(lambda r: r["variant"]), right=False),
            Column("backend", each(lambda r: r["backend"]), 5, right=False),
            Column("prec", each(lambda r: r["precision"]), 3, right=False),
            Column("INT8", quantized if set(quantized) != {units.UNKNOWN} else [""] * len(rows), 1),
            Column("p50", each(lambda r: units.significant(summary.p50_ms(r)) if summary.host(r) else r["status"])),
            Column("[95 %]", each(lambda r: bracketed(summary.host(r).get("p50_ci95"))), 2),
            Column("device", each(lambda r: units.significant(summary.device(r).get("p50")) if summary.device(r) else ""), 8),
            Column("p90", host("p90"), 6),
            Column("p99", host("p99"), 4),
            Column("images/s", each(lambda r: units.significant(r["throughput_per_s"]) if r.get("throughput_per_s") else ""), 7),
            Column("speed", each(lambda r: units.factor(r["speedup"]) if r.get("speedup") is not None else "")),
            Column("[95 %]", ["", *(bracketed(r.get("speedup_ci95"), 2) for r in rows[1:])], 1),
        ]
    )


def bench_verdict(row: JsonRow, first: JsonRow) -> str:
    """One sentence: "qat is 5.2x faster than finetune, 5.1–5.3", or that noise hides the difference, or why nothing can be said."""
    name, base, speedup, bounds = row["variant"], first["variant"], row.get("speedup"), row.get("speedup_ci95")
    if speedup is None:
        lacking = " and ".join(r["variant"] for r in (first, row) if not summary.host(r))
        return f"{name} cannot be compared with {base}: {lacking} was not measured"
    doubtful = [r["variant"] for r in (first, row) if r["status"] == "invalid"]
    doubt = f" (doubtful: {'both' if len(doubtful) > 1 else doubtful[0]} invalid)" if doubtful else ""
    if not bounds:
        return f"{name}: {units.factor(speedup)} the speed of {base}, from too few blocks for an interval{doubt}"
    if bounds[0] <= 1 <= bounds[1]:
        return f"no difference between {name} and {base}: {units.interval(bounds, 2)} covers 1{doubt}"
    if speedup > 1:
        return f"{name} is {units.significant(speedup)}x faster than {base}, {units.interval(bounds, 2)}{doubt}"
    return f"{name} is {units.significant(1 / speedup)}x slower than {base}, {units.interval([1 / bounds[1], 1 / bounds[0]], 2)}{doubt}"
