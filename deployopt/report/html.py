"""The report as one HTML file that opens offline: no fetches, no fonts, inline SVG, style and script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from deployopt.artifact import INT8_PRECISIONS
from deployopt.report import charts, fusion, profiles, pruning, summary, sweeps, units
from deployopt.report.summary import JsonRow, Report
from deployopt.report.verdict import headline, limit_sentences

CLASSES_DRAWN = 30  # a confusion matrix with more is unreadable; its worst pairs are listed instead
WORST_PAIRS = 15
LAYERS_DRAWN, FLOATS_NAMED = 20, 12  # of a profile, the slowest; the table has all
PRECISION_COLOURS = {"int8": 2, "fp32": 0, "fp16": 4, "bf16": 3, "fp8": 5}  # of the page's palette
OTHER_COLOUR = 7
NOTHING = Markup("")


class Figure(NamedTuple):
    """A drawn chart with what belongs to it; `folded` ones open on a click."""

    title: str
    drawing: Markup
    legend: Markup = NOTHING
    note: str = ""
    folded: bool = False


class Section(NamedTuple):
    """A heading with figures; `table` is the same content for those who cannot see them: (headers, rows)."""

    anchor: str
    title: str
    figures: Sequence[Figure]
    lead: str = ""
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None


class _Palette:
    """Colours by backend and shapes by variant, the same in every chart."""

    def __init__(self, report: Report) -> None:
        self.backends = list(dict.fromkeys(r["backend"] for r in report["rows"]))
        self.variants = list(dict.fromkeys([*(v["name"] for v in report["variants"]), *(r["variant"] for r in report["rows"])]))

    def colour(self, row: JsonRow) -> int:
        return self.backends.index(row["backend"]) % charts.COLOURS

    def shape(self, row: JsonRow) -> int:
        return self.variants.index(row["variant"]) % charts.SHAPES

    def legend(self, rows: Sequence[JsonRow], shapes: bool = True) -> Markup:
        used = {r["backend"] for r in rows}
        entries = [(b, charts.swatch(i)) for i, b in enumerate(self.backends) if b in used]
        if shapes:
            drawn = {r["variant"] for r in rows}
            entries += [(v, charts.marker(8, 8, i, "mark plain")) for i, v in enumerate(self.variants) if v in drawn]
        return charts.legend(entries)


def _short(row: JsonRow) -> str:
    return f"{row['variant']} {row['backend']} {row['precision']}"


def _row_tip(row: JsonRow, reference: float | None, task: Mapping[str, Any]) -> str:
    score, difference = summary.accuracy_cell(row, reference, task)
    lines = [_short(row) + f", batch {row['batch']}", f"p50 {units.milliseconds(summary.p50_ms(row))} [{units.interval(summary.host(row).get('p50_ci95'))}]"]
    if summary.host(row).get("p99") is not None:
        lines.append(f"p99 {units.milliseconds(summary.host(row)['p99'])}")
    if row.get("speedup") is not None:
        lines.append(f"{units.factor(row['speedup'])} of dense FP32's speed")
    lines.append(f"{units.metric_name(task['primary'])} {score} ({difference} against dense)")
    if summary.size_bytes(row):
        lines.append(units.size(summary.size_bytes(row)))
    return "\n".join(lines)


def _tradeoff(report: Report, palette: _Palette) -> Section | None:
    task, rows = summary.task_of(report), summary.own(summary.measured(report["rows"]))
    rows = [r for r in rows if summary.primary_score(r, task) is not None]
    if not rows:
        return None
    reference = summary.dense_score(report["rows"], report["variants"], task)
    chosen = (report.get("recommended") or {}).get("row")
    chosen_key = summary.row_key(report["rows"][chosen]) if chosen is not None else None
    figures: list[Figure] = []
    for batch in summary.batches(rows):
        here = [r for r in rows if r["batch"] == batch]
        places = [(summary.p50_ms(r) or 0.0, summary.primary_score(r, task) or 0.0) for r in here]
        front = set(charts.pareto(places, higher_y=task["higher_is_better"]))
        points = [
            charts.Point(x, y, palette.colour(r), palette.shape(r), _short(r), _row_tip(r, reference, task), i in front, summary.row_key(r) == chosen_key)
            for i, (r, (x, y)) in enumerate(zip(here, places, strict=True))
        ]
        name, title = units.metric_name(task["primary"]), f"Accuracy against latency, batch {batch}"
        show: Callable[[float], str] = (lambda v: f"{100 * v:.4g} %") if units.is_fraction(task) else charts.tick_label
        y_title = name if units.is_fraction(task) else f"{name}, {task['unit']}"

        def draw(
            width: float, points: Sequence[charts.Point] = points, title: str = title, show: Callable[[float], str] = show, y_title: str = y_title
        ) -> Markup:
            return charts.scatter(points, width, x_title="latency p50, ms", y_title=y_title, show_y=show, label=title)

        figures.append(Figure(f"batch {batch}", charts.responsive(draw), palette.legend(here), folded=bool(figures)))
    better = "up" if task["higher_is_better"] else "down"
    return Section(
        "tradeoff",
        "Accuracy against latency",
        figures,
        f"Better is {better} and to the left. The line joins the rows that none beats in both; the ring marks the row named above.",
    )


def _path(report: Report) -> list[JsonRow]:
    """One measured row a variant, in trunk order, on the recommended row's backend and batch; float variants in FP32, others as that row if it is INT8."""
    recommended = report.get("recommended")
    if not recommended:
        return []
    best = report["rows"][recommended["row"]]
    int8 = best["precision"] if best["precision"] in INT8_PRECISIONS else "int8"
    found = []
    for variant in report["variants"]:
        precision = int8 if variant.get("family") == "int8" else "fp32"
        wanted = (variant["name"], best["backend"], precision, best["batch"])
        found += [r for r in summary.own(summary.measured(report["rows"])) if (r["variant"], r["backend"], r["precision"], r["batch"]) == wanted]
    return found


