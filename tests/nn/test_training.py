"""The training loop on three colours: it learns, repeats bit for bit, and keeps what it was told to keep."""

import math
from collections.abc import Iterator

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from deployopt.data import Dataset
from deployopt.errors import TrainingDiverged
from deployopt.nn import evaluate, losses, training
from deployopt.nn.schedule import Augment, TrainingConfig
from deployopt.tasks import classification, regression


class Small(nn.Module):
    """A convolution, BatchNorm, dropout and a linear head: [N, 3, 8, 8] → [N, outputs]."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


def small(outputs: int = 3) -> Small:
    torch.manual_seed(0)
    return Small(outputs)


def schedule(**options: object) -> TrainingConfig:
    return TrainingConfig.model_validate({"epochs": 4, "batch_size": 16, "lr": 0.1, "warmup_epochs": 1.0, **options})


def test_it_learns_and_records_every_epoch(colours: Dataset) -> None:
    net = small()
    history = training.fit(net, colours, classification, schedule(), phase="finetune")
    assert [r["epoch"] for r in history.records] == [1, 2, 3, 4]
    assert set(history.records[0]) == {"phase", "epoch", "train_loss", "validation_loss", "validation_top1", "lr"}
    assert history.records[-1]["train_loss"] < 0.5 * history.records[0]["train_loss"]
    assert history.validation["top1"] > 0.9
    assert not net.training
    assert classification.score(evaluate.outputs(net, colours.validation), colours.validation.targets) == history.validation


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"augment": {"crop_padding": 1, "horizontal_flip": True}},
        {"augment": {"resized_crop": 0.3}, "optimizer": "adamw", "lr": 0.01},
        {"clip_grad_norm": 0.5},
    ],
)
def test_a_repeated_training_gives_the_same_bits_and_leaves_the_global_generator_alone(colours: Dataset, options: dict[str, object]) -> None:
    states = []
    for noise in (1, 2):
        net = small()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        training.fit(net, colours, classification, schedule(epochs=2, **options), seed=5)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(net.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    other = small()
    training.fit(other, colours, classification, schedule(epochs=2, **options), seed=6)
    assert not torch.equal(other.conv.weight, states[0]["conv.weight"])


def test_regression_trains_with_its_own_loss(shades: Dataset) -> None:
    net = small(outputs=2)
    history = training.fit(net, shades, regression, schedule(epochs=6))
    best = min(history.records, key=lambda r: r["validation_mae"])
    assert history.epoch == best["epoch"]
    assert history.validation["mae"] == best["validation_mae"] < 0.5 * history.records[0]["validation_mae"] + 0.05


class Fading(nn.Module):
    """Right at first; from the third epoch on its outputs are turned round."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1))
        self.register_buffer("sign", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * self.scale * self.sign * 10

    def turn(self, done: float, epochs: int) -> None:
        self.sign.fill_(1.0 if done < 2 / epochs else -1.0)


def test_the_best_epochs_weights_are_kept_or_the_last(colours: Dataset) -> None:
    best, last = Fading(), Fading()
    kept = training.fit(best, colours, classification, schedule(epochs=5, lr=1e-6), before_step=lambda done: best.turn(done, 5))
    assert kept.epoch <= 2
    assert (kept.validation["top1"], float(best.sign)) == (1.0, 1.0)
    end = training.fit(last, colours, classification, schedule(epochs=5, lr=1e-6, keep="last"), before_step=lambda done: last.turn(done, 5))
    assert (end.epoch, float(last.sign)) == (5, -1.0)
    assert end.validation["top1"] < 0.5


def test_patience_ends_a_training_that_no_longer_improves(colours: Dataset) -> None:
    net = Fading()
    history = training.fit(net, colours, classification, schedule(epochs=10, lr=1e-6, patience=2), before_step=lambda done: net.turn(done, 10))
    assert len(history.records) == history.epoch + 2
    assert float(net.sign) == 1.0


def test_a_diverged_loss_says_where_and_what_to_do(colours: Dataset) -> None:
    net = small()
    with torch.no_grad():
        net.head.weight.fill_(math.inf)
    with pytest.raises(TrainingDiverged, match=r"(?s)became (nan|inf) in epoch 1, step 1 of 24, at learning rate 0\.0167.*clip_grad_norm"):
        training.fit(net, colours, classification, schedule())


def test_a_teacher_of_full_weight_replaces_the_targets(colours: Dataset) -> None:
    class Swapped(nn.Module):
        """Knows the colours by another order than the targets."""

        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))[:, [1, 2, 0]] * 20

    net = small()
    training.fit(net, colours, classification, schedule(epochs=6, keep="last"), teacher=Swapped(), distillation=losses.Distillation(1.0, 2.0))
    outputs = evaluate.outputs(net, colours.test)
    taught = evaluate.outputs(Swapped(), colours.test)
    assert classification.agree(outputs, taught)["agreement"] > 0.9
    assert classification.score(outputs, colours.test.targets)["top1"] < 0.1


