"""Sessions timed against each other for `gpu.py`, as `deployopt.bench.harness` does, on what a device has: standard library, NumPy, `deployopt.runtime`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deployopt.errors import DeployoptError
from deployopt.runtime import host
from deployopt.runtime.sampler import Block
from deployopt.runtime.session import SessionOptions
from deployopt.runtime.statistics import MINIMUM_BLOCKS, Ratio, bootstrap_ratio, summary
from deployopt.runtime.worker import Opened, Worker

SECONDS, RUNS = 3.0, 1000  # a row is long enough after either
BUFFERS = 4
LEAD_IN = 5  # untimed runs at the head of a block
OPEN_AT_ONCE = 8


class Subject(NamedTuple):
    """A session to be timed: `opener` is "module:function"."""

    key: str
    opener: str
    path: Path
    options: SessionOptions


class Session(NamedTuple):
    """A subject that is open in a child process."""

    worker: Worker
    opened: Opened

    def outputs(self, images: np.ndarray, batch: int) -> np.ndarray:
        """First output [n, K] for images uint8 [n, H, W, C], inferred by batches."""
        name = self.opened.outputs[0].name
        return np.concatenate([self.worker.infer(images[at : at + batch])[name] for at in range(0, len(images), batch)])


@contextmanager
def sessions(subjects: Sequence[Subject], failures: dict[str, str], at_once: int = OPEN_AT_ONCE) -> Iterator[dict[str, Session]]:
    """Open sessions, each in a child; those that cannot be opened go to `failures` with the reason.

    Args:
        at_once: so many are opened side by side; 1 for those that build an engine meanwhile, since its kernels are chosen by timing them.
    """
    workers = {s.key: Worker(s.opener, s.path, s.options) for s in subjects}
    try:
        for worker in workers.values():
            worker.spawn()
        with ThreadPoolExecutor(at_once) as pool:
            opening = {key: pool.submit(worker.start) for key, worker in workers.items()}
        opened = {}
        for key, future in opening.items():
            try:
                opened[key] = Session(workers[key], future.result())
            except DeployoptError as exc:
                failures[key] = exc.message
        yield opened
    finally:
        for worker in workers.values():
            worker.close()


def measure(live: dict[str, Session], images: np.ndarray, batch: int, failures: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Time open sessions at one batch size: blocks of all of them in turn, in a new random order each round.

    Args:
        images: uint8 [n, H, W, C], of which the batches are made.
        failures: where those go that fail on the way; they are left out of the result.

    Returns:
        For each: host and device `statistics.summary` in ms, medians of its blocks in the order of the rounds, warm-up, whether as a CUDA graph, and the GPU
        before and after.
    """
    rng = np.random.default_rng(batch)
    buffers = images[np.stack([rng.choice(len(images), batch, replace=len(images) < batch) for _ in range(BUFFERS)])]
    extents, warmed = {}, {}
    for key in list(live):
        try:
            live[key].worker.load(buffers)
            warm_up = live[key].worker.warm_up()
        except DeployoptError as exc:
            failures[key] = exc.message
            continue
        runs = min(RUNS, SECONDS * 1e3 / warm_up.estimate_ms)
        extents[key], warmed[key] = math.ceil(runs / MINIMUM_BLOCKS), warm_up._asdict()
    blocks: dict[str, list[Block]] = {key: [] for key in extents}
    before = host.gpus()
    for _ in range(MINIMUM_BLOCKS):
        for key in rng.permutation(list(blocks)).tolist():
            try:
                blocks[key].append(live[key].worker.block(extents[key], len(blocks[key]) * extents[key], LEAD_IN))
            except DeployoptError as exc:
                failures[key] = exc.message
                del blocks[key]
    seen = {"gpus_before": before, "gpus_after": host.gpus(), "interleaved": len(blocks), "buffers": BUFFERS}
    return {key: {**_figures(timed), "warm_up": warmed[key], **live[key].worker.execution(), **seen} for key, timed in blocks.items()}


def _figures(blocks: list[Block]) -> dict[str, Any]:
    on_device = [block.device_ms for block in blocks if block.device_ms is not None]
    return {
        "host_ms": summary(np.concatenate([block.host_ns for block in blocks])),
        "device_ms": summary(np.concatenate(on_device) * 1e6) if on_device else None,
        "block_medians_ms": [float(np.median(block.host_ns)) * 1e-6 for block in blocks],
        "device_block_medians_ms": [float(np.median(times)) for times in on_device] or None,
    }


def speedup(slow: dict[str, Any], fast: dict[str, Any]) -> Ratio:
    """How many times faster, by the device's clock where both have one, else by the host's; over blocks of the same rounds."""
    clock = "device_block_medians_ms" if slow["device_ms"] and fast["device_ms"] else "block_medians_ms"
    return bootstrap_ratio(slow[clock], fast[clock], paired=True)


def agreement(outputs: np.ndarray, reference: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Outputs float32 [n, K] held to a reference's."""
    return {
        "n": len(outputs),
        "max_abs_diff": float(np.abs(outputs - reference).max()),
        "reference_std": float(reference.std()),
        "top1_agreement": float(np.mean(outputs.argmax(1) == reference.argmax(1))),
        "top1": float(np.mean(outputs.argmax(1) == targets)),
        "reference_top1": float(np.mean(reference.argmax(1) == targets)),
    }


class Clock:
    """How much of the time a call may take is left."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def left_s(self) -> float:
        return self._end - time.monotonic()
