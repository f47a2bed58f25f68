"""What the trunk stages share: training options, and the record and artifact that each variant leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from deployopt.config import ForLoss
from deployopt.errors import StageFailed
from deployopt.nn.schedule import Augment, TrainingConfig
from deployopt.stages import Planning, Point, StageConfig, StageContext, StepOutput, StepResult

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from deployopt.nn.models import Network
    from deployopt.nn.training import History

__all__ = ["Augment", "Distill", "TrainingConfig", "finish", "load_parent", "next_point", "taught_by", "train"]

DISTRIBUTIONS = ("torch", "torchvision", "numpy", "pillow")


class Distill(StageConfig):
    """Learn from the outputs of the network that the stage was given as well (Hinton et al., https://arxiv.org/abs/1503.02531)."""

    temperature: Annotated[float, ForLoss("cross_entropy")] = Field(default=4.0, gt=0)
    """Softens both distributions; of cross entropy only."""
    weight: float = Field(default=0.5, gt=0, le=1)
    """Loss = (1 − weight) · task loss + weight · distance to its outputs."""


def next_point(planning: Planning, family: Literal["float", "int8"]) -> Point:
    """The variant that this stage adds to the trunk."""
    return Point("torch", planning.name, family)


def load_parent(inputs: Sequence[StepOutput], threads: int) -> Network:
    """The network that the trunk's last step made, after its bytes were verified; computing uses `threads` CPU threads."""
    import torch

    from deployopt.nn import checkpoint

    torch.set_num_threads(threads)
    return checkpoint.load(inputs[0].artifacts["model"].verified().path.parent)


def train(context: StageContext, module: nn.Module, schedule: TrainingConfig, phase: str = "", **more: Any) -> History:
    """Train a module in place as `nn.training.fit` does, on the context's data, task, seed and device.

    Args:
        phase: names the training in curves and seeds its order of images; "" is the stage instance's name.
        more: other arguments of `fit`.
    """
    from deployopt.nn import training

    return training.fit(
        module,
        context.dataset(),
        context.task,
        schedule,
        device=context.device,
        seed=context.seed,
        progress=context.progress,
        phase=phase or context.name,
        **more,
    )


def taught_by(teacher: nn.Module, distill: Distill | None) -> dict[str, Any]:
    """Arguments of `train` for distillation; none where it is not asked for."""
    from deployopt.nn.losses import Distillation

    return {} if distill is None else {"teacher": teacher, "distillation": Distillation(distill.weight, distill.temperature)}


def outputs(context: StageContext, module: nn.Module, split: Literal["validation", "test"]) -> NDArray[np.float32]:
    """Outputs float32 [N, K] of a module in evaluation mode on a split.

    Raises:
        StageFailed: NaN or infinite ones; says of how many images.
    """
    from deployopt.nn import evaluate

    images = getattr(context.dataset(), split)
    with context.progress.track(f"score on the {split} split", len(images)) as bar:
        found = evaluate.outputs(module, images, device=context.device, on_batch=bar.advance)
    if broken := evaluate.broken(found):
        source = "the weights that the run starts from (model.weights)" if context.base.get("weights") else "what its stages made of the network"
        raise StageFailed(
            f"{context.name}: the network's outputs on {broken} of {len(found)} images of the {split} split are NaN or infinite",
            f"check {source}: a weight, or a BatchNorm's statistics, is NaN or far too large",
        )
    return found


def finish(context: StageContext, network: Network, parent: str | None, family: str, *, scored: nn.Module | None = None, **facts: Any) -> StepResult:
    """Score a finished network once on test, save it, and write the record every variant has.

    Args:
        parent: the variant it was made from.
        scored: whose outputs are scored, in evaluation mode; None is the network's own (int8: the fake-quantised graph).
        facts: more of the record: "curves", "validation", "pruning" …

    Raises:
        StageFailed: its outputs are NaN or infinite.
    """
    from deployopt.nn import checkpoint, macs

    dataset = context.dataset()
    network.to(context.device).eval()
    found = outputs(context, network if scored is None else scored.to(context.device), "test")
    artifact = checkpoint.save(context.folder, network)
    params, multiply_accumulates = macs.count(network, network.input_shape)
    record = {
        "params": params,
        "macs": multiply_accumulates,
        "size_bytes": artifact.size_bytes,
        "accuracy": context.task.score(found, dataset.test.targets),
        "details": context.task.details(found, dataset.test.targets, dataset.classes),
        "family": family,
        "parent": parent,
        **facts,
    }
    return StepResult(record, {"model": artifact})
