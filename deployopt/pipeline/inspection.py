"""Questions outside a run: what can this machine do, how good is that artifact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployopt import __version__, backends, data, plugins
from deployopt.bench.environment import environment, versions
from deployopt.pipeline.binding import data_of
from deployopt.pipeline.planning import visible_gpus
from deployopt.runtime import host
from deployopt.runtime.progress import Progress
from deployopt.tasks import Task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

REPORTED = (
    *("torch", "torchvision", "torch-pruning", "torchao", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino"),
    *("tensorrt", "tensorrt-cu12", "tensorrt-rtx-cu13", "numpy"),
)

TIMING_IMAGES = 256  # enough for eight buffers of 32


def evaluate(
    artifact: str | Path,
    data_spec: str,
    *,
    task: str = "classification",
    backend: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress,
) -> dict[str, Any]:
    """Score an artifact on the test split of a data set; see `bench.inference.evaluate`.

    Args:
        data_spec: "NAME" or "NAME:KEY=VALUE,KEY=VALUE" with the options of a recipe's `data` section, VALUE in YAML.

    Raises:
        RecipeError: every problem of the data options at once.
        UsageError, DataNotFound, MissingDependency, ArtifactError, WorkerDied.
    """
    from deployopt.bench import inference

    source, config = data_of(data_spec)
    scorer: Task = plugins.find("tasks", task)
    cores = threads or host.usable_cores()
    return inference.evaluate(artifact, data.load(source, config, progress), scorer, backend=backend, threads=cores, device=device, progress=progress)


def timing_images(data_spec: str, progress: Progress) -> NDArray[np.uint8]:
    """Up to `TIMING_IMAGES` of a data set's test split, chosen at random with a fixed seed, uint8 [n, H, W, C].

    Args:
        data_spec: as `evaluate` takes it, and the errors are the same.
    """
    import numpy as np

    source, config = data_of(data_spec)
    test = data.load(source, config, progress).test
    return test.images(np.random.default_rng(0).permutation(len(test))[:TIMING_IMAGES])


def diagnose() -> dict[str, Any]:
    """What this machine can train, build and run, and what to install for the rest."""
    gpus, no_gpu = visible_gpus()  # from which the backends judge too
    return {
        "deployopt": __version__,
        "environment": environment(REPORTED),
        "gpus": [gpu._asdict() for gpu in gpus],
        "no_gpu": no_gpu,
        "backends": {name: asdict(backends.find(name).probe()) for name in backends.names()},
        "missing": {extra: gone for extra, needs in EXTRAS.items() if (gone := [d for d, v in versions(needs).items() if v is None])},
    }


# What each extra brings, for `diagnose`; a test compares it with pyproject.toml.
EXTRAS = {
    "train": ("torch", "torchvision", "torch-pruning", "torchao", "onnx", "onnxscript", "safetensors", "scikit-learn", "pillow"),
    "runtimes": ("onnx", "openvino", "pillow"),
}
