"""Runs of the command line as processes, and what they left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

QUIET = ("max_contention", "max_drift", "max_pressure", "max_spread", "max_steal_percent")  # a shared machine's timing is not judged
HURRIED = {"min_seconds": 0.05, "profile": False, **dict.fromkeys(QUIET, 100)}
TINY = f"""\
name: tiny
model: {{arch: resnet8, stem: cifar}}
data: {{name: digits, image_size: 8}}
stages:
  - finetune: {{epochs: 2, batch_size: 128}}
  - prune: {{target: {{macs_ratio: 0.5}}, round_to: 4, if_not_faster: ignore, finetune: {{epochs: 1}}}}
  - qat: {{epochs: 1}}
  - export
  - build: {{backends: [onnxruntime, openvino, tensorrt, tensorrt_rtx]}}
  - benchmark: {json.dumps(HURRIED)}
"""


class Finished(NamedTuple):
    """An uninterrupted run with an empty cache; `cache` is its XDG_CACHE_HOME. Tests only read it."""

    folder: Path
    cache: Path
    document: dict[str, Any]


def hurried(keys: Mapping[str, object]) -> list[str]:
    """`--set` options of these keys, and of a short benchmark."""
    keys = {**{f"stages.benchmark.{key}": value for key, value in HURRIED.items()}, **keys}
    return [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]


def start(recipe: Path, folder: Path, cache: Path, *arguments: str) -> subprocess.Popen[str]:
    """`deployopt run`, on one thread unless told otherwise; `cache` is its XDG_CACHE_HOME."""
    threads = () if "--threads" in arguments else ("--threads", "1")
    command = [sys.executable, "-m", "deployopt", "run", str(recipe), "--run-dir", str(folder), *threads, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "XDG_CACHE_HOME": str(cache)})


def run(recipe: Path, folder: Path, cache: Path, *arguments: str, exit_codes: tuple[int, ...] = (0,), timeout_s: float = 500) -> dict[str, Any]:
    """The report of a run that ends with one of these exit codes."""
    with start(recipe, folder, cache, *arguments) as process:
        out, err = process.communicate(timeout=timeout_s)
    assert process.returncode in exit_codes, out + err
    document: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return document


def cached(document: dict[str, Any]) -> set[str]:
    """Steps that were not run."""
    return {step["id"] for step in document["steps"] if step["cached"]}


def weights(folder: Path) -> dict[str, dict[str, str]]:
    """sha256 of every file of every model, by step: what must be bit-identical."""
    return {done.parent.name: json.loads(done.read_text())["files"] for done in folder.glob("*/DONE") if (done.parent / "model.safetensors").exists()}


def logged(log: Path, text: str) -> Callable[[], bool]:
    """Whether `text` has come once more since this call."""

    def count() -> int:
        return log.read_text().count(text) if log.exists() else 0

    before = count()
    return lambda: count() > before


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until the condition holds; the process must still run then."""
    deadline = time.monotonic() + 400  # far more than any step takes on a busy machine
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "what was waited for never came"
        time.sleep(0.01)
