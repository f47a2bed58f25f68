"""Measure: accuracy and latency of every built artifact and of every torch variant, interleaved, as the report's rows.

One step reads everything. It is never cached: latency is measured anew in every run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from deployopt.artifact import FLOAT_PRECISIONS, Artifact, Row
from deployopt.runtime.session import SessionOptions
from deployopt.stages import Expansion, Planning, Point, StageConfig, StageContext, StepOutput, StepResult

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

version = 1
not_after: frozenset[str] = frozenset()
after: frozenset[str] = frozenset({"build"})
cacheable = False
timed = True
trains = False
from_scratch = False
distributions: tuple[str, ...] = ("numpy",)

TORCH = "torch"


class Config(StageConfig):
    batch_sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1, strict=False)] = (1,)
    """Batch sizes; each is one interleaved comparison. Engines run up to the largest of `build.batch_sizes`."""
    min_seconds: PositiveFloat = 3.0
    """Timed seconds for each row."""
    blocks: int = Field(20, ge=20)
    """Blocks for each row; 20 are the fewest that give an honest interval of a ratio."""
    max_spread: PositiveFloat = 0.25
    """MAD/median of a row's samples above which it is marked invalid."""
    max_contention: PositiveFloat = 0.25
    """Share of a row's threads for which other processes left no core, above which it is marked invalid."""
    max_steal_percent: PositiveFloat = 10.0
    """CPU time that the hypervisor gave to other guests, in percent of the cores, above which a row is marked invalid."""
    accuracy: bool = True
    """Score every artifact on the test split."""
    profile: bool = True
    """Time each layer of every artifact, after the timed rounds, on runtimes that can: about a second a row."""

    @field_validator("batch_sizes")
    @classmethod
    def _each_once(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if repeated := [str(size) for size, times in Counter(sizes).items() if times > 1]:
            raise ValueError(f"{', '.join(repeated)} is given more than once")
        return sizes


def expand(config: Config, planning: Planning) -> list[Expansion]:
    """One step that reads every variant and everything built."""
    built = tuple(p for p in planning.points if p.backend is not None)
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

    def at(self, batch: int) -> Row:
        """Its row at one batch size, before it is measured."""
        row = replace(self.row, batch=batch)
        if self.measurable and not self.takes(batch):
            reason = f"it was built for batches up to {self.max_batch}\n  → add {batch} to build.batch_sizes"
            row.status, row.reason = "failed", reason
        return row


def run(context: StageContext, config: Config, expansion: Expansion, inputs: Sequence[StepOutput]) -> StepResult:
    """Open all sessions, time each batch size, profile what was timed, score each artifact once.

    Record: {"rows": [Row …] candidate by candidate, then batch by batch, "details": {variant: the task's details of its torch outputs}}.
    """
    from deployopt.bench import profiles
    from deployopt.bench.harness import Group, Settings, Subject

    candidates = _candidates(context, expansion, inputs)
    subjects = [Subject(c.key, c.opener, c.artifact.verified().path, c.options) for c in candidates if c.measurable and c.artifact is not None]
    settings = Settings(
        min_seconds=config.min_seconds,
        blocks=config.blocks,
        max_spread=config.max_spread,
        max_contention=config.max_contention,
        max_steal_percent=config.max_steal_percent,
        seed=context.seed,
    )
    images = _timing_images(context, settings.buffers * max(config.batch_sizes))
    with Group(subjects, settings, context.progress) as group:
        given = {b: {c.key: images for c in candidates if c.measurable and c.takes(b)} for b in sorted(config.batch_sizes)}
        results = {b: group.measure(timed, b, "test split") for b, timed in given.items()}
        taken = {b: profiles.take(group, timed, b, results[b], context.progress) for b, timed in given.items()} if config.profile else {}
        accuracies, details = _accuracies(context, config, expansion, candidates, group) if config.accuracy else ({}, {})
    rows = _rows(context, config, candidates, results, accuracies)
    for row in rows:
        _add_profile(row, taken.get(row.batch, {}), context.run_folder)
    return StepResult(record={"rows": [row.to_json() for row in rows], "details": details})


def _candidates(context: StageContext, expansion: Expansion, inputs: Sequence[StepOutput]) -> list[_Candidate]:
    """In plan order. A step that left no output, or whose record says that there is nothing to run, gives a row with the reason."""
    finished = {output.step: output for output in inputs}
    return [_torch(context, p, finished[p.step]) if p.backend is None else _built(context, p, finished.get(p.step)) for p in expansion.inputs]


def _torch(context: StageContext, point: Point, output: StepOutput) -> _Candidate:
    """Eager FP32; an int8 variant runs its fake-quantised graph."""
    options = {"fake_quantized": True} if point.family == "int8" else {}
    row = Row(point.variant, TORCH, "fp32", 0, "ok", options=options, threads=context.threads)
    session = SessionOptions(context.threads, context.device, "fp32", options)
    return _candidate(context, row, output.artifacts[point.artifact], TORCH, session)


def _built(context: StageContext, point: Point, output: StepOutput | None) -> _Candidate:
    assert point.backend is not None
    assert point.precision is not None
    record: Mapping[str, Any] = output.record if output is not None else {"status": "failed", "reason": "its build step did not finish"}
    options = dict(record.get("options") or {})
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
        notes=list(record.get("notes") or []),
    )
    session = SessionOptions(context.threads, context.device, point.precision, options)
    artifact = output.artifacts.get(point.artifact) if output is not None else None
    return replace(_candidate(context, row, artifact, point.backend, session), max_batch=record.get("max_batch"))


