"""Train the trunk's network on the training split."""

from __future__ import annotations

from collections.abc import Sequence

from deployopt.nn.schedule import TrainingConfig
from deployopt.stages import Expansion, Planning, StageConfig, StageContext, StepOutput, StepResult
from deployopt.stages._training import DISTRIBUTIONS, finish, load_parent, next_point, train

version = 2
not_after: frozenset[str] = frozenset({"qat", "ptq", "export", "build", "benchmark"})
after: frozenset[str] = frozenset()
cacheable = True
timed = False
trains = True
from_scratch = True
distributions = DISTRIBUTIONS


class Config(TrainingConfig, StageConfig):
    """Training in float. The defaults train a ResNet-18 on 32×32 images from scratch."""


def expand(config: Config, planning: Planning) -> list[Expansion]:
    return [Expansion(inputs=(planning.trunk,), makes=(next_point(planning, "float"),))]


def run(context: StageContext, config: Config, expansion: Expansion, inputs: Sequence[StepOutput]) -> StepResult:
    network = load_parent(inputs, context.threads)
    history = train(context, network, config)
    parent = expansion.inputs[0].variant
    return finish(context, network, parent, "float", curves=history.records, validation=history.validation, kept_epoch=history.epoch)
