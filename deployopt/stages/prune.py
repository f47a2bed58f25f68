"""Cut whole channels until the target is met, and train the rest to recover."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from deployopt.errors import DeployoptError, PruningImpossible
from deployopt.nn.schedule import TrainingConfig
from deployopt.stages import Expansion, Planning, StageConfig, StageContext, StepOutput, StepResult
from deployopt.stages._latency import CONFIRMING_LIFETIMES, Search, Timing, fastest
from deployopt.stages._timing import TimedOn, key_parts
from deployopt.stages._training import DISTRIBUTIONS, Distill, finish, load_parent, next_point, taught_by, train

if TYPE_CHECKING:
    from deployopt.nn.models import Network
    from deployopt.nn.pruning import Cuts, Metric

version = 8
not_after: frozenset[str] = frozenset({"qat", "ptq", "export", "build", "benchmark"})
after: frozenset[str] = frozenset()
cacheable = True
timed = False  # only some configs are; `expand` then names the machine and the runtime
trains = True
from_scratch = False
distributions = (*DISTRIBUTIONS, "torch-pruning")


class Latency(TimedOn):
    """A latency to reach, searched by measuring candidates; either `ratio` or `ms`. Candidates are timed in FP32, also where an INT8 stage follows:
    `budget` judges what is shipped."""

    ratio: float | None = Field(default=None, gt=0, lt=1)
    """Share of the network's latency to keep, FP32 against FP32: 0.5 is twice as fast."""
    ms: float | None = Field(default=None, gt=0)
    """Median latency in milliseconds, in FP32."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Latency:
        if (self.ratio is None) == (self.ms is None):
            raise ValueError(f"exactly one of ratio and ms is wanted, found {'neither' if self.ratio is None else 'both'}")
        return self


class Target(StageConfig):
    """How small the network has to be; exactly one of these."""

    macs_ratio: float | None = Field(default=None, gt=0, lt=1)
    """Share of the multiply-accumulates to keep: 0.4 keeps 40 %."""
    params_ratio: float | None = Field(default=None, gt=0, lt=1)
    """Share of the parameters to keep."""
    speedup: float | None = Field(default=None, gt=1)
    """Theoretical speed-up: 2.5 is macs_ratio 0.4."""
    latency: Latency | None = None
    """FP32 latency measured on a backend."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Target:
        given = [name for name in ("macs_ratio", "params_ratio", "speedup", "latency") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of macs_ratio, params_ratio, speedup and latency is wanted, found {', '.join(given) or 'none'}")
        return self

    @property
    def metric(self) -> Metric:
        return "params" if self.params_ratio is not None else "macs"

    @property
    def ratio(self) -> float:
        """Share of `metric` to keep, where latency is not the target."""
        return 1 / self.speedup if self.speedup is not None else (self.macs_ratio or self.params_ratio or 1.0)


class Recovery(TrainingConfig):
    """Training after pruning: a lower learning rate and fewer epochs than training from scratch."""

    epochs: int = Field(default=4, ge=1, le=100_000)
    """Passes over the training split."""
    lr: float = Field(default=0.02, gt=0)
    """Peak learning rate."""
    warmup_epochs: float = Field(default=0.5, ge=0)
    """Learning rate rises linearly from zero over these epochs."""
    distill: Distill | None = None
    """Distillation from the network before it was cut; null trains on the targets alone."""


class Sparse(TrainingConfig):
    """Group-sparse training before the cut (DepGraph's group-SL): unimportant channels are pulled towards zero, all their coupled weights together."""

    epochs: int = Field(default=8, ge=1, le=100_000)
    """Passes over the training split."""
    lr: float = Field(default=0.01, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """On weights of convolutions and linear layers only; the regulariser takes its place."""
    keep: Literal["best", "last"] = "last"
    """Which epoch's weights to keep: the last ones are the sparsest."""
    strength: float = Field(default=5e-4, gt=0)
    """Of the regulariser: what the most important channel's weights are pulled with."""
    alpha: float = Field(default=4.0, ge=0)
    """The least important channel is pulled 2^alpha times as hard as the most important one."""


class Sensitivity(StageConfig):
    """The validation score after cutting each group of channels alone, without training: a table and a plot in the report."""

    ratios: tuple[float, ...] = Field(default=(0.25, 0.5, 0.75), min_length=1, strict=False)
    """Shares of a group's channels to cut, rising."""
    images: int = Field(default=1024, ge=1)
    """Validation images to score on."""

    @field_validator("ratios")
    @classmethod
    def _rising_shares(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        if list(ratios) != sorted(set(ratios)) or not all(0 < r < 1 for r in ratios):
            raise ValueError(f"ratios rise and lie between 0 and 1, found {list(ratios)}")
        return ratios


class Config(StageConfig):
    """Structured pruning over Torch-Pruning's dependency graph."""

    target: Target = Target(macs_ratio=0.5)
    """How small the network has to be."""
    importance: Literal["group_magnitude", "group_magnitude_l1", "taylor", "bn_scale"] = "group_magnitude"
    """What a channel is worth: the L2 or L1 norm of all weights coupled to it, the loss's first-order change, or its BatchNorm scales."""
    importance_samples: int = Field(default=512, ge=1)
    """Training images whose gradients taylor uses."""
    normalizer: Literal["mean", "max"] = "mean"
    """Scores of a layer's channels are divided by their mean or their maximum before all layers are ranked together."""
    across_layers: bool = Field(default=False, alias="global")
    """Rank all layers' channels together; otherwise each layer loses the share that `ratios` says."""
    ratios: Literal["uniform", "sensitivity"] = "uniform"
    """Each layer loses the same share of its channels, or such a share that each loses the same validation score by itself."""
    sensitivity: Sensitivity | None = None
    """Measure and report each layer's sensitivity; null does so, with the defaults, only where `ratios` needs it."""
    sparse: Sparse | None = None
    """Group-sparse training before the first cut; null cuts the network as it is."""
    iterations: int = Field(default=1, ge=1, le=1000)
    """Reach the target in this many equal steps; importance is scored anew for each."""
    between: Recovery | Literal["finetune"] | None = "finetune"
    """Training after each iteration but the last: as `finetune`, with options of its own, or null for none."""
    round_to: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = 8
    """Keep a multiple of this many channels: INT8 and FP16 kernels are fastest on full vectors. auto times 1, 4, 8 and 16, as
    FP32 networks in several processes each, and takes the largest that is not shown to be slower than the fastest; the choice is stored and reused when
    the run is resumed."""
    max_layer_ratio: float = Field(default=0.9, gt=0, lt=1)
    """No layer loses a larger share of its channels in an iteration."""
    timed_on: TimedOn | None = None
    """Where `round_to: auto` and `if_not_faster` time; null: where target.latency does, else ONNX Runtime at batch 1."""
    if_not_faster: Literal["warn", "refuse", "ignore"] = "warn"
    """What to do if the cut network, timed in FP32 before its recovery, is not faster than the uncut one: the 95 % interval of the latency ratio reaches
    1. warn notes it in the report; refuse fails, after several more processes of both said so too; ignore does not time."""
    finetune: Recovery | None = Recovery()
    """Training after the last iteration; null leaves the network as cut."""

    @model_validator(mode="after")
    def _options_belong_together(self) -> Config:
        given, faults = self.model_fields_set, []
        if self.importance != "taylor" and "importance_samples" in given:
            faults.append(f"importance_samples is an option of taylor, found importance {self.importance}: remove it, or set importance: taylor")
        if self.across_layers and self.ratios == "sensitivity":
            faults.append("global: true ranks all channels together and leaves ratios: sensitivity nothing to say: remove one")
        if not self.across_layers and "normalizer" in given:
            faults.append("normalizer makes layers comparable and is an option of global: true: remove it, or set global: true")
        if self.iterations == 1 and "between" in given:
            faults.append("between trains between iterations, found iterations 1: remove it, or raise iterations")
        if self.target.latency is not None and self.timed_on is not None:
            faults.append("timed_on and target.latency both say where to time: remove timed_on")
        if self.timed_on is not None and not self.is_timed:
            faults.append("timed_on is given and nothing is timed: remove it, or set if_not_faster: warn")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def is_decided_by_timing(self) -> bool:
        """Whether the network, or whether there is one, depends on this machine's speed; a warning alone changes no weight."""
        return self.target.latency is not None or self.round_to == "auto" or self.if_not_faster == "refuse"

    @property
    def is_timed(self) -> bool:
        return self.is_decided_by_timing or self.if_not_faster == "warn"

    @property
    def where(self) -> TimedOn:
        return self.target.latency or self.timed_on or TimedOn()


def expand(config: Config, planning: Planning) -> list[Expansion]:
    timed = key_parts(config.where) if config.is_decided_by_timing and planning.here else {}
    return [Expansion((planning.trunk,), (next_point(planning, "float"),), parameters=timed)]


def run(context: StageContext, config: Config, expansion: Expansion, inputs: Sequence[StepOutput]) -> StepResult:
    """Train sparsely, cut step by step, and train after each cut, as the config says.

    Raises:
        PruningImpossible: no candidate meets the target, or the result is not faster and that is refused.
        BackendUnavailable: latency decides and cannot be measured here; raised before anything is trained.
    """
    from deployopt.nn import macs, parametrizations

    network = load_parent(inputs, context.threads)
    plain = parametrizations.remove(network)
    whole = dict(zip(("params", "macs"), macs.count(network, network.input_shape), strict=True))
    with Timing(context, copy.deepcopy(network), config.where) if config.is_timed else nullcontext() as timing:
        work = _Pruning(context, config, network, timing)
        work.check()
        work.train_sparsely()
        for iteration in range(1, config.iterations + 1):
            work.cut(iteration)
            if iteration == config.iterations:
                work.compare_with_parent()
            work.recover(iteration)
    reached = dict(zip(("params", "macs"), macs.count(network, network.input_shape), strict=True))
    facts = {**work.facts, "parametrizations_removed": plain, "reached": {name: reached[name] / whole[name] for name in reached}}
    return finish(context, network, expansion.inputs[0].variant, "float", curves=work.curves, validation=work.validation, pruning=facts)


class _Pruning:
    """One run of the stage: the network in the making and what is told of it.

    Attributes:
        facts: the record's "pruning".
        curves, validation: of the trainings.
    """

    def __init__(self, context: StageContext, config: Config, network: Network, timing: Timing | None) -> None:
        self._context, self._config, self._network, self._timing = context, config, network, timing
        self._whole: dict[Metric, int] = {}
        self._alignment: int | None = None if config.round_to == "auto" else config.round_to
        self._latency: dict[str, Any] | None = None
        self._uncut = copy.deepcopy(network)
        self._parent_ms = 0.0  # of the uncut network, where latency.ms is the target
        self.curves: list[dict[str, Any]] = []
        self.validation: dict[str, float | int] = {}
        target = config.target.latency
        shown = {config.target.metric: config.target.ratio} if target is None else {"latency": target.model_dump(exclude_none=True)}
        self.facts: dict[str, Any] = {"target": shown, "alignment": {"round_to": config.round_to}}

    def check(self) -> None:
        """Fail before training if timing must decide and cannot, or if there is nothing to cut for the latency wanted."""
        if self._timing is None:
            return
        keys = {
            f"{self._context.name}.target.latency.backend": self._config.target.latency is not None,
            f"{self._context.name}.timed_on.backend": self._config.round_to == "auto" or self._config.if_not_faster == "refuse",
        }
        for key, needed in keys.items():
            if needed:
                self._timing.require(key)
        target = self._config.target.latency
        if target is None or target.ms is None:
            return
        self._parent_ms = self._context.choices.get_or_make("parent latency", self._timing.parent_ms)
        if self._parent_ms <= target.ms:
            raise PruningImpossible(
                f"wanted {self._context.name}.target.latency.ms {target.ms:.3g} on {target.backend} at batch {target.batch}, which the uncut network already "
                f"meets: its p50 in FP32 is {self._parent_ms:.3g} ms",
                "lower ms, or leave the stage out; --fresh times it anew",
            )

    def train_sparsely(self) -> None:
        from deployopt.nn import pruning, sparsity

        config = self._config.sparse
        if config is None:
            return
        groups = pruning.survey(self._network, pruning.Rules()).groups
        before = sparsity.small_share(self._network, groups)
        self._network.to(self._context.device)
        regularizer = sparsity.GroupSparsity(self._network, groups, config.strength, config.alpha)
        self._train(config, f"{self._context.name} sparse", after_backward=regularizer)
        after = sparsity.small_share(self._network, groups)
        self.facts["sparse"] = {"strength": config.strength, "alpha": config.alpha, "small_channels": {"before": before, "after": after}}

    def cut(self, iteration: int) -> None:
        """Bring the network `iteration / iterations` of the way to the target."""
        from deployopt.nn import pruning

        context, config = self._context, self._config
        self._network.cpu()
        rules = pruning.Rules(config.importance, config.normalizer, config.across_layers, self._alignment or 1, config.max_layer_ratio)
        samples = pruning.gradients(context.dataset(), context.task, config.importance_samples, context.seed)
        cuts = self._with_shares(pruning.survey(self._network, rules, backward=samples, progress=context.progress), iteration)
        if not self._whole:
            self._whole = cuts.cost([g.size for g in cuts.groups])
        part = iteration / config.iterations
        if self._alignment is None:
            self._alignment = self._choose_alignment(cuts)
            cuts = cuts.with_rules(round_to=self._alignment)
        if config.target.latency is None:
            kept = self._within(cuts, 1 - (1 - config.target.ratio) * part)
        else:
            kept = self._search(cuts, config.target.latency, iteration)
        self._tell_whole(cuts, kept)
        cuts.apply(self._network, kept)

    def _tell_whole(self, cuts: Cuts, kept: list[int]) -> None:
        """Record which groups no iteration has cut so far."""
        found = [asdict(whole) for whole in cuts.left_whole(kept)]
        earlier = {whole["name"] for whole in self.facts.get("whole", {"left": found})["left"]}
        self.facts["whole"] = {"groups": len(cuts.groups) + len(cuts.excluded), "left": [whole for whole in found if whole["name"] in earlier]}

    def _within(self, cuts: Cuts, ratio: float) -> list[int]:
        metric, stage = self._config.target.metric, self._context.name
        try:
            return cuts.within(int(self._whole[metric] * ratio), metric, self._context.progress)
        except PruningImpossible as exc:
            option, easier = ("speedup", "lower") if self._config.target.speedup is not None else (f"{metric}_ratio", "raise")
            remedy = f"{easier} {stage}.target.{option}, raise {stage}.max_layer_ratio, or lower {stage}.round_to"
            raise PruningImpossible(f"{stage}.target.{option}: {exc.message}", remedy) from exc

    def _with_shares(self, cuts: Cuts, iteration: int) -> Cuts:
        from deployopt.data import Leading
        from deployopt.nn import group_sensitivity

        context, config = self._context, self._config
        wanted = config.ratios == "sensitivity"
        if not wanted and (config.sensitivity is None or iteration > 1):
            return cuts
        options = config.sensitivity or Sensitivity()
        images = Leading(context.dataset().validation, options.images)
        found = group_sensitivity.scan(self._network, cuts, images, context.task, options.ratios, device=context.device, progress=context.progress)
        self.facts.setdefault("sensitivity", found)
        if not wanted:
            return cuts
        return cuts.with_shares(group_sensitivity.shares(found, higher_is_better=context.task.higher_is_better, max_layer_ratio=config.max_layer_ratio))

    def _choose_alignment(self, cuts: Cuts) -> int:
        assert self._timing is not None
        timing, latency = self._timing, self._config.target.latency

        def choose() -> dict[str, Any]:
            ratio = self._config.target.ratio
            if latency is not None:  # about as small as it will have to be
                ratio = latency.ratio or (latency.ms or 0) / self._parent_ms
            first = 1 - (1 - ratio) / self._config.iterations
            if latency is not None:  # MACs only estimate it: what they say is out of reach may not be
                return fastest(timing, self._network, cuts, lambda aligned: aligned.nearest(int(self._whole["macs"] * first), self._context.progress))
            return fastest(timing, self._network, cuts, lambda aligned: self._within(aligned, first))

        self.facts["alignment"] = self._context.choices.get_or_make("alignment", choose)
        return int(self.facts["alignment"]["round_to"])

    def _search(self, cuts: Cuts, target: Latency, iteration: int) -> list[int]:
        """Widths by measured latency; each iteration goes an equal part of the way from the parent's latency."""
        assert self._timing is not None
        timing, context = self._timing, self._context

        def search() -> dict[str, Any]:
            parent = 1.0 if target.ratio is not None else self._parent_ms
            whole = parent if self._latency is None else self._latency["reached"]["ratio" if target.ratio is not None else "ms"]
            goal = parent - (parent - (target.ratio or target.ms or 0.0)) * iteration / self._config.iterations
            metric: Literal["ratio", "ms"] = "ms" if target.ratio is None else "ratio"
            search = Search(timing, self._network, cuts, metric, goal, whole, stage=context.name, parent_macs=self._whole["macs"])
            found = search.run(context.progress)
            return {"iteration": iteration, "goal": goal, **found}

        self._latency = context.choices.get_or_make(f"latency {iteration}", search)
        self.facts.setdefault("latency", []).append({k: v for k, v in self._latency.items() if k != "kept"})
        return [self._latency["kept"][g.name] for g in cuts.groups]

    def compare_with_parent(self) -> None:
        """Time the cut network against the uncut one, unless that is ignored; tell, warn or refuse."""
        from deployopt.report import pruning as report

        timing, config, context = self._timing, self._config, self._context
        if timing is None or config.if_not_faster == "ignore":
            return
        refuse = config.if_not_faster == "refuse"

        def measure() -> dict[str, Any]:
            where = {"backend": timing.backend, "batch": timing.batch}
            if self._latency is not None:
                return {**where, **self._latency["reached"]}
            reason = timing.unavailable()
            if reason is not None:
                return {**where, "reason": reason}
            try:
                reading = timing.compare({"cut": self._network})["cut"]
                if reading.invalid or (refuse and not report.is_faster(asdict(reading))):  # disturbed, or the bad luck of one process: once more, in more
                    reading = timing.compare({"cut": self._network}, CONFIRMING_LIFETIMES)["cut"]
                return {**where, **asdict(reading)}
            except DeployoptError as error:
                if refuse:
                    raise
                return {**where, "reason": error.message.splitlines()[0]}

        found = self.facts["against_parent"] = context.choices.get_or_make("against parent", measure)
        told, warning = f"{context.name}: {report.against_parent(found)}", report.warning(self.facts)
        if refuse and warning is not None:
            remedy = f"choose a smaller target, another round_to, a target in latency, or {context.name}.if_not_faster: warn; --fresh times it anew"
            raise PruningImpossible(told, remedy)
        context.progress.log(told if warning is None else f"warning: {told}")

    def recover(self, iteration: int) -> None:
        config = self._config
        schedule = config.finetune if iteration == config.iterations or config.between == "finetune" else config.between
        if schedule is not None:
            phase = self._context.name if config.iterations == 1 else f"{self._context.name} {iteration}/{config.iterations}"
            self._train(schedule, phase, **taught_by(self._uncut, schedule.distill))

    def _train(self, schedule: TrainingConfig, phase: str, **more: Any) -> None:
        history = train(self._context, self._network, schedule, phase, **more)
        self.curves += history.records
        self.validation = history.validation
