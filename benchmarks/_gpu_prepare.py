"""`gpu.py prepare`: the networks, on a machine with torch and without a GPU.

Bodies have random weights and BatchNorm statistics of digits; the last layer is fitted to their features (ridge regression), so that outputs mean
something and a wrong engine is seen. Speed does not depend on weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import _networks
import numpy as np
import torch
from _gpu_models import DESCRIPTION, unpack
from _gpu_rows import ARCHS, SAMPLES, VARIANTS, Samples, path_of, read_samples, write_samples
from numpy.typing import NDArray
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from deployopt.bench.environment import environment
from deployopt.data import Dataset, digits
from deployopt.nn import macs, models
from deployopt.nn.models import Network
from deployopt.nn.pruning import Rules, prune
from deployopt.runtime.files import atomic_write, atomic_write_json
from deployopt.runtime.hashing import sha256_file
from deployopt.runtime.onnxruntime_session import open_unoptimized
from deployopt.runtime.preprocessing import to_feed

IMAGE_SIZE = 224
FITTED, CALIBRATION, TESTED = 128, 16, 64  # images
MACS_RATIO, ROUND_TO = 0.4, 8
RIDGE = 1e-2  # of the mean squared feature
BRANCH = 0.25  # standard deviation of what a residual block adds; the first block's input has 1


def prepare(folder: Path, archs: list[str]) -> None:
    """Write the INT8 files, 64 test images and ONNX Runtime's outputs for them. Networks that are there already stay."""
    folder.mkdir(parents=True, exist_ok=True)
    data = digits.load(digits.Config(image_size=IMAGE_SIZE))
    described: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text()) if (folder / DESCRIPTION).exists() else {"networks": {}}
    for arch in archs:
        for variant in VARIANTS:
            name = f"{arch}-{variant}"
            if name not in described["networks"]:
                described["networks"][name] = _write(folder / f"{name}.onnx", arch, variant, data)
                described["environment"] = environment(("torch", "onnx", "onnxruntime", "torch-pruning"))
                atomic_write_json(folder / DESCRIPTION, described)
                print(name, described["networks"][name], flush=True)
    _refer(folder, data)


def _write(path: Path, arch: str, variant: str, data: Dataset) -> dict[str, Any]:
    torch.manual_seed(0)
    made = models.build({"arch": arch, "outputs": len(data.classes)}, data.preprocessing)
    for block in made.modules():
        if isinstance(block, BasicBlock | Bottleneck):  # a deep network of random weights is chaotic where every block counts as much as all before it
            nn.init.constant_((block.bn2 if isinstance(block, BasicBlock) else block.bn3).weight, BRANCH)
    images = torch.from_numpy(to_feed(data.train.images(range(FITTED))))
    whole = macs.count(made, made.input_shape)[1]
    if variant == "pruned":
        prune(made, int(MACS_RATIO * whole), Rules(round_to=ROUND_TO))
    _networks.settle_batchnorm(made, images[:CALIBRATION])
    _fit_head(made, images, data.train.targets[:FITTED])
    int8 = _networks.int8(made, images[:CALIBRATION])
    atomic_write(path, int8.SerializeToString(deterministic=True))
    return {"sha256": sha256_file(path), "macs": macs.count(made, made.input_shape)[1], "parameters": sum(p.numel() for p in made.parameters())}


def _fit_head(made: Network, images: torch.Tensor, targets: NDArray[Any]) -> None:
    """Solve the last layer for one-hot targets, from the features [n, F] that reach it; in the dual, as n < F may be."""
    head = [m for m in made.modules() if isinstance(m, nn.Linear)][-1]
    kept: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    with torch.no_grad():
        for batch in images.split(8):  # type: ignore[no-untyped-call]
            made(batch)
    hook.remove()
    features = torch.cat(kept).double()
    wanted = nn.functional.one_hot(torch.from_numpy(targets), head.out_features).double()
    mean, level = features.mean(0), wanted.mean(0)
    centred = features - mean
    gram = centred @ centred.T
    weight = torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)), wanted - level).T @ centred
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(level - weight @ mean)


def _refer(folder: Path, data: Dataset) -> None:
    """Outputs of the files that TensorRT 8.x gets, executed node by node. FP16 is held to FP32's: ONNX Runtime has no FP16 on CPUs."""
    images, targets = data.test.images(range(TESTED)), data.test.targets[:TESTED]
    stored = read_samples(folder / SAMPLES).references if (folder / SAMPLES).exists() else {}
    paths = {path.stem: path for path in unpack(folder, "tensorrt8")}
    for arch, variant in ((a, v) for a in ARCHS for v in VARIANTS):
        for precision in ("fp32", "int8"):
            name = path_of(folder, arch, variant, precision).stem
            if name in paths and name not in stored:
                with open_unoptimized(paths[name]) as session:
                    batches = [session.infer({session.inputs[0].name: to_feed(part)}) for part in np.array_split(images, TESTED // 8)]
                stored[name] = np.concatenate([next(iter(outputs.values())) for outputs in batches])
                print(f"{name}: top-1 {np.mean(stored[name].argmax(1) == targets):.3f} of {TESTED}", flush=True)
                write_samples(folder / SAMPLES, Samples(images, targets, stored))
