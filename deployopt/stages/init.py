"""Implicit first stage: the network as the recipe's `model` section describes it, before any training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deployopt.stages import Expansion, Planning, Point, StageConfig, StageContext, StepOutput, StepResult
from deployopt.stages._training import DISTRIBUTIONS, finish

version = 1
not_after: frozenset[str] = frozenset()
after: frozenset[str] = frozenset()
cacheable = True
timed = False
trains = False
from_scratch = False
distributions = DISTRIBUTIONS


class Config(StageConfig):
    """Set by the planner."""

    fan_out: bool = True
    """Export and measure this network too: True unless the next stage trains from scratch; then it is a trained checkpoint."""


def expand(config: Config, planning: Planning) -> list[Expansion]:
    return [Expansion(makes=(Point("torch", "init", "float", fans_out=config.fan_out),))]


def run(context: StageContext, config: Config, expansion: Expansion, inputs: Sequence[StepOutput]) -> StepResult:
    import torch

    from deployopt.nn import checkpoint, models

    torch.set_num_threads(context.threads)
    dataset = context.dataset()
    outputs = context.task.head_width(dataset.train.targets, dataset.classes)
    base: dict[str, Any] = {**context.base, "outputs": outputs}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        network = models.build(base, dataset.preprocessing, context.base.get("weights"), context.progress)
    if config.fan_out:
        return finish(context, network, None, "float", curves=[])
    return StepResult({"family": "float", "parent": None}, {"model": checkpoint.save(context.folder, network)})  # nothing to score yet
