"""Makes the helpers of tests/runtime importable, here and in workers' children, which take over this process's sys.path; runs stages in a row."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from deployopt.data import Dataset, digits
from deployopt.data._arrays import ArraySet
from deployopt.runtime.progress import SilentProgress
from deployopt.stages import Choices, Planning, Point, StageContext, StepOutput
from deployopt.tasks import classification

HELPERS = str(Path(__file__).parents[1] / "runtime")
if HELPERS not in sys.path:
    sys.path.append(HELPERS)

Plan = Sequence[tuple[ModuleType, Any]]
RunStages = Callable[..., list[StepOutput]]


class NoChoices:
    """Decides anew every time."""

    def get_or_make(self, name: str, make: Callable[[], Any]) -> Any:
        return make()


@pytest.fixture(scope="session")
def small_digits() -> Dataset:
    """Digits 0, 1 and 2 at 8×8 pixels: 317 + 57 + 162 images."""
    data = digits.load(digits.Config(image_size=8))

    def three(images: ArraySet) -> ArraySet:
        rows = np.flatnonzero(images.targets < 3)
        return ArraySet(np.stack([images.raw(int(i)) for i in rows]), images.targets[rows], data.preprocessing)

    return Dataset(three(data.train), three(data.validation), three(data.test), data.classes[:3], data.preprocessing)


@pytest.fixture(scope="session")
def run_stages(small_digits: Dataset) -> RunStages:
    """Runs (stage, config) pairs in a row after `earlier` steps, as the executor does; returns those and the new steps."""

    def run(
        folder: Path, plan: Plan, earlier: Sequence[StepOutput] = (), data: Dataset = small_digits, task: Any = classification, choices: Choices | None = None
    ) -> list[StepOutput]:
        steps: list[StepOutput] = list(earlier)
        points: list[Point] = [point for step in steps for point in step.point]
        for number, (stage, config) in enumerate(plan, len(steps)):
            name = stage.__name__.rpartition(".")[2]
            home = folder / f"{number}-{name}"
            home.mkdir(parents=True)
            context = StageContext(home, name, {"arch": "resnet8"}, 0, "cpu", 1, 1, task, lambda: data, SilentProgress(), choices or NoChoices(), folder)
            expansion = stage.expand(config, Planning(points, name))[-1]
            read = [next(s for s in reversed(steps) if point in s.point) for point in expansion.inputs]
            result = stage.run(context, config, expansion, read)
            points += expansion.makes
            steps.append(StepOutput(home.name, name, expansion.makes, result.record, result.artifacts, home, False, 0.0))
        return steps

    return run