def _waterfall(
    names: Sequence[str], values: Sequence[float], show: Callable[[float], str], delta: Callable[[float, float], str], lower_is_better: bool
) -> list[charts.Bar]:
    """The first value whole, then each stage's change from its predecessor, coloured by whether it helps."""
    found = [charts.Bar(names[0], 0.0, values[0], show(values[0]), "neutral", f"{names[0]}: {show(values[0])}")]
    for name, before, after in zip(names[1:], values, values[1:], strict=False):
        css = "neutral" if before == after else "good" if (after < before) == lower_is_better else "bad"
        label = f"{show(after)} ({delta(before, after)})"
        found.append(charts.Bar(name, before, after, label, css, f"{name}: {show(before)} → {label}"))
    return found


def _relative(before: float, after: float) -> str:
    return f"{units.signed(100 * (after - before) / before, 0)} %" if before else units.signed(after - before)


def _stages(report: Report) -> Section | None:
    rows, task = _path(report), summary.task_of(report)
    if len(rows) < 2:
        return None
    names = [f"{r['variant']} {r['precision']}" for r in rows]
    by_name = {v["name"]: v for v in report["variants"]}

    def points(before: float, after: float) -> str:
        return units.change(summary.accuracy_change(after, before, task), task)

    panels: list[tuple[str, list[float | None], Callable[[float], str], Callable[[float, float], str], bool]] = [
        ("Latency p50", [summary.p50_ms(r) for r in rows], units.milliseconds, _relative, True),
        ("Artifact size", [summary.size_bytes(r) for r in rows], units.size, _relative, True),
        ("MACs", [by_name[r["variant"]].get("macs") for r in rows], units.count, _relative, True),
        (
            units.metric_name(task["primary"]),
            [summary.primary_score(r, task) for r in rows],
            lambda v: units.score(v, task),
            points,
            not task["higher_is_better"],
        ),
    ]
    figures = []
    for title, values, show, delta, lower in panels:
        known = [(n, v) for n, v in zip(names, values, strict=True) if v is not None]
        if len(known) < 2:
            continue
        items = _waterfall([n for n, _ in known], [v for _, v in known], show, delta, lower)
        cut = title == units.metric_name(task["primary"])
        figures.append(_bars(title, items, zero=not cut, note="The axis does not start at zero." if cut else ""))
    where = f"{rows[0]['backend']}, batch {rows[0]['batch']}"
    table = (["", *names], [[title, *("–" if v is None else show(v) for v in values)] for title, values, show, _, _ in panels])
    return Section("stages", "What each stage bought", figures, f"On {where}: each bar runs from the stage before to the stage itself.", table)


def _bars(title: str, items: Sequence[charts.Bar], *, zero: bool = True, note: str = "", legend: Markup = NOTHING, half: bool = True) -> Figure:
    """Bars; `half`: two such figures stand side by side on a desk."""

    def draw(width: float) -> Markup:
        return charts.bars(items, (width - 40) / 2 if half and width > charts.NARROW else width, title, zero=zero)

    return Figure(title, charts.responsive(draw), legend, note)


