"""What test_distributed.py runs in each of several processes."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deployopt.data import Dataset
from deployopt.data._arrays import ArraySet
from deployopt.nn import distributed, evaluate, models, training
from deployopt.nn.prepared import Prepared, Scheme
from deployopt.nn.schedule import TrainingConfig
from deployopt.runtime.preprocessing import Preprocessing
from deployopt.runtime.progress import Progress
from deployopt.tasks import classification

PREPROCESSING = Preprocessing(8, 3, None, (0.5,) * 3, (0.25,) * 3)
COUNTS = (95, 23, 3)  # odd, so that shares differ
AUGMENT = {"crop_padding": 1, "horizontal_flip": True}
SCHEDULE = {"epochs": 3, "batch_size": 15, "lr": 0.05, "warmup_epochs": 1.0, "clip_grad_norm": 1.0}


class Plain(nn.Module):
    """Without BatchNorm and dropout, so that shares of a batch add up to the batch: [N, 3, 8, 8] → [N, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def noise() -> Dataset:
    """Images of three brightnesses under noise."""
    random = np.random.default_rng(0)

    def split(count: int) -> ArraySet:
        targets = np.arange(count) % 3
        images = 60 + 60 * targets[:, None, None, None] + random.integers(-50, 50, (count, 12, 12, 3))
        return ArraySet(images.clip(0, 255).astype(np.uint8), targets, PREPROCESSING)

    train, validation, test = (split(count) for count in COUNTS)
    return Dataset(train, validation, test, ("dark", "grey", "bright"), PREPROCESSING)


def trained(augment: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Weights and history of `Plain` after training in however many processes there are."""
    torch.manual_seed(0)
    module = Plain()
    history = training.fit(module, noise(), classification, TrainingConfig.model_validate({**SCHEDULE, "augment": augment}))
    return module.state_dict(), history.records


def quantized() -> dict[str, Tensor]:
    """State of a ResNet-8 with fake quantisers after an epoch of QAT that freezes BatchNorm and ranges half way."""
    torch.manual_seed(0)
    data = noise()
    network = models.build({"arch": "resnet8", "outputs": 3}, PREPROCESSING).eval()
    prepared = Prepared(network, Scheme("min_max"))
    prepared.calibrate(evaluate.calibration_batches(data.train, 32, seed=0))

    def freeze(done: float) -> None:
        if done >= 0.5:
            prepared.freeze_batchnorm()
            prepared.freeze_observers()

    schedule = TrainingConfig.model_validate({**SCHEDULE, "epochs": 2})
    training.fit(prepared, data, classification, schedule, teacher=network, before_step=freeze)
    prepared.write_back(network)
    return {**prepared.state_dict(), **{f"network.{name}": value for name, value in network.state_dict().items()}}


def train(*, rank: int, processes: int, folder: str, qat: bool, progress: Progress) -> dict[str, Any]:
    """Leave this rank's weights in `folder`; the result is what ranks agreed on."""
    torch.set_num_threads(1)
    home = Path(folder)
    with distributed.joined(rank, processes, home / "rendezvous", "cpu"):
        plain, records = trained({})
        moved, _ = trained({"resized_crop": 0.5, "horizontal_flip": True})
        states = {"plain": plain, "moved": moved, **({"qat": quantized()} if qat else {})}
        torch.save({"states": states, "records": records}, home / f"{rank}.pt")
        outputs = evaluate.outputs(Plain(), noise().validation)
        few = evaluate.outputs(Plain(), ArraySet(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, np.int64), PREPROCESSING))  # fewer than processes
        decided = distributed.decided(lambda: [os.getpid(), distributed.world_size()])
    return {"outputs": list(outputs.shape), "few": list(few.shape), "decided": decided, "pid": os.getpid()}


def too_small(*, rank: int, processes: int, folder: str, progress: Progress) -> None:
    with distributed.joined(rank, processes, Path(folder) / "rendezvous", "cpu"):
        training.fit(Plain(), noise(), classification, TrainingConfig.model_validate({**SCHEDULE, "batch_size": 3}))


class Unreached(Plain):
    """With a layer that its forward pass never calls."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.unused = nn.Conv2d(3, 2, 1).requires_grad_(not frozen)


def unreached(*, rank: int, processes: int, folder: str, frozen: bool, progress: Progress) -> None:
    with distributed.joined(rank, processes, Path(folder) / "rendezvous", "cpu"):
        training.fit(Unreached(frozen), noise(), classification, TrainingConfig.model_validate({**SCHEDULE, "epochs": 2}))


def one_fails(*, rank: int, processes: int, folder: str, how: str, progress: Progress) -> None:
    """Rank 1 fails while the others train on."""
    (Path(folder) / f"{rank}.pid").write_text(str(os.getpid()))
    with distributed.joined(rank, processes, Path(folder) / "rendezvous", "cpu"):

        def before_step(done: float) -> None:
            if done > 0 and rank == 1:
                if how == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise LookupError("nothing there")

        training.fit(Plain(), noise(), classification, TrainingConfig.model_validate({**SCHEDULE, "epochs": 10_000}), before_step=before_step)
        time.sleep(60)
