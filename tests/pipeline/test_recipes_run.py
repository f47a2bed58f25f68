"""The other shipped recipes run to their end: as shipped but for epochs, image size and seconds, on small files of their data sets' real formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import hurried, run
from published_files import write_cifar10, write_fashion_mnist

pytestmark = [pytest.mark.recipe, pytest.mark.timeout(1200)]
REDUCED = {
    "stages.finetune.epochs": 1,
    "stages.finetune.warmup_epochs": 0,
    "stages.prune.finetune.epochs": 1,
    "stages.qat.epochs": 1,
    "stages.build.backends": "[onnxruntime, openvino]",
    "stages.benchmark.batch_sizes": "[1]",
}
TRAININGS = ("finetune", "prune.sparse", "prune.finetune")


MEASURED = {row: "ok" for backend in ("onnxruntime", "openvino") for row in (f"finetune/{backend}/fp32", f"prune/{backend}/fp32", f"qat/{backend}/int8")}


def reduced(recipe: Path, home: Path, **reductions: object) -> dict[str, Any]:
    """The report of a run in a reduced form. Exit code 1 is a budget that so little training missed."""
    changes = hurried({**REDUCED, **{key.replace("__", "."): value for key, value in reductions.items()}})
    return run(recipe, home / "run", home / "cache", *changes, exit_codes=(0, 1), timeout_s=1100)


def measured(report: dict[str, Any]) -> dict[str, str]:
    """Status of the rows that every recipe has, or what is wrong with them."""
    dense, pruned, _ = report["variants"]
    found = {f"{r['variant']}/{r['backend']}/{r['precision']}": r for r in report["rows"]}
    states = {}
    for key in MEASURED:
        row, verified = found[key], found[key]["verified"]
        if row["status"] != "ok":
            states[key] = f"{row['status']}: {row['reason']}"
        elif row["accuracy"]["n"] != report["dataset"]["test"]:
            states[key] = f"scored on {row['accuracy']['n']} images"
        elif key.startswith("qat") and not 20 < verified["quantized_layers"] == verified["quantizable_layers"]:
            states[key] = f"verified {verified}"
        else:
            states[key] = "ok" if pruned["macs"] < 0.55 * dense["macs"] else f"pruned to {pruned['macs']} of {dense['macs']} MACs"
    return states


def test_fashion_mnist(repository: Path, tmp_path: Path) -> None:
    data = write_fashion_mnist(tmp_path / "data", train=256, test=64)
    assert measured(reduced(repository / "recipes" / "resnet18_fashion_mnist_int8.yaml", tmp_path, data__folder=data)) == MEASURED


def test_cifar10(repository: Path, tmp_path: Path) -> None:
    data = write_cifar10(tmp_path / "data", records=50)
    assert measured(reduced(repository / "recipes" / "resnet18_cifar10_int8.yaml", tmp_path, data__folder=data, data__image_size=16)) == MEASURED


def test_the_published_depgraph_protocol_on_cifar10(repository: Path, tmp_path: Path) -> None:
    data = write_cifar10(tmp_path / "data", records=50)
    short = {f"stages.{training}.{key}": value for training in TRAININGS for key, value in {"schedule": "cosine", "milestones": "[]"}.items()}
    more = {**short, "stages.prune.sparse.epochs": 1, "stages.prune.iterations": 2, "data.folder": data, "data.download": "false", "data.image_size": 16}
    assert measured(reduced(repository / "recipes" / "resnet56_cifar10_depgraph.yaml", tmp_path, **more)) == MEASURED


def test_your_own_images_with_a_local_file_of_weights(repository: Path, tmp_path: Path) -> None:
    import torch
    import torchvision
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in {"train": 40, "val": 10, "test": 20}.items():
        for label, kind in enumerate(("cats", "dogs", "owls")):
            folder = tmp_path / "images" / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 100, (48, 64, 3)) + 70 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg")
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "resnet50.pth")  # ImageNet's 1,000 outputs, of which three are wanted
    report = reduced(
        repository / "recipes" / "resnet50_imagefolder_int8.yaml",
        tmp_path,
        model__weights=tmp_path / "resnet50.pth",
        data__folder=tmp_path / "images",
        data__image_size=32,
        data__resize=40,
    )
    assert measured(report) == MEASURED
