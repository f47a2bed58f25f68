"""Training losses by the name a task gives, and distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from deployopt.errors import UsageError

LossName = Literal["cross_entropy", "smooth_l1"]
Loss = Callable[[Tensor, Tensor], Tensor]


def by_name(name: LossName, label_smoothing: float = 0.0) -> Loss:
    """Mean loss of (outputs [N, K], targets: int64 [N] or float32 [N, K]).

    Raises:
        UsageError: label smoothing of another loss than cross entropy.
    """
    if name == "cross_entropy":
        return lambda outputs, targets: F.cross_entropy(outputs, targets, label_smoothing=label_smoothing)
    if label_smoothing:
        raise UsageError(f"label_smoothing ({label_smoothing:g}) smooths classes, and the loss of this task is {name}", "remove label_smoothing")
    return F.smooth_l1_loss


@dataclass(frozen=True)
class Distillation:
    """How much a teacher counts: loss = (1 − weight) · task loss + weight · distance to the teacher's outputs.

    Attributes:
        weight: in 0–1.
        temperature: softens both distributions (classification only).
    """

    weight: float = 0.5
    temperature: float = 4.0

    def distance(self, name: LossName, outputs: Tensor, teacher: Tensor) -> Tensor:
        """T² · KL(teacher ‖ student) at temperature T for classification (Hinton et al., https://arxiv.org/abs/1503.02531), mean squared error else."""
        if name == "smooth_l1":
            return F.mse_loss(outputs, teacher)
        t = self.temperature
        return F.kl_div(F.log_softmax(outputs / t, 1), F.log_softmax(teacher / t, 1), reduction="batchmean", log_target=True) * t**2
