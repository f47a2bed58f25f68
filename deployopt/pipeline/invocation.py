"""One step's `run`: in this process, or, for a stage that trains, side by side in several.

Each of several processes plans the run folder's recipe again and runs the whole step: the same parent from disk, the same calls, its share of
every batch (`nn.distributed`). Rank 0's result counts and only its progress is shown; the others write into folders that are thrown away.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from deployopt import data, store
from deployopt.artifact import Artifact
from deployopt.data import Dataset
from deployopt.pipeline.planning import Plan, Step, plan
from deployopt.recipe import load_recipe
from deployopt.runtime.child import run_in_children
from deployopt.runtime.files import atomic_write_json
from deployopt.runtime.progress import Progress
from deployopt.stages import Choices, StageContext, StepOutput, StepResult

T = TypeVar("T")
RESULT = "result.json"
RANKS = ".ranks"  # inside the step's folder while it runs: where the processes meet, and what other ranks write


@dataclass(frozen=True)
class Invocation:
    """A step about to run.

    Attributes:
        folder: the step's. run_folder: of the whole run.
        inputs: outputs of the steps that it reads.
    """

    planned: Plan
    step: Step
    inputs: Sequence[StepOutput]
    folder: Path
    run_folder: Path
    choices: store.StoredChoices
    dataset: Callable[[], Dataset]
    progress: Progress

    def result(self) -> StepResult:
        """What the stage's `run` returns, from as many processes as the plan gives it."""
        if not self.step.stage.trains or self.planned.processes == 1:
            return self.run(self.folder, self.choices, self.planned.device, self.planned.threads)
        return self._side_by_side(self.planned.processes)

    def run(self, folder: Path, choices: Choices, device: str, threads: int) -> StepResult:
        """Run the step in this process."""
        recipe = self.planned.recipe
        weights = recipe.weights_path
        context = StageContext(
            folder=folder,
            name=self.step.entry_name,
            base={**recipe.model.model_dump(mode="json"), **({"weights": str(weights)} if weights else {})},
            seed=recipe.seed,
            device=device,
            threads=threads,
            processes=self.planned.processes if self.step.stage.trains else 1,
            task=self.planned.task,
            dataset=self.dataset,
            progress=self.progress,
            choices=choices,
            run_folder=self.run_folder,
        )
        return self.step.stage.run(context, self.step.config, self.step.expansion, self.inputs)

    def _side_by_side(self, processes: int) -> StepResult:
        common = {
            "run_folder": str(self.run_folder.absolute()),
            "step_id": self.step.id,
            "folder": str(self.folder.absolute()),
            "choices": str(self.choices.path.absolute()),
            "device": self.planned.device,
            "threads": self.planned.threads,
            "processes": processes,
        }
        self.dataset()  # a download happens once, here
        shutil.rmtree(self.folder / RANKS, ignore_errors=True)  # left by a killed run, where the step is one that is never cached
        (self.folder / RANKS).mkdir()
        calls = [{**common, "rank": rank} for rank in range(processes)]
        result = run_in_children(f"{__name__}:run_rank", calls, self.progress, f"{self.step.title} in {processes} processes")
        shutil.rmtree(self.folder / RANKS)
        return StepResult(result["record"], {name: Artifact.from_json(value, self.folder) for name, value in result["artifacts"].items()})


def run_rank(
    *, run_folder: str, step_id: str, folder: str, choices: str, device: str, threads: int, processes: int, rank: int, progress: Progress
) -> dict[str, Any] | None:
    """In a process of its own: run one step as one of several. Returns rank 0's result as JSON, None from the others."""
    from deployopt.nn import distributed

    home, step_folder = Path(run_folder), Path(folder)
    planned = plan(load_recipe(home / "recipe.yaml"), device=device, threads=threads, processes=processes, fresh=True)
    steps = {step.id: step for step in planned.steps}
    step = steps[step_id]
    own = step_folder if rank == 0 else step_folder / RANKS / str(rank)
    own.mkdir(parents=True, exist_ok=True)
    stored = store.StoredChoices(Path(choices))
    inputs = [read_output(steps[p.step], home / p.step) for p in step.expansion.inputs]
    invocation = Invocation(planned, step, inputs, own, home, stored, cache(lambda: load_data(planned, progress)), progress)
    with distributed.joined(rank, processes, step_folder / RANKS / "rendezvous", place := _device(device, rank)):
        result = invocation.run(own, SharedChoices(stored), place, threads // processes)
    return result_json(result, own) if rank == 0 else None


class SharedChoices:
    """Choices that rank 0 makes, or has stored, and all processes take."""

    def __init__(self, stored: Choices) -> None:
        self._stored = stored

    def get_or_make(self, name: str, make: Callable[[], T]) -> T:
        from deployopt.nn import distributed

        return distributed.decided(lambda: self._stored.get_or_make(name, make))


def load_data(planned: Plan, progress: Progress) -> Dataset:
    """The plan's data set, downloaded if the recipe allows it."""
    with progress.track(f"open the data {planned.recipe.data.name}", None):
        return data.load(planned.data, planned.data_config, progress)


def _device(first: str, rank: int) -> str:
    """Of a rank: the CPU, or the GPU that many after the first."""
    kind, _, index = first.partition(":")
    return kind if kind == "cpu" else f"{kind}:{int(index) + rank}"


def result_json(result: StepResult, folder: Path) -> dict[str, Any]:
    return {"record": dict(result.record), "artifacts": {name: a.to_json(folder) for name, a in result.artifacts.items()}}


def write_result(result: StepResult, folder: Path) -> None:
    atomic_write_json(folder / RESULT, result_json(result, folder))


def read_output(step: Step, folder: Path, *, cached: bool = True, seconds: float = 0.0) -> StepOutput:
    """What a finished step left in `folder`."""
    result: Mapping[str, Any] = json.loads((folder / RESULT).read_text())
    artifacts = {name: Artifact.from_json(value, folder) for name, value in result["artifacts"].items()}
    return StepOutput(step.id, step.stage_name, step.expansion.makes, result["record"], artifacts, folder, cached, seconds)
