"""Post-training quantisation: INT8 by calibration alone, weights as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from deployopt.stages import Expansion, Planning, StageConfig, StageContext, StepOutput, StepResult
from deployopt.stages._training import DISTRIBUTIONS, finish, load_parent, next_point

version = 1
not_after = frozenset({"qat", "ptq", "export", "build", "benchmark"})
after: frozenset[str] = frozenset()
cacheable = True
timed = False
distributions = (*DISTRIBUTIONS, "torchao")


class Config(StageConfig):
    """Options of post-training quantisation."""

    observer: Literal["moving_average", "min_max", "mse"] = "mse"
    """How activations' ranges are found: a moving average of each batch's minimum and maximum, both over all batches, or the clipping range of least
    squared rounding error. Weights: the largest magnitude of each output channel."""
    calibration_images: int = Field(default=512, ge=1, le=1_000_000)
    """Training images that set the ranges."""
    saturation_guard: bool = True
    """Keep weights of layers whose input may be negative (the first) within ±63, so that x86 CPUs without VNNI do not overflow int16."""


def expand(config: Config, planning: Planning) -> list[Expansion]:
    return [Expansion((planning.trunk,), (next_point(planning, "int8"),))]


def run(context: StageContext, config: Config, expansion: Expansion, inputs: Sequence[StepOutput]) -> StepResult:
    from deployopt.nn import evaluate
    from deployopt.nn.prepared import Prepared, Scheme, calibration_batches
    from deployopt.nn.quantizer import fake_quantized

    network, dataset = load_parent(inputs, context.threads), context.dataset()
    with context.progress.track("calibrate", 3) as bar:
        prepared = Prepared(network, Scheme(config.observer, config.saturation_guard)).to(context.device)
        bar.advance()
        prepared.calibrate(calibration_batches(dataset.train, config.calibration_images, context.seed, context.device))
        bar.advance()
        prepared.write_back(network)
        quantized = fake_quantized(network).to(context.device)
        bar.advance()
    outputs = evaluate.outputs(quantized, dataset.validation, device=context.device)
    validation = context.task.score(outputs, dataset.validation.targets)
    return finish(context, network, expansion.inputs[0].variant, "int8", scored=quantized, validation=validation, curves=[])
