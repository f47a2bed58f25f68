"""Cut whole channels until the target is met, and train the rest to recover."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from deployopt.nn.schedule import TrainingConfig
from deployopt.stages import Expansion, Planning, StageConfig, StageContext, StepOutput, StepResult
from deployopt.stages._training import DISTRIBUTIONS, finish, load_parent, next_point

version = 1
not_after: frozenset[str] = frozenset({"qat", "ptq", "export", "build", "benchmark"})
after: frozenset[str] = frozenset()
cacheable = True
timed = False
distributions = (*DISTRIBUTIONS, "torch-pruning")


class Target(StageConfig):
    """How small the network has to be; exactly one of these."""

    macs_ratio: float | None = Field(default=None, gt=0, lt=1)
    """Share of the multiply-accumulates to keep: 0.4 keeps 40 %."""
    params_ratio: float | None = Field(default=None, gt=0, lt=1)
    """Share of the parameters to keep."""
    speedup: float | None = Field(default=None, gt=1)
    """Theoretical speed-up: 2.5 is macs_ratio 0.4."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Target:
        given = [name for name in ("macs_ratio", "params_ratio", "speedup") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of macs_ratio, params_ratio and speedup is wanted, found {', '.join(given) or 'none'}")
        return self

    @property
    def metric(self) -> Literal["macs", "params"]:
        return "params" if self.params_ratio is not None else "macs"

    @property
    def ratio(self) -> float:
        """Share of `metric` to keep."""
        return 1 / self.speedup if self.speedup is not None else (self.macs_ratio or self.params_ratio or 1.0)


class Recovery(TrainingConfig):
    """Training after pruning; half the learning rate of training from scratch, and half the epochs."""

    epochs: int = Field(default=4, ge=1, le=100_000)
    """Passes over the training split."""
    lr: float = Field(default=0.02, gt=0)
    """Peak learning rate."""
    warmup_epochs: float = Field(default=0.5, ge=0)
    """Learning rate rises linearly from zero over these epochs."""


class Config(StageConfig):
    """Structured pruning over Torch-Pruning's dependency graph."""

    target: Target = Target(macs_ratio=0.5)
    """How small the network has to be."""
    importance: Literal["group_magnitude", "group_magnitude_l1", "taylor", "bn_scale"] = "group_magnitude"
    """What a channel is worth: the L2 or L1 norm of all weights coupled to it, the loss's first-order change, or its BatchNorm scales."""
    importance_samples: int = Field(default=512, ge=1)
    """Training images whose gradients taylor uses."""
    across_layers: bool = Field(default=False, alias="global")
    """Rank all layers' channels together; otherwise each layer loses the same share of its channels."""
    iterations: int = Field(default=1, ge=1, le=100)
    """Reach the target in this many equal steps; importance is scored anew, and the recovery runs, after each."""
    round_to: int = Field(default=8, ge=1, le=256)
    """Keep a multiple of this many channels: INT8 and FP16 kernels are fastest on full vectors."""
    max_layer_ratio: float = Field(default=0.9, gt=0, lt=1)
    """No layer loses a larger share of its channels."""
    finetune: Recovery | None = Recovery()
    """Training after each iteration; null leaves the network as cut."""


def expand(config: Config, planning: Planning) -> list[Expansion]:
    return [Expansion((planning.trunk,), (next_point(planning, "float"),))]


def run(context: StageContext, config: Config, expansion: Expansion, inputs: Sequence[StepOutput]) -> StepResult:
    from deployopt.nn import macs, pruning, training

    network = load_parent(inputs, context.threads)
    dataset, task, metric = context.dataset(), context.task, config.target.metric
    whole = dict(zip(("params", "macs"), macs.count(network, network.input_shape), strict=True))
    curves: list[dict[str, Any]] = []
    validation: dict[str, float | int] = {}
    for iteration in range(1, config.iterations + 1):
        ratio = 1 - (1 - config.target.ratio) * iteration / config.iterations
        pruning.prune(
            network.cpu(),
            int(whole[metric] * ratio),
            metric=metric,
            criterion=config.importance,
            across_layers=config.across_layers,
            round_to=config.round_to,
            max_layer_ratio=config.max_layer_ratio,
            backward=pruning.gradients(dataset, task, config.importance_samples, context.seed),
        )
        if config.finetune is not None:
            phase = context.name if config.iterations == 1 else f"{context.name} {iteration}/{config.iterations}"
            history = training.fit(network, dataset, task, config.finetune, device=context.device, seed=context.seed, progress=context.progress, phase=phase)
            curves, validation = curves + history.records, history.validation
    reached = dict(zip(("params", "macs"), macs.count(network, network.input_shape), strict=True))
    facts = {"target": {metric: config.target.ratio}, "reached": {name: reached[name] / whole[name] for name in reached}}
    return finish(context, network, expansion.inputs[0].variant, "float", curves=curves, validation=validation, pruning=facts)
