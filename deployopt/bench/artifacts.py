"""Bench any artifact files, several at once and interleaved: what `deployopt bench` does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deployopt import plugins
from deployopt.artifact import Artifact, Precision, Row
from deployopt.bench.harness import Failure, Group, Measured, Settings, Subject, speedup, with_figures
from deployopt.errors import ArtifactMismatch, MissingDependency, UsageError
from deployopt.runtime.progress import Progress
from deployopt.runtime.session import SessionOptions, TensorSpec

BACKEND_OF_SUFFIX = {".onnx": "onnxruntime", ".engine": "tensorrt", ".plan": "tensorrt"}
TORCH_OPENER = "deployopt.nn.session:open"
UNKNOWN_PRECISION = "engine"  # an engine's precision is not in its file name; its manifest's is read by its backend
SYNTHETIC = "synthetic 1/f noise, seeded (no data were given)"


@dataclass(frozen=True)
class _Target:
    """An artifact to bench: a file, or a row of a finished run."""

    name: str
    path: Path
    backend: str
    precision: str
    options: Mapping[str, Any] = field(default_factory=dict)


def opener(backend: str) -> str:
    """Where a worker finds a backend's `open`. Raises UsageError for an unknown backend."""
    return TORCH_OPENER if backend == "torch" else f"{plugins.find('backends', backend).__name__}:open"


def bench_artifacts(
    artifacts: Sequence[str | Path],
    *,
    progress: Progress,
    backend: str | None = None,
    batch_sizes: Sequence[int] = (1,),
    seconds: float = 3.0,
    threads: int = 1,
    device: str = "cpu",
    images: NDArray[np.uint8] | None = None,
    seed: int = 0,
) -> list[Row]:
    """Time artifacts against each other; the first is the baseline of the speed-ups.

    Args:
        artifacts: files, or rows of finished runs as "RUN:variant/backend/precision/b1" (their batch does not matter here).
        backend: opens all files; None takes the one of each file's suffix. A row keeps its own.
        images: real samples uint8 [n, H, W, C]; None makes natural-looking noise of each model's size and the contract says so.

    Returns:
        A row for each artifact and batch size, artifact by artifact. `variant` is the file's name without suffix or the row's address, numbered
        where it is not unique: the same file twice is an A/A comparison.

    Raises:
        UsageError: nothing is there, or a suffix that no backend opens.
        ArtifactCorrupt: a run's artifact is not what its report vouches for.
    """
    targets = _numbered([_target(a, backend) for a in artifacts])
    subjects, rows = [], {}
    for target in targets:
        artifact = Artifact.of("onnx" if target.path.suffix == ".onnx" else "engine", target.path)
        options = SessionOptions(threads, device, "fp32" if target.precision == UNKNOWN_PRECISION else target.precision, target.options)
        subjects.append(Subject(target.name, opener(target.backend), target.path, options))
        facts = {"path": target.path.name, "sha256": artifact.sha256, "bytes": artifact.size_bytes}
        rows[target.name] = Row(target.name, target.backend, target.precision, 0, "failed", options=dict(target.options), threads=threads, artifact=facts)
    with Group(subjects, Settings(min_seconds=seconds, seed=seed), progress) as group:
        results = {batch: _measure(group, batch, images, seed) for batch in batch_sizes}
    return [_row(rows[key], batch, results[batch], subjects[0].key) for key in rows for batch in batch_sizes]


def _measure(group: Group, batch: int, images: NDArray[np.uint8] | None, seed: int) -> dict[str, Measured | Failure]:
    given = {key: _images_for(opened.inputs, batch, seed) if images is None else images for key, opened in group.opened.items()}
    return group.measure(given, batch, SYNTHETIC if images is None else "images that were given")


def _row(row: Row, batch: int, results: dict[str, Measured | Failure], baseline_key: str) -> Row:
    result, baseline = results[row.variant], results[baseline_key]
    row = with_figures(replace(row, batch=batch), result)
    if isinstance(result, Measured) and isinstance(baseline, Measured):
        row.speedup, row.speedup_ci95 = speedup(baseline, result)
    return row


def _images_for(inputs: Sequence[TensorSpec], batch: int, seed: int) -> NDArray[np.uint8]:
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


def precision_of(path: Path) -> Precision:
    """What an ONNX file is typed as: int8 if it quantises anything, else its narrowest float initializers.

    Raises:
        MissingDependency: onnx is not installed.
        ArtifactMismatch: the file is no ONNX model.
    """
    try:
        import onnx
    except ImportError:
        raise MissingDependency("onnx", "runtimes", "to read an ONNX file") from None
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # comes with onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except DecodeError as exc:
        raise ArtifactMismatch(f"{path.name} is not an ONNX model: {exc}") from exc
    if any(node.op_type.startswith(("QuantizeLinear", "DequantizeLinear", "QLinear")) for node in graph.node):
        return "int8"
    types = {tensor.data_type for tensor in graph.initializer}
    if onnx.TensorProto.FLOAT16 in types:
        return "fp16"
    return "bf16" if onnx.TensorProto.BFLOAT16 in types else "fp32"


def _target(artifact: str | Path, backend: str | None) -> _Target:
    path = Path(artifact)
    if path.is_file():
        name = backend or _backend_of(path)
        return _Target(path.stem, path, name, precision_of(path) if path.suffix == ".onnx" else UNKNOWN_PRECISION)
    run, colon, address = str(artifact).rpartition(":")
    if not colon:
        raise UsageError(f"wanted an artifact file, found nothing at '{artifact}'", "give a file, or RUN:variant/backend/precision/b1 for a row of a run")
    return _row_of_run(Path(run), address)


def _row_of_run(run: Path, address: str) -> _Target:
    """The artifact behind a row of a run's report, its bytes checked against the report."""
    report = run / "report.json"
    if not report.is_file():
        raise UsageError(f"wanted a run folder, found no report.json in '{run}'", "deployopt run RECIPE writes one when it ends")
    rows = [Row(**row) for row in json.loads(report.read_text())["rows"]]
    found = [row for row in rows if address in {row.key, row.key.rpartition("/")[0]}]
    if not found:
        raise UsageError(plugins.unknown("row", address, (row.key for row in rows)))
    row = found[0]
    if row.artifact is None:
        raise UsageError(f"row '{row.key}' has no artifact to open ({row.status}: {row.reason})")
    path = run / row.artifact["path"]
    Artifact("engine", path, row.artifact["sha256"], row.artifact["bytes"]).verified()
    return _Target(row.key.rpartition("/")[0], path, row.backend, row.precision, row.options)


def _backend_of(path: Path) -> str:
    if path.suffix not in BACKEND_OF_SUFFIX:
        known = ", ".join(BACKEND_OF_SUFFIX)
        raise UsageError(f"no backend is known for '{path.name}' (known suffixes: {known})", f"--backend {'|'.join(plugins.names('backends'))}")
    return BACKEND_OF_SUFFIX[path.suffix]


def _numbered(targets: Sequence[_Target]) -> list[_Target]:
    names = [t.name for t in targets]
    return [t if names.count(t.name) == 1 else replace(t, name=f"{t.name}#{names[: i + 1].count(t.name)}") for i, t in enumerate(targets)]
