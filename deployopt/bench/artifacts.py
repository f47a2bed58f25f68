"""Bench, score and run any artifacts: what `deployopt bench`, `eval` and `predict` do."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from deployopt import backends
from deployopt.artifact import Artifact, Row
from deployopt.bench import profiles
from deployopt.bench.accuracy import outputs_of, score
from deployopt.bench.environment import environment, reason_of
from deployopt.bench.harness import Failure, Group, Measured, Settings, Subject, speedup, with_figures
from deployopt.bench.scenarios import Scenario, ScenarioName
from deployopt.bench.targets import TORCH_OPENERS, Description, Target, describe, measured_rows, opener, precision_of, resolve
from deployopt.data import Dataset
from deployopt.errors import ArtifactMismatch, DeployoptError, UsageError
from deployopt.report import units
from deployopt.runtime import host
from deployopt.runtime import preprocessing as pre
from deployopt.runtime.preprocessing import Preprocessing
from deployopt.runtime.progress import Bar, Progress, SilentProgress
from deployopt.runtime.session import Session, SessionOptions, TensorSpec
from deployopt.runtime.worker import Opened, Worker
from deployopt.tasks import Task

__all__ = ["SYNTHETIC", "bench_artifacts", "evaluate", "images_for", "natural_noise", "open_artifact", "opener", "precision_of", "predict"]

SYNTHETIC = "synthetic 1/f noise, seeded (no data were given)"
EVALUATION_BATCH = 32


def bench_artifacts(
    artifacts: Sequence[str | Path],
    *,
    progress: Progress,
    backend: str | None = None,
    batch_sizes: Sequence[int] | None = None,
    seconds: float = 3.0,
    threads: int | None = None,
    scenario: ScenarioName | None = None,
    device: str = "cpu",
    images: NDArray[np.uint8] | None = None,
    seed: int = 0,
    profile: bool = False,
) -> list[Row]:
    """Time artifacts against each other; the first is the baseline of the speed-ups.

    Args:
        artifacts: as `targets.resolve` takes them; a run folder stands for everything that the run measured.
        backend: opens all of them; None takes the one of each file's kind or row.
        batch_sizes, threads, scenario: of all of them; None takes what an address names ("RUN:…/b8/offline"), else batch 1, all cores, single_stream.
            "offline" compares throughputs, with a stream for each of `threads`.
        images: real samples uint8 [n, H, W, C]; None makes natural-looking noise of each model's size and the contract says so.
        profile: then time the layers of each at each batch size, where its runtime can.

    Returns:
        A row for each artifact and batch size, artifact by artifact. `variant` is the file's name without suffix or the row's address, numbered
        where it is not unique: the same file twice is an A/A comparison. Status "failed" where it cannot be opened, does not take the batch or
        computes NaN, "unavailable" where this machine lacks the runtime or the device. What was measured has the machine and its software in its
        contract, as "environment".

    Raises:
        UsageError: an address names another batch size, scenario or number of threads than was asked for, or than another address; layers are to be timed
            in the offline scenario; or as `targets.resolve`. ArtifactError: as `targets.resolve`.
    """
    targets = _numbered([resolve(each, backend) for a in artifacts for each in _expanded(a)])
    sizes = _agreed("--batch", None if batch_sizes is None else tuple(batch_sizes), [None if t.batch is None else (t.batch,) for t in targets], (1,))
    asked = Scenario(
        _agreed("--scenario", scenario, [t.scenario for t in targets], "single_stream"),
        _agreed("--threads", threads, [t.threads for t in targets], host.usable_cores()),
    )
    if profile and asked.name != "single_stream":
        raise UsageError(f"layers are timed one inference at a time, and the scenario is {asked.name}", "leave out --profile or --scenario")
    subjects, rows, where = [], {}, _environment(targets)
    for target in targets:
        options = asked.options(target.session_options(asked.threads, device))
        subjects.append(Subject(target.name, opener(target.backend), target.path, options, asked.name))
        rows[target.name] = Row(
            target.name,
            target.backend,
            target.precision,
            0,
            "failed",
            options=dict(target.options),
            threads=asked.threads,
            scenario=asked.name,
            artifact=_facts(target),
        )
    with Group(subjects, Settings(min_seconds=seconds, seed=seed), progress) as group:
        source = SYNTHETIC if images is None else "images that were given"
        given = {batch: _given(group, batch, images, seed) for batch in sizes}
        results = {batch: _measure(group, batch, given[batch], source) for batch in sizes}
        profiled = {batch: profiles.take(group, given[batch], batch, results[batch], progress) for batch in sizes if profile}
    measured = [_row(rows[key], batch, results[batch], subjects[0].key) for key in rows for batch in sizes]
    for row in measured:
        if row.contract is not None:
            row.contract = {**row.contract, "environment": where}
    return [profiles.with_profile(row, profiled.get(row.batch, {}).get(row.variant)) for row in measured]


Option = TypeVar("Option")


def _agreed(option: str, asked: Option | None, named: Sequence[Option | None], default: Option) -> Option:
    """What all artifacts are measured with: what was asked for, what addresses name, or the default. Raises UsageError where those contradict each other."""
    found = list(dict.fromkeys(value for value in (asked, *named) if value is not None))
    if len(found) > 1:
        said = " and ".join(",".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in found)
        wanted = f"{option} and the addresses" if asked is not None else "the addresses"
        raise UsageError(f"wanted one {option} for all artifacts, found {said}: {wanted} disagree", f"name rows without /bN, and give {option}")
    return found[0] if found else default


def _environment(targets: Sequence[Target]) -> dict[str, Any]:
    """The machine, and the versions of what opens these artifacts."""
    runtimes = {d for t in targets for d in (("torch",) if t.backend in TORCH_OPENERS else backends.find(t.backend).distributions)}
    return environment(sorted({"deployopt", "numpy", *runtimes}))


def _given(group: Group, batch: int, images: NDArray[np.uint8] | None, seed: int) -> dict[str, NDArray[np.uint8]]:
    """What each open session is timed with."""
    return {key: images_for(opened.inputs, batch, seed) if images is None else images for key, opened in group.opened.items()}


def _measure(group: Group, batch: int, given: Mapping[str, NDArray[np.uint8]], source: str) -> dict[str, Measured | Failure]:
    found = group.measure(given, batch, source)
    return {key: result if isinstance(result, Failure) else _checked(group, key, given[key][:batch], result) for key, result in found.items()}


def _checked(group: Group, key: str, images: NDArray[np.uint8], result: Measured) -> Measured | Failure:
    """What was measured, unless it computes something that is no number."""
    try:
        finite = np.isfinite(group.infer(key, images)).all()
    except DeployoptError as exc:
        return Failure(reason_of(exc))
    return result if finite else Failure(f"its outputs are NaN or infinite for batches of {len(images)}")


def _row(row: Row, batch: int, results: dict[str, Measured | Failure], baseline_key: str) -> Row:
    result, baseline = results[row.variant], results[baseline_key]
    row = with_figures(replace(row, batch=batch), result)
    if isinstance(result, Measured) and isinstance(baseline, Measured):
        row.speedup, row.speedup_ci95 = speedup(baseline, result)
    return row


def images_for(inputs: Sequence[TensorSpec], batch: int, seed: int) -> NDArray[np.uint8]:
    """Noise of the size that a model takes; free axes become 224 and 3. A model that takes no image gets one anyway and refuses it with the reason."""
    sizes = [size if isinstance(size, int) and size > 0 else None for size in inputs[0].shape[1:]] if inputs else []
    channels, height, width = sizes if len(sizes) == 3 else (None, None, None)
    return natural_noise(8 * batch, height or 224, width or 224, channels or 3, seed)


def natural_noise(n: int, height: int, width: int, channels: int, seed: int) -> NDArray[np.uint8]:
    """Images uint8 [n, H, W, C] whose amplitude spectrum falls as 1/f, as natural images' does (Field 1987), random in phase."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf  # no mean: it is set below
    noise = np.empty((n, height, width, channels), np.uint8)
    for i in range(n):
        white = np.fft.rfft2(rng.standard_normal((channels, height, width)))
        image = np.fft.irfft2(white / frequency, s=(height, width))
        noise[i] = np.clip(127.5 + 50 * image / image.std(), 0, 255).transpose(1, 2, 0)
    return noise


def _expanded(artifact: str | Path) -> Sequence[str | Path]:
    """A run folder as its measured rows, anything else as it is."""
    return measured_rows(Path(artifact)) if (Path(artifact) / "report.json").is_file() else [artifact]


def _numbered(targets: Sequence[Target]) -> list[Target]:
    names = [t.name for t in targets]
    return [t if names.count(t.name) == 1 else replace(t, name=f"{t.name}#{names[: i + 1].count(t.name)}") for i, t in enumerate(targets)]


def _facts(target: Target) -> dict[str, Any]:
    found = Artifact.of(target.kind, target.path)
    return {"path": target.path.name, "sha256": found.sha256, "bytes": found.size_bytes}


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
    return {**figures, "artifact": {**_facts(target), "backend": target.backend, "precision": target.precision}}


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
        WorkerDied and what `targets.resolve` raises.
    """
    missing = [str(image) for image in images if not Path(image).is_file()]
    if missing:
        found = f"found nothing at {', '.join(missing[:5])}{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}"
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
            outputs = outputs_of(lambda pixels: _infer(worker, opened, pixels, bar), decoded, batch)
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
    fixed = opened.inputs[0].shape[0]
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
