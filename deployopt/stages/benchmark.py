"""Measure: accuracy, latency and throughput of every built artifact and of every torch variant, interleaved, as the report's rows.

One step reads everything. Each scenario (the run's own single stream; offline and other numbers of threads where the recipe asks for them) opens all
sessions, times each batch size and closes them. It is never cached: latency is measured anew in every run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from deployopt.artifact import FLOAT_PRECISIONS, INT8_PRECISIONS, TORCH, TORCH_COMPILE, Artifact, Row
from deployopt.errors import OptionRefused
from deployopt.runtime.session import SessionOptions
from deployopt.stages import Expansion, Planning, Point, StageConfig, StageContext, StepOutput, StepResult

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deployopt.bench.harness import Failure, Group, Measured, Settings, Subject
    from deployopt.bench.scenarios import Scenario
    from deployopt.tasks import Task

version = 3
not_after: frozenset[str] = frozenset()
after: frozenset[str] = frozenset({"build"})
cacheable = False
timed = True
trains = False
from_scratch = False
distributions: tuple[str, ...] = ("numpy",)

CAPTURES_GRAPHS = "tensorrt"
SINGLE_STREAM: Literal["single_stream"] = "single_stream"


class Config(StageConfig):
    batch_sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1, strict=False)] = (1,)
    """Batch sizes; each is one interleaved comparison. None is larger than the largest of `build.batch_sizes`."""
    scenarios: Annotated[tuple[Literal["single_stream", "offline"], ...], Field(min_length=1, strict=False)] = (SINGLE_STREAM,)
    """As in MLPerf Inference: `single_stream` asks one query after the other and its figure is latency; `offline` keeps a stream a CPU thread busy and its
    figure is throughput. Budgets and the recommended row go by `single_stream`, which is therefore always measured."""
    threads: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = ()
    """Numbers of CPU threads to measure every scenario with beside the run's own."""
    min_seconds: PositiveFloat = 3.0
    """Timed seconds for each row."""
    blocks: int = Field(20, ge=20)
    """Blocks for each row; 20 are the fewest that give an honest interval of a ratio."""
    max_spread: PositiveFloat = 0.25
    """MAD/median of a row's samples above which it is marked invalid."""
    max_drift: PositiveFloat = 0.3
    """Relative change of the median from the first to the last third of a row's blocks, above which it is marked invalid."""
    max_contention: PositiveFloat = 0.25
    """Share of a row's threads for which other processes left no core, above which it is marked invalid."""
    max_pressure: PositiveFloat = 0.5
    """Share of the time in which something that could run waited for a CPU, by Linux's pressure files, above which a row is marked invalid."""
    max_steal_percent: PositiveFloat = 10.0
    """CPU time that the hypervisor gave to other guests, in percent of the cores, above which a row is marked invalid."""
    aa_repeats: int = Field(0, ge=0)
    """Measure every valid row against itself so many times more, each time in two new processes, and store how far it differed: the noise floor of
    `deployopt compare` between two stored reports. 3 give a usable one."""
    max_clock_drop: PositiveFloat = 0.1
    """Fall of the clock of a row's GPU, or of the CPU core that it is timed on where Linux tells it, from the first to the last third of its blocks,
    relative, above which it is marked invalid."""
    cuda_graph: bool = False
    """Launch engines of the backend tensorrt as one CUDA graph each, which saves the host's time between kernels; where one cannot be captured, kernels are
    launched one by one. Each row's contract says which. Not yet tried on a GPU."""
    accuracy: bool = True
    """Score every artifact on the test split. In classification, one that answers otherwise than its own torch network on more than 0.5 % of at least 200
    images has a note that says so."""
    profile: bool = True
    """Time each layer of every artifact once: at the smallest batch size, in a session of its own after the timed rounds, on runtimes that can."""
    torch_compile: bool = False
    """Measure float variants under `torch.compile` too, in rows called torch-compile. It compiles for a minute or so a variant and batch size, before
    anything is timed, and needs a C++ compiler."""

    @field_validator("batch_sizes", "scenarios", "threads")
    @classmethod
    def _each_once(cls, given: tuple[int | str, ...]) -> tuple[int | str, ...]:
        if repeated := [str(value) for value, times in Counter(given).items() if times > 1]:
            raise ValueError(f"{', '.join(repeated)} is given more than once")
        return given

    @field_validator("scenarios")
    @classmethod
    def _with_latency(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if SINGLE_STREAM not in names:
            raise ValueError(f"wants {SINGLE_STREAM} among them: budgets and the recommended row go by it")
        return names


def expand(config: Config, planning: Planning) -> list[Expansion]:
    """One step that reads every variant and everything built.

    Raises:
        OptionRefused: a batch size for which something is not built.
    """
    built = tuple(p for p in planning.points if p.backend is not None)
    largest, limit = max(config.batch_sizes), min((p.max_batch for p in built if p.max_batch is not None), default=None)
    if limit is not None and largest > limit:
        raise OptionRefused("batch_sizes", f"wants batches of {largest}, and artifacts are built for up to {limit}", f"add {largest} to build.batch_sizes")
    return [Expansion(inputs=(*planning.variants, *built))]


@dataclass
class _Candidate:
    """Something that may become rows: what it is, how to open it, or why it cannot be measured. `max_batch`: None takes any."""

    row: Row
    artifact: Artifact | None
    opener: str
    options: SessionOptions
    max_batch: int | None = None

    @property
    def key(self) -> str:
        return f"{self.row.variant}/{self.row.backend}/{self.row.precision}"

    @property
    def measurable(self) -> bool:
        return self.row.status == "ok" and self.artifact is not None

    def takes(self, batch: int) -> bool:
        return self.max_batch is None or batch <= self.max_batch

    def at(self, scenario: Scenario, batch: int) -> Row:
        """Its row in one scenario at one batch size, before it is measured."""
        row = replace(self.row, batch=batch, threads=scenario.threads, scenario=scenario.name, sweep=scenario.sweep)
        if self.measurable and not self.takes(batch):
            reason = f"it was built for batches up to {self.max_batch}\n  → add {batch} to build.batch_sizes"
            row.status, row.reason = "failed", reason
        return row


Results = Mapping[int, Mapping[str, "Measured | Failure"]]  # by batch size, then by candidate


@dataclass
class _Own:
    """What is taken in the run's own single stream alone; of candidates by key, or by key and batch size; the details by variant."""

    accuracies: dict[str, dict[str, Any]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    profiles: dict[tuple[str, int], dict[str, Any] | Failure] = field(default_factory=dict)
    noise: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)


def run(context: StageContext, config: Config, expansion: Expansion, inputs: Sequence[StepOutput]) -> StepResult:
    """Measure every scenario; score and profile each artifact once, in the first.

    Record: {"rows": [Row …] candidate by candidate, then scenario by scenario, then batch by batch, "details": {variant: the task's details of its torch
    outputs}}.
    """
    from deployopt.bench.scenarios import scenarios

    candidates = _candidates(context, config, expansion, inputs)
    settings = _settings(config, context.seed)
    images = _timing_images(context, settings.buffers * max(config.batch_sizes))
    results: dict[Scenario, Results] = {}
    own = _Own()
    for scenario in scenarios(config.scenarios, context.threads, config.threads):
        with _group(scenario, candidates, settings, context) as group:
            results[scenario] = {b: group.measure(_shown(candidates, b, images), b, "test split") for b in sorted(config.batch_sizes)}
            if config.accuracy and not scenario.sweep:
                own.accuracies, own.details = _accuracies(context, config, expansion, candidates, group)
            if config.profile and not scenario.sweep:
                own.profiles = _profiles(context, candidates, group, results[scenario], images)
        if config.aa_repeats and not scenario.sweep:
            own.noise = _noise(context, config, _subjects(scenario, candidates), results[scenario], settings, images)
    rows = _rows(context, config, candidates, results, own)
    return StepResult(record={"rows": [row.to_json() for row in rows], "details": own.details})


def _settings(config: Config, seed: int) -> Settings:
    from deployopt.bench.disturbance import Limits
    from deployopt.bench.harness import Settings

    limits = Limits(
        max_spread=config.max_spread,
        max_drift=config.max_drift,
        max_contention=config.max_contention,
        max_pressure=config.max_pressure,
        max_steal_percent=config.max_steal_percent,
        max_clock_drop=config.max_clock_drop,
    )
    return Settings(min_seconds=config.min_seconds, blocks=config.blocks, limits=limits, seed=seed)


def _group(scenario: Scenario, candidates: Sequence[_Candidate], settings: Settings, context: StageContext) -> Group:
    """Sessions of all measurable candidates, to be opened for one scenario."""
    from deployopt.bench.harness import Group

    if scenario.sweep:
        context.progress.log(f"{scenario.name} on {scenario.threads} threads")
    return Group(_subjects(scenario, candidates), settings, context.progress)


def _subjects(scenario: Scenario, candidates: Sequence[_Candidate]) -> list[Subject]:
    from deployopt.bench.harness import Subject

    return [
        Subject(c.key, c.opener, c.artifact.verified().path, scenario.options(c.options), scenario.name)
        for c in candidates
        if c.measurable and c.artifact is not None
    ]


def _shown(candidates: Sequence[_Candidate], batch: int, images: NDArray[np.uint8]) -> dict[str, NDArray[np.uint8]]:
    """What each candidate that takes this batch size is timed with."""
    return {c.key: images for c in candidates if c.measurable and c.takes(batch)}


def _candidates(context: StageContext, config: Config, expansion: Expansion, inputs: Sequence[StepOutput]) -> list[_Candidate]:
    """In plan order, eager variants first. A step that left no output, or whose record says that there is nothing to run, gives a row with the reason."""
    finished = {output.step: output for output in inputs}
    variants, built = [p for p in expansion.inputs if p.backend is None], [p for p in expansion.inputs if p.backend is not None]
    compiled = [p for p in variants if p.family == "float"] if config.torch_compile else []
    return [
        *(_torch(context, p, finished[p.step], TORCH) for p in variants),
        *(_torch(context, p, finished[p.step], TORCH_COMPILE) for p in compiled),
        *(_built(context, config, p, finished.get(p.step)) for p in built),
    ]


def _torch(context: StageContext, point: Point, output: StepOutput, backend: str) -> _Candidate:
    """PyTorch in FP32; an int8 variant runs its fake-quantised graph."""
    options = {"fake_quantized": True} if point.family == "int8" else {}
    row = Row(point.variant, backend, "fp32", 0, "ok", options=options, threads=context.threads)
    session = SessionOptions(context.threads, context.device, "fp32", options)
    return _candidate(context, row, output.artifacts[point.artifact], backend, session)


def _built(context: StageContext, config: Config, point: Point, output: StepOutput | None) -> _Candidate:
    assert point.backend is not None
    assert point.precision is not None
    record: Mapping[str, Any] = output.record if output is not None else {"status": "failed", "reason": "its build step did not finish"}
    options = dict(record.get("options") or {})
    if config.cuda_graph and point.backend == CAPTURES_GRAPHS:
        options["cuda_graph"] = True
    row = Row(
        point.variant,
        point.backend,
        point.precision,
        0,
        record["status"],
        provider=record.get("provider"),
        options=options,
        threads=context.threads,
        reason=record.get("reason"),
        verified=record.get("verified"),
        fusion=record.get("fusion"),
        parity=record.get("parity"),
        notes=list(record.get("notes") or []),
    )
    session = SessionOptions(context.threads, context.device, point.precision, options)
    artifact = output.artifacts.get(point.artifact) if output is not None else None
    return replace(_candidate(context, row, artifact, point.backend, session), max_batch=record.get("max_batch"))


def _candidate(context: StageContext, row: Row, artifact: Artifact | None, backend: str, options: SessionOptions) -> _Candidate:
    from deployopt.bench.targets import opener

    if artifact is not None:
        row = replace(row, artifact={"path": _inside(artifact.path, context.run_folder), "sha256": artifact.sha256, "bytes": artifact.size_bytes})
    return _Candidate(row, artifact, opener(backend), options)


def _inside(path: Path, run_folder: Path) -> str:
    """Relative to the run folder, so that no path of this machine is reported."""
    return path.relative_to(run_folder).as_posix() if path.is_relative_to(run_folder) else path.name


def _timing_images(context: StageContext, wanted: int) -> NDArray[np.uint8]:
    import numpy as np

    test = context.dataset().test
    chosen = np.random.default_rng(context.seed).permutation(len(test))[:wanted]
    return test.images(chosen)


def _profiles(
    context: StageContext, candidates: Sequence[_Candidate], group: Group, results: Results, images: NDArray[np.uint8]
) -> dict[tuple[str, int], dict[str, Any] | Failure]:
    """Layer times at the smallest batch size, by (key, batch). They come last in the group: a profiler that takes the child along costs nothing else."""
    from deployopt.bench import profiles

    batch = min(results)
    taken = profiles.take(group, _shown(candidates, batch, images), batch, results[batch], context.progress)
    return {(key, batch): found for key, found in taken.items()}


def _noise(
    context: StageContext,
    config: Config,
    subjects: Sequence[Subject],
    results: Results,
    settings: Settings,
    images: NDArray[np.uint8],
) -> dict[tuple[str, int], dict[str, Any]]:
    """A/A repeats of every valid row of the run's own scenario, by (key, batch)."""
    from deployopt.bench.repeats import aa_repeats

    found: dict[tuple[str, int], dict[str, Any]] = {}
    with context.progress.track("measure against itself", len(subjects)) as bar:
        for subject in subjects:
            own = {batch: by_key[subject.key] for batch, by_key in results.items() if subject.key in by_key}
            stored = aa_repeats(subject, own, config.aa_repeats, settings, images, context.progress)
            found |= {(subject.key, batch): noise for batch, noise in stored.items()}
            bar.advance(1, subject.key)
    return found


def _accuracies(
    context: StageContext, config: Config, expansion: Expansion, candidates: Sequence[_Candidate], group: Any
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Accuracy of each live candidate by key, and the task's details by variant.

    Torch variants stand first among the candidates, so that their outputs are there to compare the artifacts with. What cannot be scored is
    logged and has {"error": reason} in place of figures.
    """
    from deployopt.bench.accuracy import score
    from deployopt.bench.environment import reason_of
    from deployopt.errors import DeployoptError

    test, task, classes = context.dataset().test, context.task, context.dataset().classes
    parents = _float_parents(expansion)
    torch_outputs: dict[str, NDArray[Any]] = {}
    accuracies: dict[str, dict[str, Any]] = {}
    details: dict[str, Any] = {}
    with context.progress.track("score on the test split", len(candidates)) as bar:
        for candidate in candidates:
            variant = candidate.row.variant
            parent = torch_outputs.get(parents[variant])
            references = {} if parent is None else {"": parent}
            if variant in torch_outputs:
                references["torch_"] = torch_outputs[variant]
            if candidate.key in group.opened:
                batch = min(size for size in (max(config.batch_sizes), candidate.max_batch) if size is not None)
                try:
                    found, outputs = score(partial(group.infer, candidate.key), test, task, references, batch)
                except DeployoptError as exc:
                    context.progress.log(f"{candidate.key}: {exc}")
                    accuracies[candidate.key] = {"error": reason_of(exc)}
                else:
                    accuracies[candidate.key] = found
                    if candidate.row.backend == TORCH:
                        torch_outputs[variant] = outputs
                        details[variant] = task.details(outputs, test.targets, classes)
            bar.advance(1, candidate.key)
    return accuracies, details


def _float_parents(expansion: Expansion) -> dict[str, str]:
    """For each variant the float one it descends from: itself, or the last float variant before it on the trunk."""
    parents: dict[str, str] = {}
    latest = ""
    for point in (p for p in expansion.inputs if p.backend is None):
        latest = point.variant if point.family == "float" or not latest else latest
        parents[point.variant] = latest
    return parents


def _rows(
    context: StageContext,
    config: Config,
    candidates: Sequence[_Candidate],
    results: Mapping[Scenario, Results],
    own: _Own,
) -> list[Row]:
    """Every candidate in every scenario at every batch size, measured or with its reason, with its speed-ups and its file of samples."""
    from deployopt.bench.profiles import with_profile

    samples = context.run_folder / "samples"
    samples.mkdir(exist_ok=True)
    rows = []
    for candidate in candidates:
        for scenario, found in results.items():
            for batch in config.batch_sizes:
                row = _measured_row(context, candidate.at(scenario, batch), found[batch].get(candidate.key), samples)
                if not scenario.sweep:
                    row = with_profile(row, own.profiles.get((candidate.key, batch)))
                    row.noise = own.noise.get((candidate.key, batch)) if row.status == "ok" else None
                rows.append(_with_accuracy(row, own.accuracies.get(candidate.key), context.task))
    by_sweep = {scenario.sweep: found for scenario, found in results.items()}
    return [_with_speedups(row, rows, candidates[0].row.variant, by_sweep[row.sweep][row.batch]) for row in rows]


def _with_accuracy(row: Row, accuracy: dict[str, Any] | None, task: Task) -> Row:
    """The row with its artifact's accuracy, and a note where it answers otherwise than its torch network; failed if it could not be scored."""
    from deployopt.bench.accuracy import disagreement

    if accuracy is None:
        return row
    if "error" in accuracy:
        return replace(row, status="failed", reason=accuracy["error"])
    note = disagreement(accuracy, task, "quantised torch network" if row.precision in INT8_PRECISIONS else "torch network")
    return replace(row, accuracy=accuracy, notes=[*row.notes, *([note] if note else [])])


def _measured_row(context: StageContext, row: Row, result: Measured | Failure | None, samples: Path) -> Row:
    """The row with its figures; as it is where nothing was to be measured."""
    from deployopt.bench.harness import Measured, with_figures, write_samples

    if result is not None:
        row = with_figures(row, result)
    if isinstance(result, Measured):
        if row.backend == TORCH_COMPILE:
            row.notes.append(f"its first inference at batch {row.batch}, which compiles, took {result.contract['first_inference_ms'] / 1e3:.1f} s")
        row.samples = write_samples(result, row, samples).relative_to(context.run_folder).as_posix()
    return row


def _with_speedups(row: Row, rows: Sequence[Row], dense: str, results: Mapping[str, Any]) -> Row:
    """Against the dense variant's FP32, and its fastest float precision, on the same backend in the same scenario and batch size (both must be valid)."""
    from deployopt.bench.harness import speedup

    def result(of: Row) -> Any:
        return results[f"{of.variant}/{of.backend}/{of.precision}"]

    wanted = (dense, row.backend, row.sweep, row.batch, "ok")
    baselines = [r for r in rows if (r.variant, r.backend, r.sweep, r.batch, r.status) == wanted and r.precision in FLOAT_PRECISIONS]
    if row.status != "ok" or not baselines:
        return row
    fastest = max(baselines, key=lambda r: speedup(result(row), result(r))[0])
    value_best, interval_best = speedup(result(fastest), result(row))
    fp32 = next((r for r in baselines if r.precision == "fp32"), None)
    value, interval = speedup(result(fp32), result(row)) if fp32 is not None else (None, None)
    return replace(row, speedup=value, speedup_ci95=interval, speedup_best_float=value_best, speedup_best_float_ci95=interval_best)
