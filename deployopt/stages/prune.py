"""Cut whole channels until the target is met, and train the rest to recover."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from deployopt.nn.schedule import TrainingConfig
from deployopt.runtime import host
from deployopt.stages import Expansion, Planning, StageConfig, StageContext, StepOutput, StepResult
from deployopt.stages._alignment import fastest
from deployopt.stages._training import DISTRIBUTIONS, finish, load_parent, next_point

if TYPE_CHECKING:
    from deployopt.nn.models import Network

version = 1
not_after: frozenset[str] = frozenset({"qat", "ptq", "export", "build", "benchmark"})
after: frozenset[str] = frozenset()
cacheable = True
timed = False
trains = True
from_scratch = False
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
    round_to: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = 8
    """Keep a multiple of this many channels: INT8 and FP16 kernels are fastest on full vectors. auto times 1, 4, 8 and 16 on ONNX Runtime and takes the
    fastest; the choice is stored and reused when the run is resumed."""
    max_layer_ratio: float = Field(default=0.9, gt=0, lt=1)
    """No layer loses a larger share of its channels."""
    finetune: Recovery | None = Recovery()
    """Training after each iteration; null leaves the network as cut."""

    @model_validator(mode="after")
    def _samples_are_used(self) -> Config:
        if self.importance != "taylor" and "importance_samples" in self.model_fields_set:
            raise ValueError(f"importance_samples is an option of taylor, found importance {self.importance}: remove it, or set importance: taylor")
        return self


def expand(config: Config, planning: Planning) -> list[Expansion]:
    timed = {"machine": host.timing_facts()} if config.round_to == "auto" else {}
    return [Expansion((planning.trunk,), (next_point(planning, "float"),), parameters=timed)]


def run(context: StageContext, config: Config, expansion: Expansion, inputs: Sequence[StepOutput]) -> StepResult:
    from deployopt.nn import macs, pruning, training

    network = load_parent(inputs, context.threads)
    dataset, task, metric = context.dataset(), context.task, config.target.metric
    whole = dict(zip(("params", "macs"), macs.count(network, network.input_shape), strict=True))
    alignment: dict[str, Any] = {"round_to": config.round_to}

    def cut(subject: Network, ratio: float, round_to: int) -> None:
        pruning.prune(
            subject,
            int(whole[metric] * ratio),
            metric=metric,
            criterion=config.importance,
            across_layers=config.across_layers,
            round_to=round_to,
            max_layer_ratio=config.max_layer_ratio,
            backward=pruning.gradients(dataset, task, config.importance_samples, context.seed),
            progress=context.progress,
        )

    if config.round_to == "auto":
        alignment = context.choices.get_or_make(
            "alignment", lambda: fastest(context, network, lambda trial, round_to: cut(trial, config.target.ratio, round_to))
        )
    curves: list[dict[str, Any]] = []
    validation: dict[str, float | int] = {}
    for iteration in range(1, config.iterations + 1):
        ratio = 1 - (1 - config.target.ratio) * iteration / config.iterations
        cut(network.cpu(), ratio, alignment["round_to"])
        if config.finetune is not None:
            phase = context.name if config.iterations == 1 else f"{context.name} {iteration}/{config.iterations}"
            history = training.fit(network, dataset, task, config.finetune, device=context.device, seed=context.seed, progress=context.progress, phase=phase)
            curves, validation = curves + history.records, history.validation
    reached = dict(zip(("params", "macs"), macs.count(network, network.input_shape), strict=True))
    facts = {"target": {metric: config.target.ratio}, "reached": {name: reached[name] / whole[name] for name in reached}, "alignment": alignment}
    return finish(context, network, expansion.inputs[0].variant, "float", curves=curves, validation=validation, pruning=facts)
