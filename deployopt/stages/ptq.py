"""Post-training quantisation: INT8 by calibration alone, weights as they are."""

from __future__ import annotations

from collections.abc import Sequence

from deployopt.stages import Expansion, StageContext, StepOutput, StepResult
from deployopt.stages._mixed_precision import check, decide
from deployopt.stages._quantize import DISTRIBUTIONS, Quantization, calibrated, expand, parent_outputs
from deployopt.stages._training import finish, load_parent, outputs

__all__ = ["Config", "after", "cacheable", "distributions", "expand", "from_scratch", "not_after", "run", "timed", "traces", "trains", "version"]

version = 5
not_after = frozenset({"qat", "ptq", "export", "build", "benchmark"})
after: frozenset[str] = frozenset()
cacheable = True
timed = False
trains = False
from_scratch = False
traces = True
distributions = DISTRIBUTIONS


class Config(Quantization):
    """Options of post-training quantisation."""


def run(context: StageContext, config: Config, expansion: Expansion, inputs: Sequence[StepOutput]) -> StepResult:
    from deployopt.nn.quantizer import fake_quantized

    check(context, config)
    network = load_parent(inputs, context.threads)
    prepared, reference = calibrated(context, config, network), parent_outputs(context, config, network)
    prepared.write_back(network)
    facts = decide(context, config, network, reference)
    quantized = fake_quantized(network).to(context.device)
    validation = context.task.score(outputs(context, quantized, "validation"), context.dataset().validation.targets)
    return finish(context, network, expansion.inputs[0].variant, "int8", scored=quantized, validation=validation, curves=[], quantization=facts)
