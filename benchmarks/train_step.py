"""How much faster is a training step on the CPU with weight gradients over small maps as one matrix product (`nn/weight_gradient.py`)?

    python benchmarks/train_step.py                    # about two minutes

Steps of a ResNet-18 (forward, backward, SGD) on noise, in turn with and without; and the weight gradient alone, of 3×3 convolutions by channels and
positions, over a batch of 64. Ratios are paired by round, with their bootstrap intervals. Writes benchmarks/results/train_step.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from deployopt.bench.environment import environment
from deployopt.nn import models, weight_gradient
from deployopt.nn.weight_gradient import SmallMapGradients
from deployopt.runtime.clock import now_ns, seconds_since
from deployopt.runtime.files import atomic_write_json
from deployopt.runtime.preprocessing import Preprocessing
from deployopt.runtime.statistics import bootstrap_ratio

RESULT = Path(__file__).resolve().parent / "results" / "train_step.json"
STEPS = (("imagenet", 32, 128), ("small", 32, 64))  # stem, image size, batch
CONVOLUTIONS = [(channels, size) for size in (8, 4, 2, 1) for channels in (64, 256, 512)]
BATCH = 64  # of the convolutions


def step(stem: str, size: int, batch: int) -> Callable[[bool], None]:
    """One step of training; the argument says whether with the products."""
    torch.manual_seed(0)
    network = models.build({"arch": "resnet18", "outputs": 10, "stem": stem}, Preprocessing(size)).train().to(memory_format=torch.channels_last)
    images, targets = torch.rand(batch, 3, size, size).to(memory_format=torch.channels_last), torch.randint(10, (batch,))
    optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.9)

    def run(products: bool) -> None:
        optimizer.zero_grad(set_to_none=True)
        with SmallMapGradients() if products else nullcontext():
            loss = F.cross_entropy(network(images), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return run


def gradient(channels: int, size: int) -> Callable[[bool], None]:
    """The weight gradient of one convolution; the argument says which way."""
    images, toward = (torch.rand(BATCH, channels, size, size).to(memory_format=torch.channels_last) for _ in range(2))
    weight = torch.rand(channels, channels, 3, 3).to(memory_format=torch.channels_last)

    def run(product: bool) -> None:
        if product:
            weight_gradient._of_weight(toward, images, weight, [1, 1], [1, 1])
        else:
            torch.ops.aten.convolution_backward(toward, images, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])

    return run


def compared(run: Callable[[bool], None], rounds: int, calls: int) -> dict[str, Any]:
    """Milliseconds of both ways, interleaved, and how many times as fast the product is."""
    order, times = np.random.default_rng(0), {True: list[float](), False: list[float]()}
    for number in range(rounds + 2):
        for product in order.permutation([True, False]).tolist():
            start = now_ns()
            for _ in range(calls):
                run(product)
            if number >= 2:  # the first two warm up
                times[product].append(seconds_since(start) * 1e3 / calls)
    ratio = bootstrap_ratio(times[False], times[True], paired=True)
    return {
        "n": rounds,
        "onednn_ms": float(np.median(times[False])),
        "product_ms": float(np.median(times[True])),
        "ratio": ratio.value,
        "ratio_ci95": [ratio.low, ratio.high],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps = [{"stem": s, "image_size": i, "batch": b, **compared(step(s, i, b), arguments.rounds, 1)} for s, i, b in STEPS]
    alone = [{"channels": c, "positions": f"{s}x{s}", "batch": BATCH, **compared(gradient(c, s), arguments.rounds, 3)} for c, s in CONVOLUTIONS]
    found = {"environment": environment(("torch",)), "threads": arguments.threads, "steps": steps, "gradients": alone}
    atomic_write_json(RESULT, found)
    for row in (*steps, *alone):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