def _distributions(report: Report, palette: _Palette) -> Section | None:
    task = summary.task_of(report)
    reference = summary.dense_score(report["rows"], report["variants"], task)
    rows = [r for r in summary.own(summary.measured(report["rows"])) if len(summary.host(r).get("quantiles") or []) == 21]
    figures: list[Figure] = []
    for batch in summary.batches(rows):
        here = sorted((r for r in rows if r["batch"] == batch), key=lambda r: summary.p50_ms(r) or 0.0)
        items = [charts.Distribution(_short(r), summary.host(r)["quantiles"], palette.colour(r), _row_tip(r, reference, task)) for r in here]

        def draw(width: float, items: Sequence[charts.Distribution] = items, batch: int = batch) -> Markup:
            return charts.distributions(items, width, "latency, ms, host clock", f"Latency distributions, batch {batch}")

        figures.append(Figure(f"batch {batch}", charts.responsive(draw), palette.legend(here, shapes=False), folded=bool(figures)))
    lead = "Median (tick), middle half (box), 5–95 % (bar) and all runs (hairline)."
    return Section("latency", "Latency distributions", figures, lead) if figures else None


def _sweeps(report: Report) -> Section | None:
    """Curves over batch sizes and threads where several were measured; what every row takes to start and to hold."""
    figures: list[Figure] = []
    table = sweeps.table(report["rows"])
    if table is None:
        return None
    axes: tuple[tuple[sweeps.Axis, str], ...] = (("batch", "batch size"), ("threads", "threads"))
    shown: tuple[tuple[sweeps.Figure, str], ...] = (("throughput", "images/s"), ("latency", "latency p50, ms"))
    for axis, x_title in axes:
        for figure, y_title in shown:
            for variant, found in sweeps.curves(report["rows"], axis, figure).items():
                figures.append(_sweep(f"{variant}: {figure} by {x_title}", found, x_title, y_title))
    lead = "Dashed: offline, one stream a thread. Latency is of a single stream." if any(r.get("scenario") == "offline" for r in report["rows"]) else ""
    return Section("sweeps", "Throughput, start-up and memory", figures, lead, table)


def _sweep(title: str, found: Sequence[sweeps.Curve], x_title: str, y_title: str) -> Figure:
    sessions = list(dict.fromkeys(c.session for c in found))
    series = [charts.Series(c.session, sessions.index(c.session), c.offline, c.points) for c in found]

    def draw(width: float) -> Markup:
        half = (width - 40) / 2 if width > charts.NARROW else width
        return charts.curves(series, [], half, y_title=y_title, show_y=charts.tick_label, label=title, x_title=x_title, x_log_from=4)

    return Figure(title, charts.responsive(draw), charts.legend([(name, charts.stroke(i, False)) for i, name in enumerate(sessions)]))


def _fusion(report: Report) -> Section | None:
    """What TensorRT made of each network: there is nothing to draw."""
    table = fusion.table(report["rows"])
    return None if table is None else Section("fusion", fusion.TITLE, (), fusion.LEAD, table)


def _profiles(report: Report) -> Section | None:
    """A chart of the layers of each profiled row; the recommended artifact's is shown, else that of the first INT8 row; the others open on a click."""
    rows = profiles.profiled(report["rows"])
    if not rows:
        return None
    recommended = report.get("recommended")
    best = _short(report["rows"][recommended["row"]]) if recommended else ""
    rows.sort(key=lambda r: (_short(r) != best, not profiles.quantized(r)))
    figures = [_profile(row)._replace(folded=bool(index)) for index, row in enumerate(rows)]
    table = [[summary.row_key(row), *cells] for row in rows for cells in profiles.table(row["profile"])]
    return Section("layers", "Where the time goes", figures, profiles.LEAD, (("row", *profiles.LAYERS), table))


