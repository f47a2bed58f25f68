"""ONNX Runtime's CUDA provider, in the precisions of which it has kernels: FP32 and FP16. The artifact is the canonical ONNX file."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from deployopt.artifact import FLOAT_PRECISIONS, Artifact, Verified
from deployopt.backends import BuildRequest, _onnx, _onnxruntime_gpu
from deployopt.backends.onnxruntime import layers_by_precision
from deployopt.config import Strict
from deployopt.runtime.onnxruntime_gpu import CUDA, CUDA_NOT_OFFERED, create, open_session
from deployopt.runtime.progress import Progress
from deployopt.runtime.session import Session, SessionOptions

distributions = ("onnxruntime-gpu", "onnx")
build_depends_on_machine = False
builds_onnx = True
Options = Strict

_COUNTER = f"{__name__}:count_layers"

probe = partial(_onnxruntime_gpu.probe, CUDA, {**dict.fromkeys(FLOAT_PRECISIONS), **CUDA_NOT_OFFERED})


def prepare(canonical: Path, precision: str, out: Path) -> Path:
    return _onnx.prepare(canonical, precision, out)


def build(prepared: Path, out: Path, request: BuildRequest, progress: Progress) -> Artifact:
    return _onnx.build(prepared, out, request, progress, counter=_COUNTER, runtime="onnxruntime-cuda", provider=CUDA, arguments={"device": request.device})


def verify(path: Path, options: SessionOptions, progress: Progress, timeout_s: float) -> Verified:
    return _onnx.verify(path, options.precision, progress, timeout_s, counter=_COUNTER, arguments={"device": options.device})


def open(path: Path, options: SessionOptions) -> Session:
    return open_session(path, CUDA, options)


def count_layers(path: str, precision: str, device: str, progress: Progress) -> dict[str, int]:
    """Convolutions and matrix products that run on the GPU, which is all of them, by the type of their weights."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        create(Path(path), CUDA, SessionOptions(device=device, precision=precision), optimized)
        return layers_by_precision(optimized)
