"""The command line: parse, call, print, exit code. No logic; everything heavy is imported by the command that needs it."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from deployopt import __version__
from deployopt.errors import DeployoptError, LackingEnvironment, StageFailed, UsageError
from deployopt.runtime.process import leave

if TYPE_CHECKING:
    from rich.console import Console

    from deployopt.bench.rerun import Plan as RerunPlan
    from deployopt.pipeline import Plan
    from deployopt.report import Report
    from deployopt.report.live import LiveProgress

app = typer.Typer(
    name="deployopt",
    help="Fine-tune, prune, quantise, export and build a network from one recipe, and measure what each stage bought.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cache_app = typer.Typer(help="The cache of finished steps.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

INTERRUPTED = 130  # 128 + SIGINT, as shells say it
RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (.yaml).", show_default=False)]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. stages.qat.lr=0.001. Repeatable.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default the cores this process may use.")]
NprocOption = Annotated[int, typer.Option(min=1, help="Processes that train side by side; they divide the CPU threads, or take one GPU each.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")]


def main() -> None:
    """Entry point: every error of ours becomes a message and its exit code."""
    sys.stdout = _Stdout(sys.stdout.buffer, sys.stdout.encoding, sys.stdout.errors, line_buffering=bool(sys.stdout.line_buffering))
    try:
        result = app(standalone_mode=False)
        sys.stdout.flush()
        if result == INTERRUPTED:  # what typer makes of Ctrl-C; older ones raise Abort
            _end_interrupted()
        sys.exit(result if isinstance(result, int) else 0)
    except DeployoptError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _end_interrupted()
    except SystemExit as ending:
        if isinstance(ending.__context__, BrokenPipeError):  # stderr's reader left; typer ends with 1, which would be a missed budget
            sys.exit(INTERRUPTED)
        raise
    except OSError as error:
        if error.errno not in _MACHINES_FAULTS:
            _report_bug()
        print(f"error: {error.filename or 'a file'}: {error.strerror}\n  → {_MACHINES_FAULTS[error.errno]}", file=sys.stderr)
        sys.exit(LackingEnvironment.exit_code)
    except Exception as error:
        if type(error).__name__ == "Abort":
            _end_interrupted()
        code = _click_exit_code(error)
        if code is None:
            _report_bug()
        sys.exit(code)


def console() -> NoReturn:
    """The installed command."""
    try:
        main()
    except SystemExit as ending:
        leave(ending.code if isinstance(ending.code, int) else 0)
    leave(0)


class _Stdout(io.TextIOWrapper):
    """Standard output whose reader may leave early (`| head -1`): the rest goes nowhere, and the command ends as it would have."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._discard()

    def _discard(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


_FREE_SPACE = "free space; `deployopt cache prune --max-size 5GB` removes finished steps"
_MACHINES_FAULTS = {  # what the machine refuses, and what mends it; a path that is not there is told by who asks for it, or is our bug
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EACCES: "give this user the right to it, or name another place",
    errno.EPERM: "give this user the right to it, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENAMETOOLONG: "give a shorter path",
}


def _end_interrupted() -> NoReturn:
    print("interrupted", file=sys.stderr)
    sys.exit(INTERRUPTED)


def _report_bug() -> NoReturn:
    traceback.print_exc()
    print("error: this is a bug of deployopt; please report it with the lines above", file=sys.stderr)
    sys.exit(4)


def _click_exit_code(error: Exception) -> int | None:
    """Exit code of an error of the option parser, after showing it; None for any other exception."""
    show = getattr(error, "show", None)
    code = getattr(error, "exit_code", None)
    if not isinstance(code, int):
        return None
    if show is not None:
        show()
    return code


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"deployopt {__version__}")
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_dir: Annotated[Path | None, typer.Option(help="The run folder itself; one that exists is continued. [default: runs/RECIPE-TIME-HASH]")] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Take nothing from the cache.")] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    nproc: NprocOption = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; errors and the report only.")] = False,
    json_: JsonOption = False,
) -> None:
    """Run a recipe to its report."""
    from deployopt import load_recipe, pipeline, store
    from deployopt.report import terminal, verdict
    from deployopt.report.live import LiveProgress
    from deployopt.runtime.hashing import sha256_json

    with LiveProgress(_console(stderr=True), [], quiet=quiet) as live, live.track("plan", None):
        planned = pipeline.plan(load_recipe(recipe, set_ or ()), device=device, threads=threads, processes=nproc, until=until, fresh=fresh)
    if planned.data_problem is not None:
        raise planned.data_problem
    folder = run_dir or store.new_run_folder(Path("runs"), planned.recipe.name, sha256_json(planned.resolved))
    steps = [(s.id, s.title) for s in planned.steps]
    asked = {"device": None if device == "auto" else device, "threads": threads, "nproc": None if nproc == 1 else nproc}
    resume = _command("run", recipe, set_, run_dir=folder, until=until, **asked)
    with _resume_hint(folder, resume, fresh):
        with LiveProgress(_console(stderr=True), steps, quiet, planned.expected) as live:
            document = pipeline.execute(planned, folder, live, fresh=fresh)
        if json_:
            _print_json(document)
        else:
            terminal.render(document, _console(), run_dir=folder)
        if (shortfall := verdict.shortfall(document)) is not None:
            raise shortfall
    if not document.met:
        raise typer.Exit(1)


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    nproc: NprocOption = 1,
    json_: JsonOption = False,
) -> None:
    """What would run, what is cached, and why."""
    from deployopt import load_recipe, pipeline
    from deployopt.report import plan as plan_report
    from deployopt.report.live import LiveProgress

    with LiveProgress(_console(stderr=True), []) as live, live.track("plan", None):
        planned = pipeline.plan(load_recipe(recipe, set_ or ()), device=device, threads=threads, processes=nproc, until=until)
    facts = _plan_facts(planned)
    if json_:
        _print_json(facts)
    else:
        plan_report.render(facts, _console())


