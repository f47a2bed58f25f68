"""What the stages share that make a variant INT8: options of the scheme, planning, and calibration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from deployopt.runtime.progress import Bar
from deployopt.stages import Expansion, Planning, StageConfig, StageContext
from deployopt.stages._timing import TimedOn, key_parts
from deployopt.stages._training import DISTRIBUTIONS as TRAINING
from deployopt.stages._training import next_point, outputs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from deployopt.nn.models import Network
    from deployopt.nn.prepared import Prepared

DISTRIBUTIONS = (*TRAINING, "torchao")

Observer = Literal["moving_average", "min_max", "mse"]


class Sensitivity(StageConfig):
    """How each layer's sensitivity is measured."""

    images: int = Field(default=512, ge=1)
    """The first images of the validation split; all if it has fewer."""


class MixedPrecision(TimedOn):
    """Keep a few layers in float, chosen greedily until an accuracy is met; the latency that each costs there is timed on `backend`."""

    max_accuracy_drop_pp: float = Field(default=0.5, ge=0)
    """How much the whole validation split's headline metric may fall below the float parent's: percentage points, or the task's unit."""


class Quantization(StageConfig):
    """Options of the INT8 scheme."""

    observer: Observer = "mse"
    """How activations' ranges are found: a moving average of each batch's minimum and maximum, both over all batches, or the clipping range of least
    squared rounding error. Weights: the largest magnitude of each output channel."""
    calibration_images: int = Field(default=512, ge=1, le=1_000_000)
    """Training images that set the first ranges; ptq keeps them."""
    saturation_guard: bool = True
    """Keep weights of layers whose input may be negative (the first) within ±63, so that x86 CPUs without VNNI do not overflow int16."""
    sensitivity: bool | Sensitivity = False
    """Measure for each layer how far the outputs move from the float parent's, and the accuracy, with it alone in INT8 and with it alone in float: two
    passes over the images a layer. `mixed_precision: auto` needs the table: it then is measured and reported also where this is false."""
    mixed_precision: Literal["auto"] | MixedPrecision | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    """Layers kept in float: a list of names as in the sensitivity table; null none; auto, or its options, few that together meet an accuracy, chosen
    greedily: those first that, alone in float, gain most for the latency they cost. At least one stays in INT8. auto chooses
    after calibration (ptq) or training (qat), and is stored and reused when the run is resumed."""

    @field_validator("mixed_precision")
    @classmethod
    def _once_each(cls, given: object) -> object:
        if isinstance(given, tuple) and (twice := sorted({name for name in given if given.count(name) > 1})):
            raise ValueError(f"names a layer more than once: {', '.join(twice)}")
        return given

    @property
    def automatic(self) -> MixedPrecision | None:
        """The options of auto; None if the layers are given or none is kept."""
        return MixedPrecision() if self.mixed_precision == "auto" else self.mixed_precision if isinstance(self.mixed_precision, MixedPrecision) else None

    @property
    def float_layers(self) -> tuple[str, ...]:
        """Layers that are given by name."""
        return self.mixed_precision if isinstance(self.mixed_precision, tuple) else ()


def expand(config: Quantization, planning: Planning) -> list[Expansion]:
    """One INT8 variant of the trunk."""
    timed = key_parts(config.automatic) if config.automatic is not None and planning.here else {}
    return [Expansion((planning.trunk,), (next_point(planning, "int8"),), parameters=timed)]


def calibrated(context: StageContext, config: Quantization, network: Network) -> Prepared:
    """`network` with fake quantisers on the context's device, their ranges set by training images: all of them if there are fewer than asked for.

    Raises:
        UsageError: mixed_precision names a layer that the network lacks.
    """
    from deployopt.nn import evaluate, parametrizations
    from deployopt.nn.layer_sensitivity import check_layers
    from deployopt.nn.prepared import Prepared, Scheme

    check_layers(network, config.float_layers)
    if plain := parametrizations.modules(network):
        context.progress.log(f"{context.name}: quantises weights as such, without what parametrised them, in {', '.join(plain)}")
    train = context.dataset().train
    if len(train) < config.calibration_images and "calibration_images" in config.model_fields_set:
        context.progress.log(f"{context.name}: calibrates on all {len(train)} training images (calibration_images is {config.calibration_images})")
    with context.progress.track("insert fake quantisers", None):
        prepared = Prepared(network, Scheme(config.observer, config.saturation_guard, config.float_layers)).to(context.device)
    with context.progress.track("calibrate", min(config.calibration_images, len(train))) as bar:
        prepared.calibrate(_counted(evaluate.calibration_batches(train, config.calibration_images, context.seed, context.device), bar))
    return prepared


def _counted(batches: Iterable[Tensor], bar: Bar) -> Iterator[Tensor]:
    for batch in batches:
        yield batch
        bar.advance(len(batch))


def parent_outputs(context: StageContext, config: Quantization, network: Network) -> NDArray[np.float32] | None:
    """The float network's outputs on the validation split, if `config` compares with them."""
    if not config.sensitivity and config.automatic is None:
        return None
    return outputs(context, network.to(context.device).eval(), "validation")
