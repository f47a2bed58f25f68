"""What the benchmarks of graphs share: a network with random weights, its canonical FP32 and INT8 ONNX. Accuracy is not the point there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from onnx import ModelProto

from deployopt.bench.images import natural_noise
from deployopt.nn import CIFAR_ARCHITECTURES, export, models
from deployopt.nn.models import Network
from deployopt.nn.prepared import Prepared, Scheme
from deployopt.nn.quantizer import quantization, recorded_scales
from deployopt.runtime.preprocessing import Preprocessing, to_feed


@dataclass(frozen=True)
class Canonical:
    """One network's files: as it was, and quantised after training."""

    fp32: ModelProto
    int8: ModelProto


def network(arch: str, image_size: int, seed: int = 0) -> tuple[Network, torch.Tensor]:
    """(network, float32 [16, 3, S, S] in 0–1) with BatchNorm statistics of these images, so that activations keep their size through its depth."""
    torch.manual_seed(seed)
    outputs = 10 if arch in CIFAR_ARCHITECTURES else 1000
    made = models.build({"arch": arch, "outputs": outputs}, Preprocessing(image_size))
    images = torch.from_numpy(to_feed(natural_noise(16, image_size, image_size, 3, seed)))
    settle_batchnorm(made, images)
    return made, images


def settle_batchnorm(made: Network, images: torch.Tensor) -> None:
    """Give BatchNorm the statistics of float32 [n, 3, S, S] and leave the network in evaluation mode."""
    norms = [m for m in made.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        made.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    made.eval()


def exported(made: Network) -> ModelProto:
    """The canonical file of a network, quantised or not."""
    return export.canonical(export.deployed(made), made, recorded_scales(made))


def int8(made: Network, images: torch.Tensor) -> ModelProto:
    """Quantises `made` by calibration on these images."""
    assert quantization(made) is None
    prepared = Prepared(made, Scheme())
    prepared.calibrate(iter(images.split(8)))  # type: ignore[no-untyped-call]
    prepared.write_back(made)
    return exported(made)


def canonical(arch: str, image_size: int, seed: int = 0) -> Canonical:
    made, images = network(arch, image_size, seed)
    return Canonical(exported(made), int8(made, images))
