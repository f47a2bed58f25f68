"""Recipe → plan: every step, in order, cached or not, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployopt import __version__, plugins, store
from deployopt.artifact import WEIGHTS, digest
from deployopt.bench.environment import versions
from deployopt.data import DataSource
from deployopt.errors import BackendUnavailable, DeviceUnavailable, LackingEnvironment, RecipeError, UsageError
from deployopt.nn import ARCHITECTURES, missing_weights
from deployopt.pipeline.binding import bind_recipe
from deployopt.pipeline.expansion import Asked, Entry, expand
from deployopt.recipe import Recipe
from deployopt.runtime import host
from deployopt.runtime.hashing import sha256_file, sha256_json
from deployopt.stages import Expansion, Stage, StageConfig
from deployopt.tasks import Task

if TYPE_CHECKING:
    from deployopt.runtime.cuda import Gpu


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
    def kind(self) -> str:
        """Hash of what this step does, whatever it reads: steps of one kind take about as long."""
        return sha256_json({name: part for name, part in self.parts.items() if name != "inputs"})

    @property
    def runnable(self) -> bool:
        return self.expansion.why_not is None


@dataclass(frozen=True)
class Plan:
    """A recipe bound to this machine: every step, in order.

    Attributes:
        data_problem: why the data or the weights are not here (then nothing can run or be cached), else None.
        device: of the first process. processes: that train side by side. threads: of all of them together.
    """

    recipe: Recipe
    task: Task
    data: DataSource
    data_config: Any
    data_problem: LackingEnvironment | None
    steps: tuple[Step, ...]
    device: str
    threads: int
    processes: int
    resolved: Mapping[str, Any] = field(repr=False)
    cache: store.Cache = field(repr=False)

    @property
    def expected(self) -> Mapping[str, float | None]:
        """About how many seconds each step will take, by id: 0 if it is only read back or cannot run, None if nothing like it was ever run."""
        return {s.id: 0.0 if s.cached or not s.runnable else s.seconds for s in self.steps}

    @property
    def seconds(self) -> float | None:
        """About how long a run will take; None if a step that must run was never run before."""
        times = list(self.expected.values())
        return None if None in times else sum(s for s in times if s is not None)


def plan(
    recipe: Recipe,
    *,
    device: str = "auto",
    threads: int | None = None,
    processes: int = 1,
    until: str | None = None,
    fresh: bool = False,
    cache_home: Path | None = None,
) -> Plan:
    """Bind a recipe to this machine. Imports no torch; runs nothing.

    Args:
        device: "auto" (a GPU when there is one), "cpu", "cuda" or "cuda:N".
        threads: CPU threads for training and of every session; None takes the cores this process may use.
        processes: that train side by side, dividing `threads` between them, or each with a GPU of its own from `device` on.
        until: name of the last stage instance to run.
        fresh: plan as if the cache were empty.

    Raises:
        RecipeError: with every problem of every stage at once.
        UsageError: unknown `until`; more processes than threads. DeviceUnavailable: no such GPU, or fewer than processes.
    """
    bound = bind_recipe(recipe)
    entries = _until(bound.entries, until)
    chosen_device, chosen_threads = choose_device(device, processes), threads or host.usable_cores()
    _check_processes(processes, chosen_threads)
    data_problem: LackingEnvironment | None = None
    fingerprint = None
    try:
        fingerprint = bound.data.fingerprint(bound.data_config)
    except LackingEnvironment as error:
        data_problem = error
    if recipe.weights_path is not None and not recipe.weights_path.exists():
        data_problem = data_problem or missing_weights(recipe.weights_path)
    common = {
        "seed": recipe.seed,
        "task": {"name": recipe.task, "package": plugins.origin("tasks", recipe.task)},
        "data": {"name": recipe.data.name, "config": bound.data_config.keyed(), "fingerprint": fingerprint},
        "model": _model_parts(recipe),
        "device": chosen_device.partition(":")[0],
        "threads": chosen_threads,
    }
    cache = store.Cache(cache_home)
    asked, faults = expand(entries, here=True)
    if faults:
        raise RecipeError([recipe.document.problem(fault.at, fault.message, key=fault.key) for fault in faults])
    steps = _steps(asked, common, processes, _machine(chosen_device))
    return Plan(
        recipe=recipe,
        task=bound.task,
        data=bound.data,
        data_config=bound.data_config,
        data_problem=data_problem,
        steps=tuple(_consult(steps, cache, f"not here: {data_problem.message}" if data_problem else "not looked up" if fresh else None)),
        device=chosen_device,
        threads=chosen_threads,
        processes=processes,
        resolved=bound.resolved,
        cache=cache,
    )


def _until(entries: tuple[Entry, ...], until: str | None) -> tuple[Entry, ...]:
    if until is None:
        return entries
    names = [e.name for e in entries]
    if until not in names:
        raise UsageError(plugins.unknown("stage", until, names))
    return entries[: names.index(until) + 1]


def _check_processes(processes: int, threads: int) -> None:
    if processes < 1:
        raise UsageError(f"--nproc: wanted 1 or more processes, found {processes}")
    if processes > threads:
        raise UsageError(f"--nproc {processes} needs a CPU thread for each process, found {threads}", f"--nproc {threads}, or raise --threads")


def choose_device(asked: str, processes: int = 1) -> str:
    """What a command line's --device means here: "cpu", or "cuda:N", the first process's; the others' are the GPUs after it.

    Raises:
        UsageError: no such kind of device. DeviceUnavailable: no such GPU, or fewer than processes.
    """
    gpus, reason = ([], None) if asked == "cpu" else visible_gpus()
    if asked == "auto":
        asked = "cuda" if gpus else "cpu"
    if asked == "cpu":
        return "cpu"
    kind, _, index = asked.partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        raise UsageError(f"unknown device '{asked}' (available: auto, cpu, cuda, cuda:N)")
    free = len(gpus) - int(index or 0)
    if free < 1:
        found = f"found {len(gpus)} NVIDIA GPUs with a working driver" + (f": {reason}" if reason else "")
        raise DeviceUnavailable(f"wanted {asked}, {found}", "--device cpu, or `deployopt doctor`")
    if free < processes:
        wanted = f"--nproc {processes} needs {processes} NVIDIA GPUs from cuda:{index or 0} on, one a process"
        raise DeviceUnavailable(f"{wanted}; found {free} with a working driver", f"--nproc {free}, or --device cpu")
    return f"cuda:{index or 0}"


def _model_parts(recipe: Recipe) -> dict[str, Any]:
    """The model section as key parts: local weights count by content, not by name, a third party's network by its package's version."""
    parts = recipe.model.model_dump(mode="json")
    if recipe.model.arch not in ARCHITECTURES:
        parts["package"] = plugins.origin("models", recipe.model.arch)
    path = recipe.weights_path
    if path is not None:
        parts["weights"] = digest("torch", path / WEIGHTS) if path.is_dir() else sha256_file(path) if path.is_file() else "missing"
    return parts


def _machine(device: str) -> dict[str, Any]:
    """What a choice made by timing depends on: `host.timing_facts`, and of several GPUs the one that is built for and timed on."""
    index = int(device.partition(":")[2] or 0)  # of "cpu" the first: backends that compute on a GPU take that one
    gpus, _ = visible_gpus()
    return {**host.timing_facts(), "gpu": gpus[index]._asdict() if gpus else None}


def visible_gpus() -> tuple[list[Gpu], str | None]:
    """GPUs by CUDA's index, which heeds CUDA_VISIBLE_DEVICES as NVML's does not; or none, and why."""
    from deployopt.runtime.cuda import find_gpus  # loads NumPy

    try:
        return find_gpus(), None
    except BackendUnavailable as exc:
        return [], exc.message


def _steps(asked: Sequence[Asked], common: Mapping[str, Any], processes: int, machine: Mapping[str, Any]) -> list[Step]:
    keys: dict[str, str | None] = {}
    steps: list[Step] = []
    for step in asked:
        entry, expansion = step.entry, step.expansion
        inputs = tuple(dict.fromkeys(p.step for p in expansion.inputs))
        parts = {
            "stage": entry.stage_name,
            "label": expansion.label,
            "name": entry.name,  # seeds the order of training images and names the variant
            "variants": [p.variant for p in expansion.inputs],
            "deployopt": __version__,
            "version": entry.stage.version,
            "config": entry.config.keyed(),
            "parameters": dict(expansion.parameters),
            "inputs": [keys[i] for i in inputs],
            "libraries": versions(entry.stage.distributions),
            **common,
            **({"machine": machine} if entry.stage.timed else {}),
            **({"processes": processes} if entry.stage.trains else {}),
        }
        keys[step.id] = sha256_json(parts)
        key = keys[step.id] if entry.stage.cacheable else None
        steps.append(Step(step.id, entry.stage_name, entry.name, entry.stage, entry.config, expansion, inputs, parts, key, why=expansion.why_not))
    return steps


def _consult(steps: Iterable[Step], cache: store.Cache, unasked: str | None) -> Iterable[Step]:
    """Ask the cache about each step, following the digests of its inputs; not if there is a reason."""
    digests: dict[str, str | None] = {}
    for step in steps:
        digests[step.id] = None
        if not step.runnable:
            yield step
        elif step.key is None:
            yield replace(step, why="measured anew in every run", seconds=cache.seconds(step.kind))
        elif unasked is not None:
            yield replace(step, why=unasked)
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