def test_batchnorm_and_biases_do_not_decay() -> None:
    net = small()
    decayed, rest = training._optimizer(net, schedule(weight_decay=0.1)).param_groups
    assert {id(p) for p in decayed["params"]} == {id(net.conv.weight), id(net.head.weight)}
    assert {id(p) for p in rest["params"]} == {id(net.norm.weight), id(net.norm.bias), id(net.head.bias)}
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert training._optimizer(net, schedule(optimizer="adamw", momentum=0.8)).param_groups[0]["betas"] == (0.8, 0.999)


def rates(config: TrainingConfig, steps: int) -> Iterator[float]:
    return (training.learning_rate(config, step, steps) for step in range(config.epochs * steps))


def test_the_learning_rate_rises_linearly_and_falls_as_a_half_cosine() -> None:
    cosine = list(rates(schedule(lr=1.0), steps=4))
    assert cosine[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert cosine[10] == pytest.approx(0.5)
    assert 0 < cosine[-1] < 0.05
    constant = list(rates(schedule(lr=1.0, schedule="constant", warmup_epochs=0.0), steps=4))
    assert set(constant) == {1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_epochs": 4.0}, "must be fewer than epochs"),
        ({"momentum": 0.0}, "nesterov needs momentum"),
        ({"optimizer": "adamw", "nesterov": True}, "nesterov is an option of sgd"),
        ({"lr": -1.0}, "greater than 0"),
        ({"rate": 1}, "Extra inputs"),
    ],
)
def test_impossible_schedules_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        schedule(**options)


def test_nothing_is_augmented_by_default() -> None:
    assert TrainingConfig().augment == Augment(crop_padding=0, horizontal_flip=False, resized_crop=None)


def test_images_lie_channels_last_unless_that_corrupts_memory() -> None:
    narrow = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 1, stride=2))
    assert training.memory_layout(narrow, "cpu") is torch.contiguous_format
    assert training.memory_layout(narrow, "cuda:0") is torch.channels_last
    assert training.memory_layout(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, stride=2)), "cpu") is torch.channels_last


class Watching(nn.Module):
    """Remembers what computes the gradient of its convolution, over maps of `size`²."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.pool, self.conv, self.seen = nn.AdaptiveAvgPool2d(size), nn.Conv2d(3, 3, 3, padding=1), ""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.conv(self.pool(x))
        self.seen = output.grad_fn.name() if output.grad_fn is not None else self.seen
        return output.mean((2, 3))


@pytest.mark.parametrize(("size", "ours"), [(4, True), (5, False)])
def test_weight_gradients_over_small_maps_are_products(colours: Dataset, size: int, ours: bool) -> None:
    net = Watching(size)
    training.fit(net, colours, classification, schedule(epochs=1, warmup_epochs=0.0))
    assert (net.seen == "_SmallMapBackward") is ours


def test_each_step_is_told_what_share_is_done(colours: Dataset) -> None:
    shares: list[float] = []
    training.fit(Fading(), colours, classification, schedule(epochs=2), before_step=shares.append)
    steps = len(shares)
    assert shares == [step / steps for step in range(steps)]
    assert steps >= 4
