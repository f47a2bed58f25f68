"""ONNX Runtime's TensorRT provider. The artifact is the canonical ONNX file, whose Q/DQ stand where TensorRT wants them; engines are built on opening."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from deployopt.artifact import FLOAT_PRECISIONS, INT8_PRECISIONS, Artifact
from deployopt.backends import BuildRequest, _onnx, _onnxruntime_gpu, _tensorrt
from deployopt.runtime.onnxruntime_gpu import TENSORRT, create, open_session
from deployopt.runtime.progress import Progress
from deployopt.runtime.session import Session, SessionOptions

distributions = ("onnxruntime-gpu", "tensorrt", "onnx")
build_depends_on_machine = False
builds_onnx = True

_UNVERIFIED = "ONNX Runtime's TensorRT provider does not tell what its engine computes in"

probe = partial(_onnxruntime_gpu.probe, TENSORRT, dict.fromkeys((*FLOAT_PRECISIONS, *INT8_PRECISIONS)))


def prepare(canonical: Path, precision: str, out: Path) -> Path:
    return _tensorrt.prepare(canonical, out)


def build(prepared: Path, out: Path, request: BuildRequest, progress: Progress) -> Artifact:
    return _onnx.build(
        prepared, out, request, progress, counter=f"{__name__}:check_nodes", provider=TENSORRT, arguments={"device": request.device}, unverified=_UNVERIFIED
    )


def open(path: Path, options: SessionOptions) -> Session:
    return open_session(path, TENSORRT, options)


def check_nodes(path: str, precision: str, device: str, progress: Progress) -> dict[str, int]:
    """Refuse a model of which another provider would run a node; layers cannot be counted."""
    create(Path(path), TENSORRT, SessionOptions(device=device, precision=precision))
    return {}
