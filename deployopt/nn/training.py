"""The one training loop: finetune, prune's recovery and qat all train here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deployopt.data import Dataset
from deployopt.errors import TrainingDiverged, UsageError
from deployopt.nn import augment, distributed, evaluate, losses
from deployopt.nn.schedule import TrainingConfig
from deployopt.nn.weight_gradient import SmallMapGradients
from deployopt.runtime.preprocessing import to_feed
from deployopt.runtime.progress import Bar, Progress, SilentProgress
from deployopt.tasks import Task

SMALLEST_SHARE = 2  # images; `TrainingConfig.batch_size` asks the same of one process


@dataclass
class History:
    """How a training went.

    Attributes:
        records: one an epoch: {"phase", "epoch" (from 1), "train_loss", "validation_loss", "validation_<primary>", "lr" (at its end)}.
        epoch: whose weights the module now has.
        validation: the task's scores of those weights on the validation split.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    epoch: int = 0
    validation: dict[str, float | int] = field(default_factory=dict)


def set_training_mode(module: nn.Module, training: bool) -> None:
    """The usual switch. An exported GraphModule needs another one: give `fit` that."""
    module.train(training)


def memory_layout(module: nn.Module, device: str) -> torch.memory_format:
    """How images and weights lie in memory while training: channels last, in which a step of ResNet-18 on a CPU takes a fraction of its time in NCHW.

    NCHW on CPUs for a network with a 1×1 kernel over fewer than 8 channels, as pruning may leave one: if it strides, oneDNN's gradient of its input writes
    beyond its buffer in channels last (PyTorch 2.15 on AVX2; a loop over `Conv2d(6, 8, 1, stride=2)` ends in "free(): invalid next size").
    """
    risky = any(p.ndim == 4 and p.shape[1] < 8 and p.shape[2:] == (1, 1) for p in module.parameters())
    return torch.contiguous_format if risky and device == "cpu" else torch.channels_last


def fit(
    module: nn.Module,
    dataset: Dataset,
    task: Task,
    schedule: TrainingConfig,
    *,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    phase: str = "finetune",
    loss: losses.Loss | None = None,
    teacher: nn.Module | None = None,
    distillation: losses.Distillation | None = None,
    before_step: Callable[[float], None] | None = None,
    after_backward: Callable[[], None] | None = None,
    set_mode: Callable[[nn.Module, bool], None] = set_training_mode,
) -> History:
    """Train `module` in place and leave it on `device` in evaluation mode, with the weights of the epoch that `schedule.keep` says.

    On CPU with the same number of threads a repeated call gives bit-identical weights: order and augmentation come from `seed`. Processes that
    have joined (`nn.distributed`) train together: each takes its share of every batch, and all end with the same weights and the same history.

    Args:
        module: float32 [N, C, H, W] in 0–1 → [N, K].
        loss: of (outputs, targets); None is the task's.
        teacher: a float network whose outputs are distilled as `distillation` says.
        before_step: called before each optimizer step with the share of the schedule's steps that is done, from 0.
        after_backward: called in each step when the gradients are there, before they are clipped and used; it may change them.

    Raises:
        UsageError: label smoothing of a loss that has none; a batch too small for the processes that share it.
        TrainingDiverged: the loss became NaN or infinite.
    """
    loss = loss or losses.by_name(task.loss, schedule.label_smoothing)
    trainer = _Trainer(module, dataset, task, schedule, device, loss, teacher, distillation, set_mode, before_step, after_backward)
    random = np.random.Generator(np.random.PCG64([seed, *phase.encode()]))
    best = _Best(task.higher_is_better)
    history = History()
    with torch.random.fork_rng(devices=[]), (progress or SilentProgress()).track(phase, schedule.epochs * trainer.steps) as bar:
        torch.manual_seed(seed + distributed.rank())  # for modules that draw themselves, as dropout
        for epoch in range(1, schedule.epochs + 1):
            train_loss, lr = trainer.epoch(epoch, random, bar)
            validation_loss, scores = trainer.validate(bar)
            primary = scores[task.primary]
            record = {"phase": phase, "epoch": epoch, "train_loss": train_loss, "validation_loss": validation_loss, f"validation_{task.primary}": primary}
            history.records.append({**record, "lr": lr})
            improved = best.improves(primary, validation_loss)
            if improved or schedule.keep == "last":
                history.epoch, history.validation = epoch, scores
            if improved:
                best.take(module if schedule.keep == "best" else None, epoch, primary, validation_loss)
            elif schedule.patience is not None and epoch - best.epoch >= schedule.patience:
                break
    best.restore(module)
    set_mode(module, False)
    return history