@app.command()
def validate(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipe files.", show_default=False)],
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Check recipes: every error, with line and column."""
    from deployopt import pipeline
    from deployopt.errors import RecipeError

    problems = [problem for path in recipes for problem in pipeline.validate(path, set_ or ())]
    if json_:
        _print_json([p._asdict() for p in problems])
    elif not problems:
        print("\n".join(f"{path}: ok" for path in recipes))
    if problems:
        raise RecipeError(problems)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe."""
    from deployopt import pipeline

    _print_json(pipeline.schema())


@app.command("list")
def list_(
    kind: Annotated[Literal["stages", "backends", "datasets", "models", "tasks"] | None, typer.Argument(help="All kinds if left out.")] = None,
    json_: JsonOption = False,
) -> None:
    """Names that a recipe can use."""
    from deployopt import pipeline

    found = pipeline.available()
    shown = {kind: found[kind]} if kind else found
    if json_:
        _print_json(shown)
        return
    for name, entries in shown.items():
        print(f"{name}: {', '.join(entries)}")


@app.command()
def doctor(json_: JsonOption = False) -> None:
    """Versions, devices, and each backend: available, or why not."""
    from deployopt import pipeline
    from deployopt.report import doctor as doctor_report

    facts = pipeline.diagnose()
    if json_:
        _print_json(facts)
    else:
        doctor_report.render(facts, _console())


@app.command()
def bench(
    artifacts: Annotated[
        list[str],
        typer.Argument(
            metavar="ARTIFACT...",
            help=".onnx, engine or model.safetensors that takes images [N, C, H, W], run, or RUN:variant/backend/precision/b1.",
            show_default=False,
        ),
    ],
    backend: Annotated[str | None, typer.Option(help="Runtime; by default the row's, or from the file's kind.")] = None,
    batch: Annotated[str | None, typer.Option(metavar="N[,N...]", help="Batch sizes; by default the one that a row's address ends in, else 1.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Time with test images of this data set, as eval takes it; by default with natural-looking noise.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="At least so long for each artifact and batch size.")] = 3.0,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    scenario: Annotated[
        Literal["single_stream", "offline"] | None,
        typer.Option(help="offline keeps a stream a thread busy and compares throughputs; by default the address's, else single_stream."),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Then time each layer: where the time goes, and in which precision.")] = False,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Time artifacts, interleaved, and compare them."""
    from deployopt import pipeline
    from deployopt.bench.artifacts import bench_artifacts
    from deployopt.report import terminal
    from deployopt.report.live import LiveProgress

    _finite("--seconds", seconds)
    sizes, place = None if batch is None else _integers("--batch", batch), pipeline.choose_device(device)
    with LiveProgress(_console(stderr=True), [], quiet=quiet) as live:
        rows = bench_artifacts(
            artifacts,
            backend=backend,
            batch_sizes=sizes,
            seconds=seconds,
            threads=threads,
            scenario=scenario,
            device=place,
            images=None if data is None else pipeline.timing_images(data, live),
            profile=profile,
            progress=live,
        )
    document = [row.to_json() for row in rows]
    if json_:
        _print_json(document)
    else:
        terminal.render_bench(document, _console())
    ends = {"failed": StageFailed.exit_code, "unavailable": LackingEnvironment.exit_code}
    return max((ends.get(row.status, 0) for row in rows), default=0)


@app.command("eval")
def eval_(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help=".onnx, engine, model.safetensors, or RUN:variant/backend/precision/b1.")],
    data: Annotated[str, typer.Option(metavar="SPEC", help="digits, or imagefolder:folder=./images,image_size=224.")],
    task: Annotated[str, typer.Option(help="Task that scores it.")] = "classification",
    backend: Annotated[str | None, typer.Option(help="Runtime; by default from the file's kind.")] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score an artifact on the test split of a data set."""
    from deployopt import pipeline
    from deployopt.report.live import LiveProgress

    place = pipeline.choose_device(device)
    with LiveProgress(_console(stderr=True), [], quiet=quiet) as live:
        score = pipeline.evaluate(artifact, data, task=task, backend=backend, threads=threads, device=place, progress=live)
    if json_:
        _print_json(score)
    else:
        facts = score.pop("artifact")
        figures = [f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in score.items() if name != "primary"]
        print("  ".join([*figures, f"({facts['path']} on {facts['backend']} {facts['precision']}, sha256 {facts['sha256'][:12]}…)"]))


@app.command()
def predict(
    artifact: Annotated[str, typer.Argument(metavar="RUN|ARTIFACT", help="A run folder (its recommended artifact), or an artifact.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False)],
    backend: Annotated[str | None, typer.Option(help="Runtime; by default from the file's kind.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes shown for each image.")] = 3,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Predict images with the same preprocessing that evaluation uses."""
    from deployopt import pipeline
    from deployopt.bench.inference import predict as run_predict
    from deployopt.report.live import LiveProgress
    from deployopt.runtime import host

    place, cores = pipeline.choose_device(device), threads or host.usable_cores()
    with LiveProgress(_console(stderr=True), [], quiet=quiet) as live:
        found = run_predict(artifact, images, backend=backend, top=top, threads=cores, device=place, progress=live)
    if json_:
        _print_json(found)
        return
    for item in found:
        values = item.get("classes")
        shown = ", ".join(f"{c['name']} {c['probability']:.3f}" for c in values) if values else str(item["outputs"])
        print(f"{item['image']}: {shown}")


@app.command()
def report(
    run_: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or its report.json.")],
    format_: Annotated[Literal["terminal", "markdown", "html", "json", "junit"], typer.Option("--format", help="How to print it.")] = "terminal",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write to this file instead of stdout.")] = None,
) -> None:
    """Print a run's report again, in any format."""
    from deployopt import report as reports
    from deployopt.report import terminal
    from deployopt.runtime.files import atomic_write

    document = reports.load(run_)
    if format_ == "terminal" and output is None:
        terminal.render(document, _console(), run_dir=run_ if run_.is_dir() else run_.parent)
        return
    text = reports.render(document, format_)
    if output is None:
        print(text, end="")
    else:
        with _writing(output, "--output"):
            atomic_write(output, text)


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="A run folder or report.json.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="A run folder or report.json.")],
    max_latency_regression: Annotated[str | None, typer.Option(metavar="PERCENT", help="Gate, as 5%: the whole interval may not lie beyond.")] = None,
    max_throughput_regression: Annotated[str | None, typer.Option(metavar="PERCENT", help="Gate, as 5%: the whole interval may not lie beyond.")] = None,
    max_memory_regression: Annotated[str | None, typer.Option(metavar="PERCENT", help="Gate on peak memory, as 10%.")] = None,
    max_size_regression: Annotated[str | None, typer.Option(metavar="PERCENT", help="Gate on the artifact's bytes, as 1%.")] = None,
    max_accuracy_drop: Annotated[str | None, typer.Option(metavar="POINTS", help="Gate, as 0.5pp.")] = None,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="A row that the base measured and NEW did not misses no gate.")] = False,
    row: Annotated[list[str] | None, typer.Option(metavar="ROW", help="Only this row, by its address (variant/backend/precision/bN). Repeatable.")] = None,
    rerun: Annotated[bool, typer.Option("--rerun", help="Measure both runs' artifacts again, interleaved on this machine.")] = False,
    lifetimes: Annotated[int | None, typer.Option(min=3, help="With --rerun: process lifetimes of each row, at least (5); at most twice as many.")] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="PERCENT", help="With --rerun: add lifetimes until the interval reaches no further to either side (1%).")
    ] = None,
    budget: Annotated[float | None, typer.Option(min=0, metavar="SECONDS", help="With --rerun: after it a row gets only its least lifetimes (60).")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="With --rerun: timed for each artifact and lifetime (1).")] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="With --rerun: time with test images of this data set, as eval takes it; else with natural-looking noise."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="With --rerun: CPU threads; by default the base row's.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown here.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit here.")] = None,
    history: Annotated[Path | None, typer.Option(metavar="FILE", help="Append NEW's figures to this JSON-lines file.")] = None,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare two runs, row by row; exit code 1 on a regression beyond a gate."""
    from deployopt import report as reports
    from deployopt.bench.comparison import Gates
    from deployopt.bench.comparison import compare as compare_reports
    from deployopt.report import comparison as rendered
    from deployopt.report import history as trend
    from deployopt.report.live import LiveProgress
    from deployopt.runtime.files import atomic_write

    gates = Gates(
        _limit("--max-latency-regression", max_latency_regression, "%", 0.01),
        _limit("--max-throughput-regression", max_throughput_regression, "%", 0.01),
        _limit("--max-memory-regression", max_memory_regression, "%", 0.01),
        _limit("--max-size-regression", max_size_regression, "%", 0.01),
        _limit("--max-accuracy-drop", max_accuracy_drop, "pp", 1.0),
        allow_missing,
    )
    _finite("--seconds", seconds)
    _finite("--budget", budget)
    narrow = None if precision is None else _quantity("--precision", precision, "%", 0.01)
    how = {"lifetimes": lifetimes, "precision": narrow, "budget": budget, "seconds": seconds, "threads": threads}
    chosen = {name: value for name, value in how.items() if value is not None}
    if not rerun and (idle := [f"--{name}" for name in (*chosen, *(["data"] if data is not None else []))]):
        raise UsageError(f"{', '.join(idle)} would do nothing: stored reports are compared as they are", "add --rerun to measure again")
    before, after = reports.load(base), reports.load(new)
    measured, plan = None, None
    if rerun:
        with LiveProgress(_console(stderr=True), [], quiet=quiet) as live:
            measured, plan = _measured_again(before, after, chosen, row or (), data, live)
    folders = [path if path.is_dir() else path.parent for path in (base, new)]
    shown = None if data is None else f"test images of {data}"
    result = compare_reports(before, after, folders[0], folders[1], gates, only=row or (), reran=measured, images=shown, plan=plan).to_json()
    if json_:
        _print_json(result)
    else:
        rendered.render_terminal(result, _console())
    for option, path, render in (("--markdown", markdown, rendered.render_markdown), ("--junit", junit, rendered.render_junit)):
        if path is not None:
            with _writing(path, option):
                atomic_write(path, render(result))
    if history is not None:
        with _writing(history, "--history"):
            trend.append(history, trend.entry(after, result))
    if not result["gate"]["met"]:
        raise typer.Exit(1)


def _measured_again(
    before: Report, after: Report, chosen: dict[str, Any], rows: Sequence[str], data: str | None, live: LiveProgress
) -> tuple[dict[str, Any], RerunPlan]:
    """What `compare --rerun` judges by, and how it was measured. `chosen`: of `rerun.Plan`, what is not to be as it is by default."""
    from deployopt import pipeline
    from deployopt.bench.rerun import Plan, rerun

    plan = Plan(**chosen)
    return dict(rerun(before, after, plan, live, rows, None if data is None else pipeline.timing_images(data, live))), plan


@app.command()
def history(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `deployopt compare --history FILE` appended to.")],
    format_: Annotated[Literal["markdown", "html"], typer.Option("--format", help="A table, or a page with curves.")] = "markdown",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file.")] = None,
) -> None:
    """Show how latency and accuracy went from run to run."""
    from deployopt.report import history as trend
    from deployopt.runtime.files import atomic_write

    entries = trend.read(file)
    text = trend.render_html(entries) if format_ == "html" else trend.render_markdown(entries)
    if output is None:
        print(text, end="")
    else:
        with _writing(output, "--output"):
            atomic_write(output, text)


@cache_app.command("dir")
def cache_dir() -> None:
    """Print where the cache lies."""
    from deployopt import store

    print(store.cache_home())


@cache_app.command("ls")
def cache_ls(json_: JsonOption = False) -> None:
    """List finished steps."""
    from deployopt import store
    from deployopt.report import cache as cache_report

    rows = store.Cache().listing()
    if json_:
        _print_json(rows)
    else:
        cache_report.render(rows, _console())


@cache_app.command("prune")
def cache_prune(
    max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Keep at most so much, as 20GB, 500MB or 0; by default what every run keeps, $DEPLOYOPT_CACHE_MAX_SIZE or 20GB."),
    ] = None,
) -> None:
    """Remove the longest unused steps until the rest fits."""
    from deployopt import store

    removed, left = store.Cache().prune(store.size_cap() if max_size is None else store.parse_size("--max-size", max_size))
    print(f"removed {removed} steps, {left / 1e6:.1f} MB left")


@contextmanager
def _writing(path: Path, option: str) -> Iterator[None]:
    """Name the file and the option that asked for it where it cannot be written; a full disk has a remedy of its own."""
    try:
        yield
    except OSError as error:
        if _MACHINES_FAULTS.get(error.errno or 0) == _FREE_SPACE:
            raise
        remedy = f"name a file in a folder that exists and can be written: {option} FILE"
        raise LackingEnvironment(f"{path} cannot be written: {error.strerror}", remedy) from error


@contextmanager
def _resume_hint(folder: Path, command: str, fresh: bool) -> Iterator[None]:
    """After a failure, print the command that goes on from the last finished step, if the run had begun.

    Args:
        fresh: the run took nothing from the cache; the command leaves that out, and says so.
    """
    try:
        yield
    except UsageError:
        raise
    except (Exception, KeyboardInterrupt):  # whatever ended the run, it is re-raised and can be gone on from
        if (folder / "recipe.yaml").exists():
            print(f"to go on from the last finished step: {command}", file=sys.stderr)
            if fresh:
                print("  (without --fresh, which would begin again; a step that it had not reached may then come from the cache)", file=sys.stderr)
        raise


def _command(name: str, recipe: Path, overrides: list[str] | None, **options: object) -> str:
    """A command line that can be pasted; options that are None are left out."""
    words = ["deployopt", name, str(recipe)]
    for override in overrides or ():
        words += ["--set", override]
    for option, value in options.items():
        if value is not None:
            words += [f"--{option.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _plan_facts(planned: Plan) -> dict[str, Any]:
    return {
        "recipe": planned.recipe.name,
        "device": planned.device,
        "threads": planned.threads,
        "processes": planned.processes,
        "data_problem": str(planned.data_problem) if planned.data_problem else None,
        "seconds": planned.seconds,
        "steps": [
            {"id": s.id, "stage": s.stage_name, "title": s.title, "cached": s.cached, "runs": s.runnable and not s.cached, "why": s.why, "seconds": s.seconds}
            for s in planned.steps
        ],
    }


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    from deployopt.report import TERMINAL_WIDTH

    piped = not (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, width=TERMINAL_WIDTH if piped and "COLUMNS" not in os.environ else None)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False))


def _integers(option: str, text: str) -> tuple[int, ...]:
    """Each number once, in the order given."""
    parts = [p.strip() for p in text.split(",")]
    if not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise UsageError(f"{option}: wanted positive whole numbers such as 1,8; found '{text}'")
    return tuple(dict.fromkeys(int(p) for p in parts))


def _finite(option: str, value: float | None) -> None:
    """`inf` and `nan` are numbers to the option parser."""
    if value is not None and not math.isfinite(value):
        raise UsageError(f"{option}: wanted a number of seconds, found {value}")


def _limit(option: str, text: str | None, unit: str, scale: float) -> float | None:
    return None if text is None else _quantity(option, text, unit, scale)


def _quantity(option: str, text: str, unit: str, scale: float) -> float:
    """A number with its unit, times `scale`. Without the unit 0.05 may be a share or 0.05 %, which are a hundredfold apart, so it is refused."""
    number = text.strip().removesuffix(unit)
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"{option}: wanted a number such as 5{unit}; found '{text}'")
    if number == text.strip():
        meant = dict.fromkeys(f"{v:g}{unit}" for v in ((value / scale, value) if value < 1 else (value,)))
        raise UsageError(f"{option}: wanted a number with its unit, such as 5{unit}; found '{text}'", f"write {' or '.join(meant)}")
    return value * scale


if __name__ == "__main__":
    main()
