"""All torch lives here. This page itself is torch-free: the names and rules of networks that planning, `deployopt list` and `models` share."""

from __future__ import annotations

from pathlib import Path

from deployopt.errors import DataNotFound, UsageError
from deployopt.plugins import did_you_mean

TORCHVISION_ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2")
CIFAR_ARCHITECTURES = ("resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
ARCHITECTURES = TORCHVISION_ARCHITECTURES + CIFAR_ARCHITECTURES
STEMS = ("imagenet", "small", "cifar")
IMAGENET = "imagenet"  # as `weights`: torchvision's, downloaded


def stem_of(arch: str, stem: str | None) -> str:
    """The stem asked for, or the network's own."""
    return stem or ("cifar" if arch in CIFAR_ARCHITECTURES else "imagenet")


def check_stem(arch: str, stem: str | None) -> None:
    """Raises:
    UsageError: one of our own architectures does not have this stem.
    """
    if arch in CIFAR_ARCHITECTURES and stem_of(arch, stem) != "cifar":
        raise UsageError(f"{arch} is a CIFAR ResNet and has the stem cifar only, found {stem}", "remove model.stem")


def check_weights(weights: str, arch: str, stem: str | None, channels: int = 3) -> None:
    """Check what can be told of `weights` without reading them.

    Args:
        channels: of the images; planning does not know them.

    Raises:
        UsageError: ImageNet's do not exist for this network; or a bare word that is neither them nor a file or folder here.
    """
    if weights == IMAGENET and (arch not in TORCHVISION_ARCHITECTURES or stem_of(arch, stem) != "imagenet" or channels != 3):
        raise UsageError(
            f"ImageNet weights exist for {', '.join(TORCHVISION_ARCHITECTURES)} with stem imagenet and 3 channels, "
            f"not for {arch} with stem {stem_of(arch, stem)} and {channels} channels",
            "model.weights: null" + (", or model.stem: imagenet" if arch in TORCHVISION_ARCHITECTURES and channels == 3 else ""),
        )
    path = Path(weights)
    if weights != IMAGENET and path.name == weights and not path.suffix and not path.exists():
        raise UsageError(f"wants {_WEIGHTS}; there is no file or folder '{weights}' here{did_you_mean(weights, [IMAGENET])}")


def missing_weights(path: Path) -> DataNotFound:
    """The error for a file or folder of weights that is not there."""
    return DataNotFound(f"weights file {path} does not exist", f"model.weights is {_WEIGHTS}")


_WEIGHTS = "null, imagenet, the path of a .safetensors or .pth file, or the folder of a variant"
