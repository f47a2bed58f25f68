"""How a network is trained: the options that finetune, prune's recovery and qat share. Torch-free, so that planning can read it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from deployopt.config import ForLoss, Strict


class Augment(Strict):
    """Random changes of training images. None of them is on by default: whether a flip keeps the meaning depends on the data (digits: no)."""

    crop_padding: int = Field(default=0, ge=0, le=64)
    """Pad by this many black pixels on every side and crop at a random place: shifts of up to that many pixels."""
    horizontal_flip: bool = False
    """Mirror every second image, at random."""
    resized_crop: float | None = Field(default=None, gt=0, le=1)
    """Cut a random part, of at least this share of the stored image's area and aspect 3:4 to 4:3, and resize it to the input (ImageNet: 0.08)."""

    @model_validator(mode="after")
    def _one_crop(self) -> Augment:
        if self.crop_padding and self.resized_crop is not None:
            raise ValueError("crop_padding and resized_crop exclude each other: remove one")
        return self


class TrainingConfig(Strict):
    """Options of a training phase."""

    epochs: int = Field(default=8, ge=1, le=100_000)
    """Passes over the training split."""
    batch_size: int = Field(default=64, ge=2, le=65_536)
    """Images a step. A last smaller batch is left out."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd with momentum, or adamw."""
    lr: float = Field(default=0.05, gt=0)
    """Peak learning rate."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of sgd; adamw's β₁."""
    nesterov: bool = True
    """Nesterov momentum (sgd)."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """On weights of convolutions and linear layers only; never on BatchNorm and biases."""
    warmup_epochs: float = Field(default=0.5, ge=0)
    """Learning rate rises linearly from zero over these epochs."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Learning rate after the warm-up: a half cosine down to zero, a tenth from each of the milestones on, or constant."""
    milestones: tuple[int, ...] = Field(default=(), strict=False)
    """Epochs after which the schedule `step` divides the learning rate by ten, rising."""
    label_smoothing: Annotated[float, ForLoss("cross_entropy")] = Field(default=0.0, ge=0, lt=1)
    """Of cross entropy."""
    clip_grad_norm: float | None = Field(default=None, gt=0)
    """Scale the gradient down to this L2 norm when it is larger; null does not."""
    augment: Augment = Augment()
    """Random changes of training images."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many epochs without a better validation score; null trains all epochs."""
    keep: Literal["best", "last"] = "best"
    """Which epoch's weights to keep: the best on validation (ties: the lower validation loss), or the last."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> TrainingConfig:
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs:g}) must be fewer than epochs ({self.epochs})")
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError(f"the schedule step and milestones belong together, found schedule {self.schedule} and milestones {list(self.milestones)}")
        if list(self.milestones) != sorted(set(self.milestones)) or not all(0 < m < self.epochs for m in self.milestones):
            raise ValueError(f"milestones rise and lie inside the {self.epochs} epochs, found {list(self.milestones)}")
        if self.nesterov and self.momentum == 0 and self.optimizer == "sgd":
            raise ValueError("nesterov needs momentum > 0: set nesterov: false")
        if self.optimizer == "adamw" and "nesterov" in self.model_fields_set:
            raise ValueError("nesterov is an option of sgd: remove it, or set optimizer: sgd")
        return self
