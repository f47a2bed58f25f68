"""Open, score and run any artifact: what `deployopt eval`, `predict` and `deployopt.open_session` do."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deployopt.bench.accuracy import finite, outputs_of, score
from deployopt.bench.targets import Description, Target, describe, opener, resolve
from deployopt.data import Dataset
from deployopt.errors import ArtifactMismatch, UsageError
from deployopt.report import units
from deployopt.runtime import preprocessing as pre
from deployopt.runtime.preprocessing import Preprocessing
from deployopt.runtime.progress import Bar, Progress, SilentProgress
from deployopt.runtime.session import Session, SessionOptions
from deployopt.runtime.worker import Opened, Worker
from deployopt.tasks import Task

EVALUATION_BATCH = 32


def open_artifact(path: str | Path, backend: str | None = None, options: SessionOptions | None = None) -> Session:
    """A session in this process, without a worker's protection from crashes of native code.

    Args:
        path: as `targets.resolve` takes it.
        options: threads and device; the precision is the artifact's own.

    Raises:
        UsageError, ArtifactError: as `targets.resolve`. BackendUnavailable, DeviceUnavailable.
    """
    target, given = resolve(path, backend), options or SessionOptions()
    module, _, function = opener(target.backend).partition(":")
    extra = {**target.options, **given.extra}
    session: Session = getattr(importlib.import_module(module), function)(target.path, given._replace(precision=target.precision, extra=extra))
    return session


def evaluate(
    artifact: str | Path, dataset: Dataset, task: Task, *, backend: str | None = None, threads: int = 1, device: str = "cpu", progress: Progress
) -> dict[str, Any]:
    """Score an artifact on the whole test split.

    Returns:
        {"primary": name, its metrics, "n", "artifact": {"path", "sha256", "bytes", "backend", "precision"}}.

    Raises:
        UsageError: the data are not preprocessed as the artifact's were, have other classes or are not of this task.
        ArtifactMismatch: the artifact does not take such images, or has another number of outputs than the task needs.
        WorkerDied and what `targets.resolve` raises.
    """
    target = resolve(artifact, backend)
    described = describe(target)
    _check_data(target, described, dataset)
    width = task.head_width(dataset.test.targets, dataset.classes)
    with Worker(opener(target.backend), target.path, target.session_options(threads, device)) as worker:
        opened = worker.start()
        found = _width(target, opened)
        if found not in (width, None):
            raise ArtifactMismatch(f"{target.path.name} has {found} outputs, these data need {width}", "evaluate it on the data set that it was trained for")
        batch = _batch(opened, described.max_batch)
        with progress.track(f"score {target.name}", len(dataset.test)) as bar:
            figures, _ = score(lambda images: _infer(worker, opened, images, bar), dataset.test, task, batch=batch)
    return {**figures, "artifact": {**target.facts(), "backend": target.backend, "precision": target.precision}}


def predict(
    artifact: str | Path,
    images: Sequence[str | Path],
    *,
    backend: str | None = None,
    top: int = 3,
    threads: int = 1,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Run image files through the preprocessing that evaluation used and then through the artifact.

    Args:
        top: classes for each image, the most probable first.

    Returns:
        For each image {"image": path, "classes": [{"name", "probability"}]}; a regression has {"image", "outputs": [K numbers]}. Without
        recorded names a class is called by its index.

    Raises:
        ArtifactMismatch: the artifact records no preprocessing, or takes other images than it says.
        UsageError: images that are not there. ArtifactError: an image that cannot be decoded; names it.
        StageFailed: outputs that are not finite. WorkerDied and what `targets.resolve` raises.
    """
    missing = [str(image) for image in images if not Path(image).is_file()]
    if missing:
        found = f"found nothing at {units.listed(missing, 5)}"
        raise UsageError(f"wanted {units.plural(len(images), 'image file')}, {found}", "give paths of image files; a folder's are FOLDER/*.jpg")
    target = resolve(artifact, backend)
    described = describe(target)
    if described.preprocessing is None:
        raise ArtifactMismatch(
            f"{target.path.name} records no preprocessing (its input shape gives the size, but not how an image is resized and cropped to it)",
            "predict with the .onnx of the same run, or export the model with `deployopt run`, which records it",
        )
    decoded = _ImageFiles(images, described.preprocessing)
    with Worker(opener(target.backend), target.path, target.session_options(threads, device)) as worker:
        opened = worker.start()
        classes = _classes(target, described, _width(target, opened))
        batch = _batch(opened, described.max_batch, len(decoded))
        with (progress or SilentProgress()).track("predict", len(decoded)) as bar:
            outputs = finite(outputs_of(lambda pixels: _infer(worker, opened, pixels, bar), decoded, batch))
    if classes is None and outputs.shape[1] > 1:
        classes = tuple(map(str, range(outputs.shape[1])))
    return [{"image": str(path), **_prediction(row, classes, top)} for path, row in zip(images, outputs, strict=True)]