def _candidate(context: StageContext, row: Row, artifact: Artifact | None, backend: str, options: SessionOptions) -> _Candidate:
    from deployopt.bench.artifacts import opener

    if artifact is not None:
        row = replace(row, artifact={"path": _shown(artifact.path, context.run_folder), "sha256": artifact.sha256, "bytes": artifact.size_bytes})
    return _Candidate(row, artifact, opener(backend), options)


def _shown(path: Path, run_folder: Path) -> str:
    """Relative to the run folder, so that no path of this machine is reported."""
    return path.relative_to(run_folder).as_posix() if path.is_relative_to(run_folder) else path.name


def _timing_images(context: StageContext, wanted: int) -> NDArray[np.uint8]:
    import numpy as np

    test = context.dataset().test
    chosen = np.random.default_rng(context.seed).permutation(len(test))[:wanted]
    return test.images(chosen)


def _accuracies(
    context: StageContext, config: Config, expansion: Expansion, candidates: Sequence[_Candidate], group: Any
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Accuracy of each live candidate by key, and the task's details by variant.

    Torch variants stand first among the candidates, so that their outputs are there to compare the artifacts with. What cannot be scored is
    logged and has {"error": reason} in place of figures.
    """
    from deployopt.bench.accuracy import score
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
                    accuracies[candidate.key] = {"error": exc.message.splitlines()[0]}
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
    results: Mapping[int, Mapping[str, Any]],
    accuracies: Mapping[str, dict[str, Any]],
) -> list[Row]:
    """Every candidate at every batch size, measured or with its reason, with its speed-ups and its file of samples."""
    from deployopt.bench.harness import Measured, with_figures, write_samples

    samples = context.run_folder / "samples"
    samples.mkdir(exist_ok=True)
    rows = []
    for candidate in candidates:
        for batch in config.batch_sizes:
            row, result = candidate.at(batch), results[batch].get(candidate.key)
            if result is not None:
                row = with_figures(row, result)
            if isinstance(result, Measured):
                row.samples = write_samples(result, row, samples).relative_to(context.run_folder).as_posix()
            accuracy = accuracies.get(candidate.key)
            if accuracy is not None and "error" in accuracy:
                row.status, row.reason = "failed", accuracy["error"]
            else:
                row.accuracy = accuracy
            rows.append(row)
    return [_with_speedups(row, rows, candidates[0].row.variant, results[row.batch]) for row in rows]


def _add_profile(row: Row, taken: Mapping[str, Any], run_folder: Path) -> None:
    from deployopt.bench import profiles

    found = taken.get(f"{row.variant}/{row.backend}/{row.precision}")
    if found is None:
        return
    folder = run_folder / "profiles"
    folder.mkdir(exist_ok=True)
    file = profiles.write(found, row, folder).relative_to(run_folder).as_posix()
    row.profile = {"file": file, **profiles.summarize(found, profiles.SHOWN)}


def _with_speedups(row: Row, rows: Sequence[Row], dense: str, results: Mapping[str, Any]) -> Row:
    """Against the dense variant's FP32, and its fastest float precision, on the same backend at the same batch size (both must be valid)."""
    from deployopt.bench.harness import speedup

    def result(of: Row) -> Any:
        return results[f"{of.variant}/{of.backend}/{of.precision}"]

    baselines = [r for r in rows if (r.variant, r.backend, r.batch, r.status) == (dense, row.backend, row.batch, "ok") and r.precision in FLOAT_PRECISIONS]
    if row.status != "ok" or not baselines:
        return row
    fastest = min(baselines, key=lambda r: result(r).host["p50"])
    value_best, _ = speedup(result(fastest), result(row))
    fp32 = next((r for r in baselines if r.precision == "fp32"), None)
    value, interval = speedup(result(fp32), result(row)) if fp32 is not None else (None, None)
    return replace(row, speedup=value, speedup_ci95=interval, speedup_best_float=value_best)
