"""Networks small enough to be pruned in milliseconds: plain, with grouped, with depthwise convolutions, with a concatenation."""

import torch
import torchvision
from torch import Tensor, nn

from deployopt.nn import models
from deployopt.nn.models import Network
from deployopt.runtime.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(16, 3, None, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def resnet8(preprocessing: Preprocessing = PREPROCESSING, outputs: int = 7) -> Network:
    torch.manual_seed(0)
    return models.build({"arch": "resnet8", "outputs": outputs}, preprocessing)


def resnext() -> Network:
    """Bottlenecks of 32 groups with 4, 8, 16 and 32 channels each, one a stage."""
    torch.manual_seed(0)
    body = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], 7, groups=32, width_per_group=4)
    return Network(body, {"arch": "resnext", "outputs": 7}, PREPROCESSING)


def depthwise() -> Network:
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 7),
    )
    return Network(body, {"arch": "depthwise", "outputs": 7}, PREPROCESSING)


class _Concatenating(nn.Module):
    """Two branches of unequal width side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1)
        self.joined = nn.Conv2d(24, 12, 3)
        self.head = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        return self.head(self.joined(both).relu().mean((2, 3)))


def concatenating() -> Network:
    torch.manual_seed(0)
    return Network(_Concatenating(), {"arch": "concatenating", "outputs": 7}, PREPROCESSING)
