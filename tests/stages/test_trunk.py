"""init → finetune → prune on real digits: every variant leaves the record that reports need."""

from pathlib import Path

import torch

from deployopt.data import Dataset, digits
from deployopt.nn import checkpoint
from deployopt.runtime.progress import SilentProgress
from deployopt.stages import Planning, Point, StageContext, StepOutput, finetune, init, prune
from deployopt.tasks import classification


class NoChoices:
    def get_or_make(self, name, make):  # type: ignore[no-untyped-def]
        return make()


def run_trunk(folder: Path) -> list[StepOutput]:
    data: Dataset = digits.load(digits.Config(image_size=8))
    steps: list[StepOutput] = []
    points: list[Point] = []
    plan = [
        (init, init.Config(fan_out=False)),
        (finetune, finetune.Config(epochs=2)),
        (
            prune,
            prune.Config.model_validate(
                {"target": {"macs_ratio": 0.5}, "round_to": 1, "global": True, "importance": "taylor", "finetune": {"epochs": 1, "warmup_epochs": 0}}
            ),
        ),
    ]
    for stage, config in plan:
        name = stage.__name__.rpartition(".")[2]
        context = StageContext(folder / name, name, {"arch": "resnet20"}, 0, "cpu", 1, classification, lambda: data, SilentProgress(), NoChoices(), folder)
        expansion = stage.expand(config, Planning(points, name))[0]
        result = stage.run(context, config, expansion, steps[-1:])
        points += expansion.makes
        steps.append(StepOutput(name, name, expansion.makes, result.record, result.artifacts, context.folder, False, 0.0))
    return steps


def test_the_trunk_trains_prunes_and_repeats_bit_for_bit(tmp_path: Path) -> None:
    first, second = run_trunk(tmp_path / "a"), run_trunk(tmp_path / "b")
    assert [s.artifacts["model"].sha256 for s in first] == [s.artifacts["model"].sha256 for s in second]
    start, trained, pruned = (s.record for s in first)
    assert trained["accuracy"]["top1"] > start["accuracy"]["top1"] + 0.3
    assert trained["accuracy"]["n"] == 539
    assert pruned["macs"] <= 0.5 * trained["macs"]
    assert [s.record["parent"] for s in first] == [None, "init", "finetune"]
    assert len(trained["curves"]) == 2
    assert checkpoint.load(first[-1].folder)(torch.rand(2, 3, 8, 8)).shape == (2, 10)
