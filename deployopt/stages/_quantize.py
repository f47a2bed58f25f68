"""What the stages share that make a variant INT8: options of the scheme, planning, and calibration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from deployopt.runtime.progress import Bar
from deployopt.stages import Expansion, Planning, StageConfig, StageContext
from deployopt.stages._training import DISTRIBUTIONS as TRAINING
from deployopt.stages._training import next_point

if TYPE_CHECKING:
    from torch import Tensor

    from deployopt.nn.models import Network
    from deployopt.nn.prepared import Prepared

DISTRIBUTIONS = (*TRAINING, "torchao")

Observer = Literal["moving_average", "min_max", "mse"]


class Quantization(StageConfig):
    """Options of the INT8 scheme."""

    observer: Observer = "mse"
    """How activations' ranges are found: a moving average of each batch's minimum and maximum, both over all batches, or the clipping range of least
    squared rounding error. Weights: the largest magnitude of each output channel."""
    calibration_images: int = Field(default=512, ge=1, le=1_000_000)
    """Training images that set the first ranges; ptq keeps them."""
    saturation_guard: bool = True
    """Keep weights of layers whose input may be negative (the first) within ±63, so that x86 CPUs without VNNI do not overflow int16."""


def expand(config: Quantization, planning: Planning) -> list[Expansion]:
    """One INT8 variant of the trunk."""
    return [Expansion((planning.trunk,), (next_point(planning, "int8"),))]


def calibrated(context: StageContext, config: Quantization, network: Network) -> Prepared:
    """`network` with fake quantisers on the context's device, their ranges set by training images."""
    from deployopt.nn import evaluate
    from deployopt.nn.prepared import Prepared, Scheme

    images = context.dataset().train
    with context.progress.track("insert fake quantisers", None):
        prepared = Prepared(network, Scheme(config.observer, config.saturation_guard)).to(context.device)
    with context.progress.track("calibrate", min(config.calibration_images, len(images))) as bar:
        batches = evaluate.calibration_batches(images, config.calibration_images, context.seed, context.device)
        prepared.calibrate(_counted(batches, bar))
    return prepared


def _counted(batches: Iterable[Tensor], bar: Bar) -> Iterator[Tensor]:
    for batch in batches:
        yield batch
        bar.advance(len(batch))