def _profile(row: JsonRow) -> Figure:
    """The slowest layers of a row, coloured by the precision that they compute in."""
    profile = row["profile"]
    kept, others = profiles.parted(profile, LAYERS_DRAWN)
    items = []
    for layer in kept:
        name, precision, share = profiles.called(layer), layer["precision"], profiles.share(layer["time_us"], profile)
        tip = f"{name}\n{layer['kind']}, {precision}: {units.significant(layer['time_us'])} µs, {share}\n{layer['name']}"
        text = f"{share}, {precision}" if profiles.quantized(row) and precision != "int8" else share  # said without colour too
        items.append(charts.Bar(name, 0.0, layer["time_us"], text, f"f{_precision_colour(precision)}", tip))
    if others:
        name, rest_us = units.plural(len(others), "other layer"), profiles.sum_us(others)
        share = profiles.share(rest_us, profile)
        items.append(charts.Bar(name, 0.0, rest_us, share, "neutral", f"{name}: {units.significant(rest_us)} µs, {share}"))
    legend = charts.legend([(name, charts.swatch(_precision_colour(name))) for name in profile["precision_us"]])
    floats = f"Not INT8: {profiles.not_int8(profile, FLOATS_NAMED)}. " if profiles.quantized(row) else ""
    return _bars(profiles.caption(row), items, note=f"{floats}{profiles.sums(row).capitalize()}.", legend=legend, half=False)


def _precision_colour(precision: str) -> int:
    return PRECISION_COLOURS.get(precision, OTHER_COLOUR)


def _sizes(report: Report, palette: _Palette) -> Section | None:
    variants = report["variants"]
    figures = []
    for title, key in (("MACs by stage", "macs"), ("Parameters by stage", "params")):
        items = [charts.Bar(v["name"], 0.0, v[key], units.count(v[key]), "neutral", f"{v['name']}: {v[key]:,} {key}") for v in variants if v.get(key)]
        if items:
            figures.append(_bars(title, items))
    seen: dict[str, charts.Bar] = {}
    rows = [r for r in report["rows"] if summary.size_bytes(r)]
    for row in rows:
        size = summary.size_bytes(row) or 0
        seen.setdefault(_short(row), charts.Bar(_short(row), 0.0, size, units.size(size), f"f{palette.colour(row)}", f"{_short(row)}: {size:,} bytes"))
    if seen:
        figures.append(_bars("Artifact size", list(seen.values()), legend=palette.legend(rows, shapes=False), half=False))
    return Section("size", "Size and MACs by stage", figures) if figures else None


def _curves(report: Report) -> Section | None:
    task = summary.task_of(report)
    primary = f"validation_{task['primary']}"
    bounds: list[tuple[float, str]] = []
    entries: list[tuple[float, Mapping[str, Any]] | None] = []
    epoch = 0
    for variant in report["variants"]:
        last_phase = None
        for entry in variant.get("curves") or []:
            epoch += 1
            if last_phase != entry.get("phase"):
                bounds.append((epoch, variant["name"] if last_phase is None else str(entry.get("phase"))))
                entries.append(None)
                last_phase = entry.get("phase")
            entries.append((epoch, entry))
    if not epoch:
        return None
    name = units.metric_name(task["primary"])

    def series(key: str, label: str, colour: int, dashed: bool, show: Callable[[float], str]) -> charts.Series:
        points: list[tuple[float, float, str] | None] = []
        for item in entries:
            value = None if item is None else item[1].get(key)
            if item is None or value is None:
                points.append(None)
            else:
                rate = f"\nlearning rate {item[1]['lr']:.3g}" if item[1].get("lr") is not None else ""
                points.append((item[0], value, f"epoch {item[1].get('epoch', item[0])}, {label} {show(value)}{rate}"))
        return charts.Series(label, colour, dashed, points)

    losses = [series("train_loss", "training loss", 0, True, units.significant), series("validation_loss", "validation loss", 1, False, units.significant)]
    scores = [series(primary, f"validation {name}", 2, False, lambda v: units.score(v, task))]
    figures = []
    for title, group, show in (
        ("Loss", losses, charts.tick_label),
        (f"Validation {name}", scores, lambda v: f"{100 * v:.4g} %" if units.is_fraction(task) else charts.tick_label(v)),
    ):
        drawn = [s for s in group if any(s.points)]
        if not drawn:
            continue

        def draw(width: float, drawn: Sequence[charts.Series] = drawn, title: str = title, show: Callable[[float], str] = show) -> Markup:
            half = (width - 40) / 2 if width > charts.NARROW else width
            return charts.curves(drawn, bounds, half, y_title=title.lower(), show_y=show, label=f"{title} by epoch")

        figures.append(Figure(title, charts.responsive(draw), charts.legend([(s.name, charts.stroke(s.colour, s.dashed)) for s in drawn])))
    return Section("training", "Training curves", figures) if figures else None