class _Trainer:
    """One module with its optimizer and its place in the learning-rate schedule."""

    def __init__(
        self,
        module: nn.Module,
        dataset: Dataset,
        task: Task,
        schedule: TrainingConfig,
        device: str,
        loss: losses.Loss,
        teacher: nn.Module | None,
        distillation: losses.Distillation | None,
        set_mode: Callable[[nn.Module, bool], None],
        before_step: Callable[[float], None] | None,
        after_backward: Callable[[], None] | None,
    ) -> None:
        self.module, self.dataset, self.task, self.schedule, self.device = module, dataset, task, schedule, device
        self.loss, self.set_mode, self.before_step, self.after_backward = loss, set_mode, before_step, after_backward
        self.layout = memory_layout(module, device)
        module.to(device).to(memory_format=self.layout)
        self.teacher = None if teacher is None else teacher.to(device).eval()
        self.distillation = distillation or losses.Distillation()
        self.steps = max(1, len(dataset.train) // schedule.batch_size)
        self.batch = min(len(dataset.train), schedule.batch_size)
        _check_share(self.batch)
        self.replica = distributed.replica(module)
        self.optimizer = _optimizer(module, schedule)
        self.targets = torch.from_numpy(dataset.train.targets)
        self.step = 0

    def epoch(self, epoch: int, random: np.random.Generator, bar: Bar) -> tuple[float, float]:
        """(mean loss, last learning rate) of one pass."""
        self.set_mode(self.module, True)
        total, lr = 0.0, 0.0
        for feed, targets in self._batches(random):
            if self.before_step is not None:
                self.before_step(self.step / (self.steps * self.schedule.epochs))
            lr = learning_rate(self.schedule, self.step, self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            value = self._update(feed, targets)
            self.step += 1
            if not math.isfinite(value):
                raise TrainingDiverged(
                    f"the loss became {value} in epoch {epoch}, step {self.step} of {self.steps * self.schedule.epochs}, at learning rate {lr:.3g}",
                    "lower lr, raise warmup_epochs, or set clip_grad_norm: 1.0",
                )
            total += value
            bar.advance(1, f"loss {value:.2f}")
        return total / self.steps, lr

    def _batches(self, random: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.dataset.preprocessing.image_size
        for images, indices in augment.batches(self.dataset.train, self.schedule.batch_size, self.schedule.augment, size, random):
            feed = torch.from_numpy(to_feed(images)).to(self.device, memory_format=self.layout)
            yield feed, self.targets[torch.from_numpy(indices)].to(self.device)

    def _update(self, feed: Tensor, targets: Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        with SmallMapGradients():
            outputs = self.replica(feed)
        loss = self.loss(outputs, targets)
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(feed)
            weight = self.distillation.weight
            loss = (1 - weight) * loss + weight * self.distillation.distance(self.task.loss, outputs, taught)
        loss = loss * (len(feed) * distributed.world_size() / self.batch)  # shares may differ by one image; their average is the batch's mean
        loss.backward()  # type: ignore[no-untyped-call]
        if self.after_backward is not None:
            self.after_backward()
        if self.schedule.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.schedule.clip_grad_norm)
        self.optimizer.step()
        return distributed.mean(float(loss.detach()))

    def validate(self, bar: Bar) -> tuple[float, dict[str, float | int]]:
        """(plain task loss, scores) on the validation split."""
        distributed.share_buffers(self.module)
        self.set_mode(self.module, False)
        outputs = evaluate.outputs(self.module, self.dataset.validation, device=self.device, on_batch=lambda images: bar.advance(0, "validating"))
        targets = self.dataset.validation.targets
        if not np.isfinite(outputs).all():
            raise TrainingDiverged(f"outputs on the validation split became NaN or infinite after step {self.step}", "lower lr, or set clip_grad_norm: 1.0")
        loss = losses.by_name(self.task.loss)(torch.from_numpy(outputs), torch.from_numpy(targets))
        return float(loss), self.task.score(outputs, targets)


def _check_share(batch: int) -> None:
    processes = distributed.world_size()
    if batch < SMALLEST_SHARE * processes:
        raise UsageError(
            f"{processes} processes need batches of at least {SMALLEST_SHARE * processes} images, {SMALLEST_SHARE} each for BatchNorm; found {batch}",
            f"raise batch_size, or --nproc {max(1, batch // SMALLEST_SHARE)}",
        )


class _Best:
    """The best epoch so far, and its weights if they are wanted."""

    def __init__(self, higher_is_better: bool) -> None:
        self.sign = 1 if higher_is_better else -1
        self.epoch = 0
        self.rank = (-math.inf, -math.inf)
        self.state: dict[str, Tensor] | None = None

    def improves(self, primary: float, loss: float) -> bool:
        return (self.sign * primary, -loss) > self.rank

    def take(self, module: nn.Module | None, epoch: int, primary: float, loss: float) -> None:
        self.epoch, self.rank = epoch, (self.sign * primary, -loss)
        self.state = None if module is None else copy.deepcopy(module.state_dict())

    def restore(self, module: nn.Module) -> None:
        if self.state is not None:
            module.load_state_dict(self.state)


def learning_rate(schedule: TrainingConfig, step: int, steps_per_epoch: int) -> float:
    """Of optimizer step `step`, from 0: linear warm-up, then a half cosine to zero (https://arxiv.org/abs/1608.03983), tenths, or constant."""
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return schedule.lr * (step + 1) / warmup
    if schedule.schedule == "constant":
        return schedule.lr
    if schedule.schedule == "step":
        return schedule.lr * 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in schedule.milestones)
    total = schedule.epochs * steps_per_epoch
    return schedule.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def _optimizer(module: nn.Module, schedule: TrainingConfig) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=schedule.lr, momentum=schedule.momentum, nesterov=schedule.nesterov)
    return torch.optim.AdamW(groups, lr=schedule.lr, betas=(schedule.momentum, 0.999))
