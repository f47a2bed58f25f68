"""Recipe → plan → run. `plan` binds every stage's config, checks the order and says what is cached and why; `execute` is the one loop."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from deployopt import __version__, plugins, report, store
from deployopt.artifact import Artifact
from deployopt.bench.environment import environment
from deployopt.data import Dataset, DataSource
from deployopt.errors import DataNotFound, DeviceUnavailable, Problem, RecipeError, UsageError
from deployopt.nn import ARCHITECTURES
from deployopt.recipe import DataSection, Document, Recipe, StageEntry, bind, json_schema, outline, parse, read_document
from deployopt.report import verdict
from deployopt.runtime import host
from deployopt.runtime.files import atomic_write, atomic_write_json
from deployopt.runtime.hashing import sha256_file, sha256_json
from deployopt.runtime.progress import Progress, SilentProgress
from deployopt.stages import Expansion, Planning, Point, Stage, StageConfig, StageContext, StepOutput, StepResult
from deployopt.tasks import Task

log = logging.getLogger(__name__)
RESULT = "result.json"
_REPORTED = ("torch", "torchvision", "torch-pruning", "torchao", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13", "numpy")


@dataclass(frozen=True)
class Step:
    """One planned step.

    Attributes:
        id: its folder in the run ("03-export-prune").
        entry_name: of the stage instance.
        parts, key: what the result depends on, and its sha256; None for a step that is never cached.
        cached: a verified result lies in the cache.
        why: reason of a miss, or why the step cannot run here.
        seconds: it took when it was last run (the nearest relative's for a miss); None if unknown.
    """

    id: str
    stage_name: str
    entry_name: str
    stage: Stage
    config: StageConfig
    expansion: Expansion
    inputs: tuple[str, ...]
    parts: Mapping[str, Any]
    key: str | None
    cached: bool = False
    why: str | None = None
    seconds: float | None = None

    @property
    def title(self) -> str:
        return f"{self.entry_name} {self.expansion.label}".strip()

    @property
    def runnable(self) -> bool:
        return self.expansion.why_not is None


@dataclass(frozen=True)
class Plan:
    """A recipe bound to this machine: every step, in order.

    Attributes:
        data_problem: why the data are not here (then nothing can run or be cached), else None.
    """

    recipe: Recipe
    task: Task
    data: DataSource
    data_config: Any
    data_problem: DataNotFound | None
    steps: tuple[Step, ...]
    device: str
    threads: int
    resolved: Mapping[str, Any] = field(repr=False)
    cache: store.Cache = field(repr=False)

    @property
    def seconds(self) -> float | None:
        """About how long a run will take; None if a step that must run was never run before."""
        to_run = [s.seconds for s in self.steps if not s.cached and s.runnable]
        return None if any(s is None for s in to_run) else sum(s for s in to_run if s is not None)


class Observer(Progress, Protocol):
    """Who watches a run: progress, and the beginning and end of each step."""

    def step_started(self, step_id: str, title: str) -> None: ...

    def step_finished(self, step_id: str, seconds: float, cached: bool, status: str, reason: str | None) -> None: ...


class SilentObserver(SilentProgress):
    """For library use and tests."""

    def step_started(self, step_id: str, title: str) -> None:
        pass

    def step_finished(self, step_id: str, seconds: float, cached: bool, status: str, reason: str | None) -> None:
        pass


# ---- planning


def plan(
    recipe: Recipe, *, device: str = "auto", threads: int | None = None, until: str | None = None, fresh: bool = False, cache_home: Path | None = None
) -> Plan:
    """Bind a recipe to this machine. Imports no torch; runs nothing.

    Args:
        device: "auto" (a GPU when there is one), "cpu", "cuda" or "cuda:N".
        threads: CPU threads for training and of every session; None takes the cores this process may use.
        until: name of the last stage instance to run.
        fresh: plan as if the cache were empty.

    Raises:
        RecipeError: with every problem of every stage at once.
        UsageError: unknown `until`. DeviceUnavailable.
    """
    bound = _bind(recipe)
    entries = _until(bound.entries, until)
    chosen_device, chosen_threads = _device(device), threads or host.usable_cores()
    data_problem, fingerprint = None, None
    try:
        fingerprint = bound.data.fingerprint(bound.data_config)
    except DataNotFound as error:
        data_problem = error
    common = {
        "seed": recipe.seed,
        "task": recipe.task,
        "data": {"name": recipe.data.name, "config": bound.data_config.model_dump(mode="json", by_alias=True), "fingerprint": fingerprint},
        "model": _model_parts(recipe),
        "device": chosen_device.partition(":")[0],
        "threads": chosen_threads,
    }
    cache = store.Cache(cache_home)
    steps = _expand(entries, common, recipe)
    return Plan(
        recipe=recipe,
        task=bound.task,
        data=bound.data,
        data_config=bound.data_config,
        data_problem=data_problem,
        steps=tuple(_consult(steps, cache, fresh or data_problem is not None)),
        device=chosen_device,
        threads=chosen_threads,
        resolved=bound.resolved,
        cache=cache,
    )


def validate(path: Path, overrides: Sequence[str] = ()) -> list[Problem]:
    """Every problem of a recipe: its YAML, its top level, and the options of each stage and of the data source."""
    try:
        document = read_document(path, overrides)
    except RecipeError as error:
        return list(error.problems)
    _, problems = parse(document)
    sections = outline(document)
    return problems + _Binder(document).everything(sections.data, sections.stages, document.data.get("task"), document.data.get("model"))


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe, with the options of every stage, data source and task that is installed."""
    stages = {n: plugins.find("stages", n).Config for n in plugins.names("stages") if n != "init"}
    data = {n: plugins.find("data", n).Config for n in plugins.names("data")}
    return json_schema(stages=stages, data=data, tasks=plugins.names("tasks"))


def available() -> dict[str, list[str]]:
    """Every name a recipe can use, by kind, ours and installed third parties'."""
    return {
        "stages": [n for n in plugins.names("stages") if n != "init"],
        "backends": plugins.names("backends"),
        "datasets": plugins.names("data"),
        "models": [*ARCHITECTURES, *plugins.names("models")],
        "tasks": plugins.names("tasks"),
    }


def diagnose() -> dict[str, Any]:
    """What this machine can train, build and run, and what to install for the rest."""
    return {
        "deployopt": __version__,
        "environment": environment(_REPORTED),
        "backends": {name: asdict(plugins.find("backends", name).probe()) for name in plugins.names("backends")},
        "missing": {extra: gone for extra, needs in _EXTRAS.items() if (gone := [d for d in needs if _version(d) is None])},
    }


# What each extra brings, for `diagnose`; a test compares it with pyproject.toml.
_EXTRAS = {
    "train": ("torch", "torchvision", "torch-pruning", "torchao", "onnx", "onnxscript", "safetensors", "scikit-learn", "pillow"),
    "runtimes": ("onnx", "openvino", "pillow"),
}


@dataclass(frozen=True)
class _Entry:
    stage_name: str
    name: str
    stage: Stage
    config: StageConfig


@dataclass(frozen=True)
class _Bound:
    entries: tuple[_Entry, ...]
    task: Task
    data: DataSource
    data_config: Any
    resolved: Mapping[str, Any]


class _Binder:
    """Checks a recipe's sections against the modules that they name, gathering problems instead of stopping at the first."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self.problems: list[Problem] = []

    def everything(self, data: DataSection | None, stages: Sequence[StageEntry], task: Any, model: Any) -> list[Problem]:
        """Problems of all sections that could be made out."""
        self.stages(stages)
        if data is not None:
            self.data(data)
        if isinstance(task, str):
            self.find("tasks", task, ("task",))
        if isinstance(model, Mapping) and isinstance(model.get("arch"), str):
            self.architecture(model["arch"])
        return self.problems

    def find(self, kind: plugins.Kind, name: str, at: tuple[str | int, ...]) -> Any:
        """The module of that name, or None and a problem."""
        try:
            return plugins.find(kind, name)
        except UsageError as error:
            self.problems.append(self._document.problem(at, error.message))
            return None

    def architecture(self, name: str) -> None:
        known = [*ARCHITECTURES, *plugins.names("models")]
        if name not in known:
            self.problems.append(self._document.problem(("model", "arch"), plugins.unknown("architecture", name, known)))

    def data(self, section: DataSection) -> tuple[DataSource, Any] | None:
        source = self.find("data", section.name, ("data", "name"))
        return None if source is None else (source, self._bind(source.Config, section.options, ("data",)))

    def stages(self, entries: Sequence[StageEntry]) -> list[_Entry]:
        """Stages with their configs; those with problems are left out."""
        bound, seen = [], list[str]()
        for item in entries:
            if item.stage == "init":
                self.problems.append(self._document.problem(item.at, "'init' is planned by itself: leave it out", key=True))
                continue
            stage: Stage | None = self.find("stages", item.stage, item.at)
            if stage is None:
                continue
            config = self._bind(stage.Config, item.options, item.at)
            self._check_order(item, stage, seen)
            seen.append(item.stage)
            if config is not None:
                bound.append(_Entry(item.stage, item.name, stage, config))
        return bound

    def _check_order(self, item: StageEntry, stage: Stage, seen: Sequence[str]) -> None:
        blocking = [name for name in seen if name in stage.not_after]
        if blocking:
            self.problems.append(self._document.problem(item.at, f"'{item.stage}' cannot come after '{blocking[0]}'; move it before", key=True))
        if stage.after and not stage.after & set(seen):
            wanted = "' or '".join(sorted(stage.after))
            self.problems.append(self._document.problem(item.at, f"'{item.stage}' needs '{wanted}' before it", key=True))

    def _bind(self, model: type[BaseModel], options: Mapping[str, Any], at: tuple[str | int, ...]) -> Any:
        config, problems = bind(model, options, at, self._document)
        self.problems += problems
        return config


def _bind(recipe: Recipe) -> _Bound:
    binder = _Binder(recipe.document)
    entries = binder.stages(recipe.stages)
    task = binder.find("tasks", recipe.task, ("task",))
    binder.architecture(recipe.model.arch)
    data = binder.data(recipe.data)
    if binder.problems or data is None:
        raise RecipeError(binder.problems)
    init: Stage = plugins.find("stages", "init")
    start = _Entry("init", "init", init, init.Config.model_validate({"fan_out": entries[0].stage_name != "finetune"}))
    return _Bound((start, *entries), task, *data, _resolved(recipe, entries, data[1]))


def _resolved(recipe: Recipe, entries: Sequence[_Entry], data_config: BaseModel) -> dict[str, Any]:
    return {
        **recipe.model_dump(mode="json", include={"name", "seed", "task", "model", "budget"}),
        "data": {"name": recipe.data.name, **data_config.model_dump(mode="json", by_alias=True)},
        "stages": [{e.stage_name: e.config.model_dump(mode="json", by_alias=True), "as": e.name} for e in entries],
    }


def _until(entries: tuple[_Entry, ...], until: str | None) -> tuple[_Entry, ...]:
    if until is None:
        return entries
    names = [e.name for e in entries]
    if until not in names:
        raise UsageError(plugins.unknown("stage", until, names))
    return entries[: names.index(until) + 1]


def _device(asked: str) -> str:
    gpus = host.gpus()
    if asked == "auto":
        return "cuda:0" if gpus else "cpu"
    if asked == "cpu":
        return "cpu"
    kind, _, index = asked.partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        raise UsageError(f"unknown device '{asked}' (available: auto, cpu, cuda, cuda:N)")
    if int(index or 0) >= len(gpus):
        raise DeviceUnavailable(f"wanted {asked}, found {len(gpus)} NVIDIA GPUs with a working driver", "--device cpu, or `deployopt doctor`")
    return f"cuda:{index or 0}"


def _model_parts(recipe: Recipe) -> dict[str, Any]:
    """The model section as key parts: a local weights file counts by content, not by name."""
    parts = recipe.model.model_dump(mode="json")
    path = recipe.weights_path
    if path is not None:
        parts["weights"] = sha256_file(path) if path.is_file() else "missing"
    return parts


@cache
def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


@cache
def _machine() -> dict[str, Any]:
    """What timing depends on."""
    cpu = host.cpu()
    return {"cpu": cpu["model"], "isa": list(cpu["isa"]), "gpus": [{k: g.get(k) for k in ("name", "driver")} for g in host.gpus()]}


def _expand(entries: Sequence[_Entry], common: Mapping[str, Any], recipe: Recipe) -> list[Step]:
    points: list[Point] = []
    keys: dict[str, str | None] = {}
    steps: list[Step] = []
    for number, entry in enumerate(entries):
        following = entries[number + 1].stage_name if number + 1 < len(entries) else None
        for expansion in entry.stage.expand(entry.config, Planning(points, entry.name, following)):
            stem = "init" if entry.stage_name == "init" else f"{number - 1:02d}-{entry.name}"
            step_id = f"{stem}-{expansion.label}" if expansion.label else stem
            inputs = tuple(dict.fromkeys(p.step for p in expansion.inputs))
            parts = {
                "stage": entry.stage_name,
                "label": expansion.label,
                "deployopt": __version__,
                "version": entry.stage.version,
                "config": entry.config.model_dump(mode="json", by_alias=True),
                "parameters": dict(expansion.parameters),
                "inputs": [keys[i] for i in inputs],
                "libraries": {d: _version(d) for d in entry.stage.distributions},
                **common,
                **({"machine": _machine()} if entry.stage.timed else {}),
            }
            keys[step_id] = sha256_json(parts)
            steps.append(
                Step(
                    step_id,
                    entry.stage_name,
                    entry.name,
                    entry.stage,
                    entry.config,
                    expansion,
                    inputs,
                    parts,
                    keys[step_id] if entry.stage.cacheable else None,
                    why=expansion.why_not,
                )
            )
            points += [replace(p, step=step_id) for p in expansion.makes]
    return steps


def _consult(steps: Iterable[Step], cache: store.Cache, fresh: bool) -> Iterable[Step]:
    """Ask the cache about each step, following the digests of its inputs."""
    digests: dict[str, str | None] = {}
    for step in steps:
        digests[step.id] = None
        if not step.runnable:
            yield step
        elif step.key is None:
            yield replace(step, why="measured anew in every run")
        elif fresh:
            yield replace(step, why="not looked up")
        else:
            known = [digests[i] for i in step.inputs]
            inputs = tuple(d for d in known if d is not None) if None not in known else None
            found = cache.find(step.key, inputs)
            if isinstance(found, store.Entry) and inputs is None:
                found = store.Miss("an input must be made anew", found.seconds)
            elif isinstance(found, store.Miss) and found.why == "not run before":
                found = cache.explain(step.parts, step.expansion.label)
            if isinstance(found, store.Entry):
                digests[step.id] = found.digest
                yield replace(step, cached=True, seconds=found.seconds)
            else:
                yield replace(step, why=found.why, seconds=found.seconds)


# ---- running


def execute(planned: Plan, run_dir: Path | None = None, observer: Observer | None = None, *, fresh: bool = False) -> dict[str, Any]:
    """Run a plan and return its report; everything is written into the run folder.

    Args:
        run_dir: the run folder itself; one that exists is continued. None makes `runs/<recipe>-<utc>-<hash8>`.
        fresh: take nothing from the cache.

    Raises:
        DataNotFound, MissingDependency, StageFailed, RunLocked.
    """
    if planned.data_problem is not None:
        raise planned.data_problem
    watcher = observer or SilentObserver()
    sha = sha256_json(planned.resolved)
    folder = run_dir or store.new_run_folder(Path("runs"), planned.recipe.name, sha)
    with store.locked(folder), _log_file(folder / "log.txt"):
        started = _now()
        atomic_write(folder / "recipe.yaml", planned.recipe.document.to_yaml())
        where = environment(sorted({d for s in planned.steps for d in s.stage.distributions} | set(_REPORTED)))
        atomic_write_json(folder / "environment.json", where)
        runner = _Runner(planned, folder, watcher, fresh)
        outputs = [runner.run(step) for step in planned.steps]
        document = _assemble(planned, outputs, runner.dataset_facts(), where, started, folder.name, sha)
        report.write_all(document, folder)
        return document


class _Runner:
    """Runs the steps of one plan in one run folder, remembering what they left."""

    def __init__(self, planned: Plan, folder: Path, observer: Observer, fresh: bool) -> None:
        self._plan = planned
        self._folder = folder
        self._observer = observer
        self._fresh = fresh
        self._outputs: dict[str, StepOutput] = {}
        self._digests: dict[str, str] = {}
        self._dataset: Dataset | None = None

    def dataset(self) -> Dataset:
        if self._dataset is None:
            self._dataset = self._plan.data.load(self._plan.data_config)
        return self._dataset

    def dataset_facts(self) -> dict[str, Any]:
        data = self.dataset()
        return {
            "dataset": {"name": self._plan.recipe.data.name, "train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
            "classes": list(data.classes),
        }

    def run(self, step: Step) -> StepOutput:
        self._observer.step_started(step.id, step.title)
        began = time.perf_counter()
        if not step.runnable:
            output = self._not_run(step)
        elif step.key is None:
            output = self._uncached(step)
        else:
            output = self._cached(step)
        self._outputs[step.id] = output
        status = str(output.record.get("status", "ok"))
        reason = output.record.get("reason")
        log.info("%s: %s%s in %.1f s%s", step.id, status, " (cached)" if output.cached else "", time.perf_counter() - began, f": {reason}" if reason else "")
        self._observer.step_finished(step.id, time.perf_counter() - began, output.cached, status, reason)
        return output

    def _not_run(self, step: Step) -> StepOutput:
        record = {"status": "unavailable", "reason": step.expansion.why_not}
        return StepOutput(step.id, step.stage_name, step.expansion.makes, record, {}, self._folder, cached=False, seconds=0.0)

    def _uncached(self, step: Step) -> StepOutput:
        folder = self._folder / step.id
        folder.mkdir(exist_ok=True)
        began = time.perf_counter()
        result = self._invoke(step, folder, self._plan.cache.choices(f"run-{step.id}"))
        atomic_write_json(folder / RESULT, _result_json(result, folder))
        return self._output(step, folder, cached=False, seconds=time.perf_counter() - began)

    def _cached(self, step: Step) -> StepOutput:
        assert step.key is not None
        inputs = tuple(self._digests[i] for i in step.inputs if i in self._digests)
        cache = self._plan.cache
        entry = None if self._fresh else cache.find(step.key, inputs)
        hit = isinstance(entry, store.Entry)
        if not isinstance(entry, store.Entry):
            if isinstance(entry, store.Miss):
                log.info("%s: not cached: %s", step.id, entry.why)
            with cache.writing(step.key) as partial_folder:
                began = time.perf_counter()
                result = self._invoke(step, partial_folder, cache.choices(step.key))
                seconds = time.perf_counter() - began
                if result.record.get("status") == "failed":  # perhaps it works next time: tell it, do not keep it
                    return StepOutput(step.id, step.stage_name, step.expansion.makes, result.record, {}, self._folder, cached=False, seconds=seconds)
                atomic_write_json(partial_folder / RESULT, _result_json(result, partial_folder))
                entry = cache.commit(partial_folder, step.key, step.parts, inputs, seconds)
        store.touch(entry)
        folder = self._folder / step.id
        store.link(entry, folder)
        self._digests[step.id] = entry.digest
        return self._output(step, folder, cached=hit, seconds=entry.seconds)

    def _invoke(self, step: Step, folder: Path, choices: store.StoredChoices) -> StepResult:
        recipe = self._plan.recipe
        weights = recipe.weights_path
        context = StageContext(
            folder=folder,
            name=step.entry_name,
            base={**recipe.model.model_dump(mode="json"), **({"weights": str(weights)} if weights else {})},
            seed=recipe.seed,
            device=self._plan.device,
            threads=self._plan.threads,
            task=self._plan.task,
            dataset=self.dataset,
            progress=self._observer,
            choices=choices,
            run_folder=self._folder,
        )
        inputs = [self._outputs[p.step] for p in step.expansion.inputs]
        return step.stage.run(context, step.config, step.expansion, inputs)

    def _output(self, step: Step, folder: Path, *, cached: bool, seconds: float) -> StepOutput:
        result = json.loads((folder / RESULT).read_text())
        artifacts = {name: Artifact.from_json(data, folder) for name, data in result["artifacts"].items()}
        return StepOutput(step.id, step.stage_name, step.expansion.makes, result["record"], artifacts, folder, cached, seconds)


def _result_json(result: StepResult, folder: Path) -> dict[str, Any]:
    return {"record": dict(result.record), "artifacts": {name: a.to_json(folder) for name, a in result.artifacts.items()}}


# ---- the report


def _assemble(
    planned: Plan, outputs: Sequence[StepOutput], data: Mapping[str, Any], where: Mapping[str, Any], started: str, run: str, sha: str
) -> dict[str, Any]:
    task = planned.task
    variants = [_variant(o, p) for o in outputs for p in o.point if p.kind == "torch" and p.fans_out]
    rows = [row for o in outputs for row in o.record.get("rows", [])]
    facts = {"name": planned.recipe.task, "primary": task.primary, "unit": task.unit, "higher_is_better": task.higher_is_better}
    budget, recommended = verdict.judge(rows, variants, planned.resolved["budget"], facts)
    return {
        "schema": report.SCHEMA,
        "deployopt": __version__,
        "run": run,
        "recipe": dict(planned.resolved),
        "recipe_sha256": sha,
        "environment": dict(where),
        "started": started,
        "finished": _now(),
        "task": facts,
        **data,
        "steps": [
            {
                "id": o.step,
                "stage": o.stage,
                "name": s.entry_name,
                "label": s.expansion.label,
                "seconds": round(o.seconds, 2),
                "cached": o.cached,
                "status": o.record.get("status", "ok"),
                "reason": o.record.get("reason"),
            }
            for s, o in zip(planned.steps, outputs, strict=True)
        ],
        "variants": variants,
        "rows": rows,
        "budget": budget,
        "recommended": recommended,
    }


def _variant(output: StepOutput, point: Point) -> dict[str, Any]:
    record = output.record
    own = ("params", "macs", "size_bytes", "accuracy", "parent", "curves", "details")
    return {
        "name": point.variant,
        "stage": output.stage,
        "family": point.family,
        **{name: record.get(name) for name in own},
        "seconds": round(output.seconds, 2),
        "cached": output.cached,
        "record": {k: v for k, v in record.items() if k not in own},
    }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class _log_file:  # noqa: N801 - a context manager that reads as a verb phrase
    """Everything deployopt logs while it is open goes into this file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._handler = logging.FileHandler(self._path)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._logger = logging.getLogger("deployopt")
        self._level = self._logger.level
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self._handler)

    def __exit__(self, *exc: object) -> None:
        self._logger.removeHandler(self._handler)
        self._logger.setLevel(self._level)
        self._handler.close()
