"""One file a stage. This page is what a stage is; `finetune.py` is the simplest example.

A stage is a module with the attributes of `Stage`. It is torch-free at import: torch is imported inside `run`.
The planner asks each stage in the recipe's order to `expand` what has been planned so far into steps; the executor runs
the steps that the cache does not hold. So a stage that fans out and one that transforms the trunk differ only in `expand`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from deployopt.artifact import Artifact, ArtifactKind
from deployopt.config import Strict
from deployopt.runtime.progress import Progress

if TYPE_CHECKING:
    from deployopt.data import Dataset
    from deployopt.tasks import Task

__all__ = [
    "Choices",
    "Expansion",
    "Family",
    "Planning",
    "Point",
    "Stage",
    "StageConfig",
    "StageContext",
    "StepOutput",
    "StepResult",
    "finish",
    "load_parent",
    "next_point",
    "train",
]

Family = Literal["float", "int8"]
T = TypeVar("T")


class StageConfig(Strict):
    """Base of every stage's `Config`: frozen, unknown keys and NaN refused."""


@dataclass(frozen=True)
class Point:
    """Something a planned step will make, that later stages may build on.

    Attributes:
        kind: "torch" for a variant on the trunk, "onnx" or "engine" for what fans out of it.
        variant: name of the variant it is or comes from.
        family: what the variant may fan out as: float precisions, or int8.
        artifact: its name among the step's artifacts.
        precision, backend: set on "onnx" and "engine" points.
        max_batch: largest batch size that an "engine" point is built for; None for any.
        fans_out: False for a variant that is only a start (a network with an untrained head).
        step: id of the step that makes it; the planner fills it in.
    """

    kind: ArtifactKind
    variant: str
    family: Family
    artifact: str = "model"
    precision: str | None = None
    backend: str | None = None
    max_batch: int | None = None
    fans_out: bool = True
    step: str = ""


@dataclass(frozen=True)
class Expansion:
    """One step a stage asks for.

    Attributes:
        inputs: the points it reads.
        makes: the points it will offer.
        label: distinguishes the stage's steps in the run folder ("" if there is one only).
        parameters: what `run` needs to know beyond its config (JSON values; part of the cache key).
        why_not: reason why this step cannot run on this machine; it is then reported and not run.
    """

    inputs: tuple[Point, ...] = ()
    makes: tuple[Point, ...] = ()
    label: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    why_not: str | None = None


@dataclass(frozen=True)
class StepOutput:
    """What a finished step left behind, read back from its folder and verified.

    Attributes:
        record: the stage's JSON record.
        artifacts: by name.
        folder: holds both.
        cached: it was not run now.
        seconds: its run took, when it ran.
    """

    step: str
    stage: str
    point: tuple[Point, ...]
    record: Mapping[str, Any]
    artifacts: Mapping[str, Artifact]
    folder: Path
    cached: bool
    seconds: float


@dataclass(frozen=True)
class StepResult:
    """What `run` returns: a JSON record, and artifacts that lie inside `context.folder`."""

    record: Mapping[str, Any]
    artifacts: Mapping[str, Artifact] = field(default_factory=dict)


class Choices(Protocol):
    """Decisions made by timing: stored before they are used, so that a resumed run repeats them bit for bit."""

    def get_or_make(self, name: str, make: Callable[[], T]) -> T:
        """The stored choice, else `make()` (a JSON value), stored."""


@dataclass(frozen=True)
class Planning:
    """What `expand` may know: everything here exists before anything runs.

    Attributes:
        points: all that earlier stages will make, in order.
        name: of this stage instance (`as:` or the stage's name); a trunk stage names its variant so.
        here: False while a recipe is only checked, wherever it will run. `expand` then asks nothing of this machine (no probe, no versions, no
            `why_not`), so that checking stays light; inputs and points are the same.
    """

    points: Sequence[Point]
    name: str
    here: bool = True

    @property
    def trunk(self) -> Point:
        """The latest variant."""
        return [p for p in self.points if p.kind == "torch"][-1]

    @property
    def variants(self) -> list[Point]:
        """All variants that fan out, in trunk order."""
        return [p for p in self.points if p.kind == "torch" and p.fans_out]


@dataclass(frozen=True)
class StageContext:
    """What `run` is given beside its config.

    Attributes:
        folder: write everything here; it becomes the step's folder only when `run` returns.
        name: of the stage instance.
        base: the recipe's `model` section as JSON values (arch, weights, stem).
        seed: of the recipe. device: "cpu" or "cuda:N". threads: CPU threads to compute with.
        processes: that run this step side by side, each with a context, a device and `threads` of its own (see `Stage.trains`); all of them have to
            train, evaluate and call `choices` in the same order.
        task: scores outputs. dataset: loads on first call, then kept.
        choices: remembers what was decided by timing.
        run_folder: of the whole run; only uncached stages (benchmark) may write there.
    """

    folder: Path
    name: str
    base: Mapping[str, Any]
    seed: int
    device: str
    threads: int
    processes: int
    task: Task
    dataset: Callable[[], Dataset]
    progress: Progress
    choices: Choices
    run_folder: Path


class Stage(Protocol):
    """The attributes of a stage module.

    Attributes:
        Config: its options; strict; every default documented by a docstring under the field.
        version: raise it when the same config makes another result.
        not_after: stages that may not stand before it.
        after: at least one of these must stand before it (empty: none needed).
        cacheable: False if it must run every time (anything that reports latency).
        timed: True if its result depends on timing, and so on this CPU or GPU; its key then names them.
        trains: True if it calls `train` (`nn.training.fit`): `--nproc N` then calls its `run` in N processes, in which `fit` shares every batch, and its key
            names N. Nothing else changes for the stage; the first process's result is taken.
        from_scratch: True if it can train a network whose head is untrained. As the recipe's first stage it makes the first variant worth measuring;
            before any other first stage the network as `model` describes it is measured too.
        distributions: packages whose versions matter to its result.
        traces: optional; True if it needs the network's graph (`nn.capture`), so that one which cannot be traced is refused before it is trained.
    """

    Config: type[StageConfig]
    version: int
    not_after: frozenset[str]
    after: frozenset[str]
    cacheable: bool
    timed: bool
    trains: bool
    from_scratch: bool
    distributions: tuple[str, ...]

    def expand(self, config: Any, planning: Planning) -> list[Expansion]:
        """The steps this stage asks for. No torch, no data, no side effects.

        Raises:
            UsageError: what was planned so far does not allow this stage; OptionRefused: or one of its options.
        """

    def run(self, context: StageContext, config: Any, expansion: Expansion, inputs: Sequence[StepOutput]) -> StepResult:
        """Do one step. `inputs` are the outputs of the steps of `expansion.inputs`, in that order."""


# what every trunk stage begins and ends with; it needs the types above
from deployopt.stages._training import finish, load_parent, next_point, train  # noqa: E402