def _layer_sensitivity(report: Report) -> list[Section]:
    sections: list[Section] = []
    for found in summary.sensitivities(report["variants"], summary.task_of(report)):
        figures = []
        for title, column in (("alone in INT8", 1), ("alone in float", 2)):
            values = [(row[0], float(row[column])) for row in found.distances]
            shown = [(name, value, units.significant(value)) for name, value in values]
            items = [charts.Bar(name, 0.0, value, text, "neutral", f"{name} {title}: {text} ({found.distance})") for name, value, text in shown]
            figures.append(_bars(f"{found.distance}, each layer {title}", items))
        anchor, title = f"layer-sensitivity-{len(sections)}", f"Sensitivity of each layer: {found.variant}"
        sections.append(Section(anchor, title, figures, found.lead, (found.headers, found.rows)))
    return sections


def _pruning(report: Report) -> list[Section]:
    """For each prune stage what it reached, the search for its latency, and the sensitivity of its groups."""
    task, sections = summary.task_of(report), []
    for index, (name, facts, cached) in enumerate(pruning.variants(report)):
        said, trace = "; ".join(pruning.sentences(facts, cached)), pruning.trace(facts)
        if said or trace is not None:
            sections.append(Section(f"pruning-{index}", f"Pruning: {name}", [], f"{said[:1].upper()}{said[1:]}." if said else "", trace))
        scores = pruning.sensitivity(facts, task)
        if scores is not None:
            figures = [_group_sensitivity(facts["sensitivity"], position, task) for position in range(len(facts["sensitivity"]["ratios"]))]
            lead = pruning.lead(facts["sensitivity"], task)
            sections.append(Section(f"group-sensitivity-{index}", f"Sensitivity: {name}", figures, lead, scores))
    return sections


def _group_sensitivity(found: Mapping[str, Any], position: int, task: Mapping[str, Any]) -> Figure:
    """What each group loses where one share of it is cut; the largest share is shown, the others open on a click."""
    items = []
    for group in found["groups"]:
        change = summary.accuracy_change(group["scores"][position], found["whole"], task) or 0.0
        worse = change < 0 if task["higher_is_better"] else change > 0
        shown = units.change(change, task)
        items.append(charts.Bar(group["name"], 0.0, abs(change), shown, "bad" if worse else "good", f"{group['name']}: {shown}"))
    title = f"{100 * found['ratios'][position]:g} % of the channels cut"
    return _bars(title, items, half=False)._replace(folded=position < len(found["ratios"]) - 1)