class _ImageFiles:
    """Image files as an `ImageSet` without targets, decoded when they are asked for."""

    def __init__(self, paths: Sequence[str | Path], preprocessing: Preprocessing) -> None:
        self.targets: NDArray[Any] = np.empty(0)
        self._paths, self._preprocessing = paths, preprocessing

    def __len__(self) -> int:
        return len(self._paths)

    def images(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        distinct, places = np.unique(np.asarray(indices), return_inverse=True)
        pixels: NDArray[np.uint8] = np.stack([pre.apply(self.raw(i), self._preprocessing) for i in distinct.tolist()])
        return pixels[places]

    def raw(self, index: int) -> NDArray[np.uint8]:
        return pre.decode(self._paths[index], self._preprocessing.channels)


def _check_data(target: Target, described: Description, dataset: Dataset) -> None:
    """Raises UsageError where a score would not be about this artifact: other preprocessing (normalisation is inside it), or other classes."""
    wanted, found = described.preprocessing, dataset.preprocessing
    if wanted is not None:
        differ = [k for k in ("image_size", "channels", "resize") if getattr(wanted, k) != getattr(found, k)]
        if differ:
            said = ", ".join(f"{k} {getattr(wanted, k)} (the data: {getattr(found, k)})" for k in differ)
            options = ",".join(f"{k}={'null' if getattr(wanted, k) is None else getattr(wanted, k)}" for k in differ)
            raise UsageError(f"{target.path.name} was evaluated with {said}", f"--data NAME:{options}")
    if described.classes is not None and described.classes != dataset.classes:
        raise UsageError(
            f"{target.path.name} knows the classes {_listed(described.classes)}, the data have {_listed(dataset.classes)}",
            "evaluate it on the data set that it was trained for",
        )


def _listed(classes: Sequence[str]) -> str:
    return f"[{', '.join(classes[:5])}{', …' if len(classes) > 5 else ''}] ({len(classes)})"


def _width(target: Target, opened: Opened) -> int | None:
    """K of the only output [N, K]; None if the artifact leaves it open.

    Raises:
        ArtifactMismatch: several outputs, or one of another shape.
    """
    if len(opened.outputs) != 1 or len(opened.outputs[0].shape) != 2:
        found = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in opened.outputs)
        raise ArtifactMismatch(f"wanted a model with one output [N, K], found in {target.path.name}: {found}")
    width = opened.outputs[0].shape[1]
    return width if isinstance(width, int) else None


def _batch(opened: Opened, limit: int | None, wanted: int = EVALUATION_BATCH) -> int:
    """Images at once: the batch that the artifact fixes, else as many as are wanted within its limit."""
    fixed = next((size for spec in opened.inputs for size in spec.shape), None)  # what takes no image refuses it with the reason
    return fixed if isinstance(fixed, int) else max(1, min(wanted, EVALUATION_BATCH, limit or EVALUATION_BATCH))


def _infer(worker: Worker, opened: Opened, images: NDArray[np.uint8], bar: Bar | None = None) -> NDArray[Any]:
    outputs = worker.infer(images)[opened.outputs[0].name]
    if bar is not None:
        bar.advance(len(images))
    return outputs


def _classes(target: Target, described: Description, width: int | None) -> tuple[str, ...] | None:
    """Recorded names, () for a regression, None if nothing is recorded. Raises ArtifactMismatch for another number of them than of outputs."""
    classes = described.classes
    if classes and width is not None and len(classes) != width:
        raise ArtifactMismatch(f"{target.path.name} has {width} outputs, but {len(classes)} classes are recorded with it")
    return classes


def _prediction(outputs: NDArray[np.float32], classes: Sequence[str] | None, top: int) -> dict[str, Any]:
    if not classes:
        return {"outputs": outputs.tolist()}
    exponentials = np.exp(outputs.astype(np.float64) - outputs.max())  # softmax, shifted so that nothing overflows
    probabilities = exponentials / exponentials.sum()
    best = np.argsort(-probabilities, kind="stable")[:top]
    return {"classes": [{"name": classes[i], "probability": float(probabilities[i])} for i in best]}
