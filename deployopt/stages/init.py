"""Implicit first stage: the network as the recipe's `model` section describes it, before any training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deployopt.stages import Expansion, Family, Planning, Point, StageConfig, StageContext, StepOutput, StepResult
from deployopt.stages._training import DISTRIBUTIONS, finish

if TYPE_CHECKING:
    from torch import nn

    from deployopt.nn.models import Network

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

    NOT_IN_KEY: ClassVar[frozenset[str]] = frozenset({"traced"})  # the network is the same

    fan_out: bool = True
    """Export and measure this network too: True unless the next stage trains from scratch; then it is a trained checkpoint."""
    family: Family = "float"
    """int8 if `model.weights` is the folder of a quantised variant."""
    traced: bool = True
    """A later stage needs the network's graph: what cannot be traced ends here, before it is trained."""


def expand(config: Config, planning: Planning) -> list[Expansion]:
    return [Expansion(makes=(Point("torch", "init", config.family, fans_out=config.fan_out),))]


def run(context: StageContext, config: Config, expansion: Expansion, inputs: Sequence[StepOutput]) -> StepResult:
    with context.progress.track("load torch", None):
        import torch

        from deployopt.nn import checkpoint, models

    torch.set_num_threads(context.threads)
    dataset = context.dataset()
    outputs = context.task.head_width(dataset.train.targets, dataset.classes)
    base: dict[str, Any] = {**context.base, "outputs": outputs}
    weights: str | None = context.base.get("weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        if weights is not None and Path(weights).is_dir():
            network = checkpoint.resume(Path(weights), outputs, dataset.preprocessing, context.progress)
        else:
            network = models.build(base, dataset.preprocessing, weights, context.progress)
    with context.progress.track("check the network", None):
        _check(network, config.traced)
    if config.fan_out:
        return finish(context, network, None, config.family, scored=_quantized(network) if config.family == "int8" else None, curves=[])
    return StepResult({"family": config.family, "parent": None}, {"model": checkpoint.save(context.folder, network)})  # nothing to score yet


def _check(network: Network, traced: bool) -> None:
    """Raise ExportFailed for a network that a later stage cannot count or trace; names the line."""
    from deployopt.nn import macs
    from deployopt.nn.capture import capture, example_input

    try:
        macs.count(network, network.input_shape)
    except Exception:  # of the model's own code, on shapes alone
        capture(network, example_input(network.preprocessing))
        raise
    if traced:
        capture(network, example_input(network.preprocessing))


def _quantized(network: Network) -> nn.Module:
    from deployopt.nn.quantizer import fake_quantized

    return fake_quantized(network.eval())