def _confusion(report: Report) -> Section | None:
    """Of every variant that has one, the last on top and the others folded; the pairs most often confused, variant by variant."""
    variants = [v for v in reversed(report["variants"]) if (v.get("details") or {}).get("confusion")]
    if not variants:
        return None
    leads, pairs = [], []
    figures: list[Figure] = []
    for variant in variants:
        name, matrix = variant["name"], variant["details"]["confusion"]
        classes = [str(c) for c in variant["details"].get("classes") or report.get("classes") or range(len(matrix))]
        leads.append(f"{name}: {sum(matrix[i][i] for i in range(len(matrix)))} of {sum(map(sum, matrix))} right")
        wrong = sorted(((n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if i != j and n), reverse=True)[:WORST_PAIRS]
        pairs += [[name, classes[i], classes[j], str(n), str(sum(matrix[i]))] for n, i, j in wrong]
        if len(classes) <= CLASSES_DRAWN:
            figures.append(_confusion_figure(f"Confusion matrix: {name}", matrix, classes, folded=bool(figures)))
    lead = f"{'; '.join(leads)}."
    if not figures:
        lead = f"{lead} {len(classes)} classes are too many to draw; the pairs most often confused are below."
    return Section("confusion", "Confusion matrices", figures, lead, (["variant", "truth", "predicted", "times", "of"], pairs))


def _confusion_figure(title: str, matrix: Sequence[Sequence[int]], classes: Sequence[str], *, folded: bool) -> Figure:
    def draw(width: float) -> Markup:
        return charts.confusion(matrix, classes, min(width, 620.0), title)

    return Figure(title, charts.responsive(draw), folded=folded)


def _row_table(report: Report) -> list[dict[str, Any]]:
    rows, variants, task = report["rows"], report["variants"], summary.task_of(report)
    reference = summary.dense_score(rows, variants, task)
    chosen = (report.get("recommended") or {}).get("row")
    found = []
    for index, row in enumerate(rows):
        accuracy, difference = summary.accuracy_cell(row, reference, task)
        host, what = summary.host(row), summary.split_remedy(row.get("reason"))
        found.append(
            {
                **{k: row[k] for k in ("variant", "backend", "precision", "batch", "status")},
                "sweep": row.get("sweep") or "",
                "chosen": index == chosen,
                "accuracy": accuracy if accuracy != units.UNKNOWN else "",
                "difference": difference,
                "p50": units.significant(host["p50"]) if host else "",
                "p50_ci": units.interval(host.get("p50_ci95")),
                "p99": units.significant(host.get("p99")) if host else "",
                "speedup": units.factor(row["speedup"]) if row.get("speedup") is not None else "",
                "speedup_ci": "" if row.get("speedup_ci95") == [1.0, 1.0] else units.interval(row.get("speedup_ci95"), decimals=2),
                "speedup_best_float": units.factor(row["speedup_best_float"]) if row.get("speedup_best_float") is not None else "",
                "quantized": summary.quantized_cell(row),
                "size": units.size(summary.size_bytes(row)) if summary.size_bytes(row) else "",
                "n": host.get("n", ""),
                "reason": what[0] if row.get("reason") else "",
                "remedy": what[1] if row.get("reason") else "",
            }
        )
    return found


TOLD_OF_A_ROW = (
    *("artifact", "provider", "options", "threads", "verified", "parity", "throughput_per_s", "throughput_ci95", "peak_memory_bytes", "device_memory_bytes"),
    *("speedup", "speedup_ci95", "speedup_best_float", "speedup_best_float_ci95", "contract"),
)


def _row_facts(row: JsonRow) -> list[tuple[str, str]]:
    """Everything that is known of a measured row: which bytes, by which clocks, how, and the figures of each clock."""
    clocks = {clock: {k: v for k, v in found.items() if k != "quantiles"} for clock, found in (row.get("latency_ms") or {}).items() if found}
    return summary.flatten({"latency_ms": clocks, **{key: row[key] for key in TOLD_OF_A_ROW if row.get(key) is not None}})


def _facts(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """The folded tables at the bottom."""
    tables = [("Environment", summary.flatten(report.get("environment") or {}))]
    tables += [(f"Contract and figures of {summary.row_key(row)}", _row_facts(row)) for row in report["rows"] if row.get("contract")]
    tables.append(("Recipe", summary.flatten(report.get("recipe") or {})))
    steps = [
        (
            s.get("id", ""),
            f"{'cached' if s.get('cached') else units.seconds(s.get('seconds'))}, {s.get('status', '')}" + (f": {s['reason']}" if s.get("reason") else ""),
        )
        for s in report.get("steps") or []
    ]
    return [*tables, ("Steps", steps)] if steps else tables


def template(name: str) -> Template:
    """A page of `templates/`; escapes everything that it is given."""
    environment = Environment(
        loader=PackageLoader("deployopt.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template(name)


def render(report: Report) -> str:
    """The page. All text is escaped by Jinja2 and markupsafe."""
    palette, task = _Palette(report), summary.task_of(report)
    recommended = report.get("recommended")
    best = report["rows"][recommended["row"]] if recommended else None
    sections = [
        _tradeoff(report, palette),
        _stages(report),
        _distributions(report, palette),
        _sweeps(report),
        _profiles(report),
        _fusion(report),
        _sizes(report, palette),
        _curves(report),
        *_pruning(report),
        *_layer_sensitivity(report),
        _confusion(report),
    ]
    dataset = report.get("dataset") or {}
    return template("report.html.j2").render(
        name=(report.get("recipe") or {}).get("name") or report.get("run") or "report",
        run=report.get("run") or "",
        finished=report.get("finished") or "",
        version=report.get("deployopt") or "",
        headline=headline(report),
        violations=(report.get("budget") or {}).get("violations") or [],
        limits=limit_sentences((report.get("budget") or {}).get("limits") or {}, task),
        recommended=recommended,
        best=best,
        best_key=summary.row_key(best) if best else "",
        dataset=", ".join(f"{v} {k}" if k != "name" else str(v) for k, v in dataset.items()),
        environment=summary.environment_line(report.get("environment") or {}),
        contract=summary.contract_lines(report["rows"], report.get("environment") or {}),
        sections=[s for s in sections if s],
        absences=summary.absences(report["rows"]),
        notes=summary.notes(report["rows"]),
        metric=units.metric_name(task["primary"]),
        rows=_row_table(report),
        facts=_facts(report),
    )
