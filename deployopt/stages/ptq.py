"""Post-training quantisation: INT8 by calibration alone, weights as they are."""

from __future__ import annotations

from collections.abc import Sequence

from deployopt.stages import Expansion, StageContext, StepOutput, StepResult
from deployopt.stages._quantize import DISTRIBUTIONS, Quantization, calibrated, expand
from deployopt.stages._training import finish, load_parent

__all__ = ["Config", "after", "cacheable", "distributions", "expand", "from_scratch", "not_after", "run", "timed", "trains", "version"]

version = 1
not_after = frozenset({"qat", "ptq", "export", "build", "benchmark"})
after: frozenset[str] = frozenset()
cacheable = True
timed = False
trains = False
from_scratch = False
distributions = DISTRIBUTIONS


class Config(Quantization):
    """Options of post-training quantisation."""


def run(context: StageContext, config: Config, expansion: Expansion, inputs: Sequence[StepOutput]) -> StepResult:
    from deployopt.nn import evaluate
    from deployopt.nn.quantizer import fake_quantized

    network, dataset = load_parent(inputs, context.threads), context.dataset()
    calibrated(context, config, network).write_back(network)
    quantized = fake_quantized(network).to(context.device)
    with context.progress.track("validate", len(dataset.validation)) as bar:
        outputs = evaluate.outputs(quantized, dataset.validation, device=context.device, on_batch=bar.advance)
    validation = context.task.score(outputs, dataset.validation.targets)
    return finish(context, network, expansion.inputs[0].variant, "int8", scored=quantized, validation=validation, curves=[])
