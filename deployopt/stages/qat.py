"""Quantisation-aware training: INT8 weights and activations, simulated while the weights adapt to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from deployopt.stages import Expansion, StageContext, StepOutput, StepResult
from deployopt.stages._mixed_precision import check, decide
from deployopt.stages._quantize import DISTRIBUTIONS, Observer, Quantization, calibrated, expand, parent_outputs
from deployopt.stages._training import Distill, TrainingConfig, finish, load_parent, outputs, taught_by, train

if TYPE_CHECKING:
    from deployopt.nn.prepared import Prepared

__all__ = ["Config", "Distill", "after", "cacheable", "distributions", "expand", "from_scratch", "not_after", "run", "timed", "traces", "trains", "version"]

version = 7
not_after = frozenset({"qat", "ptq", "export", "build", "benchmark"})
after: frozenset[str] = frozenset()
cacheable = True
timed = False
trains = True
from_scratch = False
traces = True
distributions = DISTRIBUTIONS


class Config(TrainingConfig, Quantization):
    """Options of quantisation-aware training."""

    epochs: int = Field(default=2, ge=1, le=100_000)
    """Passes over the training split."""
    lr: float = Field(default=0.005, gt=0)
    """Peak learning rate: about a tenth of fine-tuning's."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Learning rate rises linearly from zero over these epochs."""
    keep: Literal["best", "last"] = "last"
    """Which epoch's weights to keep: the best on validation, or the last, at whose end BatchNorm and scales no longer moved."""
    observer: Observer = Field(default="moving_average", description=Quantization.model_fields["observer"].description)
    freeze_batchnorm_after: float = Field(default=0.5, ge=0, le=1)
    """Share of the training after which BatchNorm uses its running statistics, as the folded model will compute. 1 never freezes."""
    freeze_observers_after: float = Field(default=0.75, ge=0, le=1)
    """Share of the training after which activations' ranges stay. 0 keeps those of the calibration, 1 never freezes."""
    learn_scales: bool = False
    """Learn the scales of weights and activations with the weights (LSQ, https://arxiv.org/abs/1902.08153), from the observers' on: at the stage's
    learning rate, without weight decay. Observers and freeze_observers_after then concern only ranges that are recorded and quantise nothing."""
    distill: Distill | None = None
    """Distillation from the float parent; null trains on the targets alone."""


def run(context: StageContext, config: Config, expansion: Expansion, inputs: Sequence[StepOutput]) -> StepResult:
    from deployopt.nn.quantizer import fake_quantized

    check(context, config)
    network = load_parent(inputs, context.threads)
    prepared, reference = calibrated(context, config, network), parent_outputs(context, config, network)
    if config.learn_scales:
        prepared.learn_scales()
    history = train(
        context,
        prepared,
        config,
        before_step=lambda done: _freeze(prepared, config, done),
        **taught_by(network, config.distill),
    )
    prepared.write_back(network)
    facts: dict[str, Any] = {"validation": history.validation, "curves": history.records, "kept_epoch": history.epoch}
    facts["quantization"] = decide(context, config, network, reference)
    quantized = fake_quantized(network).to(context.device)
    if config.automatic is not None:
        facts["validation"] = context.task.score(outputs(context, quantized, "validation"), context.dataset().validation.targets)
    return finish(context, network, expansion.inputs[0].variant, "int8", scored=quantized, **facts)


def _freeze(prepared: Prepared, config: Config, done: float) -> None:
    if done >= config.freeze_batchnorm_after and not prepared.batchnorm_frozen:
        prepared.freeze_batchnorm()
    if done >= config.freeze_observers_after and not prepared.observers_frozen:
        prepared.freeze_observers()
