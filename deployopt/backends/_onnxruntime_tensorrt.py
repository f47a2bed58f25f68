"""ONNX Runtime's TensorRT provider. The artifact is the canonical ONNX file, whose Q/DQ stand where TensorRT wants them; the engine is built on opening."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from deployopt.artifact import FLOAT_PRECISIONS, INT8_PRECISIONS, Artifact
from deployopt.backends import BuildRequest, _onnx, _onnxruntime_gpu, _tensorrt
from deployopt.backends._shared import load
from deployopt.config import Strict
from deployopt.runtime.onnxruntime_gpu import PROFILE, TENSORRT, create, open_session
from deployopt.runtime.progress import Progress
from deployopt.runtime.session import Session, SessionOptions
from deployopt.runtime.tensorrt import ranges_of

distributions = ("onnxruntime-gpu", "tensorrt", "onnx")
build_depends_on_machine = False
builds_onnx = True
Options = Strict
builds_on_opening = True

_UNVERIFIED = "ONNX Runtime's TensorRT provider does not tell what its engine computes in"

probe = partial(_onnxruntime_gpu.probe, TENSORRT, dict.fromkeys((*FLOAT_PRECISIONS, *INT8_PRECISIONS)))


def prepare(canonical: Path, precision: str, out: Path) -> Path:
    return _tensorrt.prepare(canonical, out)


def build(prepared: Path, out: Path, request: BuildRequest, progress: Progress) -> Artifact:
    """One optimisation profile, as the backend `tensorrt` has it: minimum batch 1, optimum and maximum the largest of `request.batch_sizes`. It is recorded
    in the artifact's options, with which every session on it opens."""
    profile = profile_of(prepared, request.batch_sizes)
    return _onnx.build(
        prepared,
        out,
        request,
        progress,
        counter=f"{__name__}:check_nodes",
        runtime="onnxruntime-tensorrt",
        provider=TENSORRT,
        arguments={"device": request.device, "profile": profile},
        options={PROFILE: profile},
        unverified=_UNVERIFIED,
    )


def profile_of(prepared: Path, batch_sizes: tuple[int, ...]) -> dict[str, dict[str, list[int]]]:
    """`runtime.tensorrt.ranges_of` the model's inputs, as JSON.

    Raises:
        BuildFailed: as that.
    """
    ranges = ranges_of(_onnx.specs(load(prepared).graph.input), batch_sizes)
    return {name: {bound: list(shape) for bound, shape in bounds.items()} for name, bounds in ranges.items()}


def open(path: Path, options: SessionOptions) -> Session:
    return open_session(path, TENSORRT, options)


def check_nodes(path: str, precision: str, device: str, profile: Mapping[str, Any], progress: Progress) -> dict[str, int]:
    """Refuse a model of which another provider would run a node; layers cannot be counted."""
    create(Path(path), TENSORRT, SessionOptions(device=device, precision=precision, extra={PROFILE: profile}))
    return {}
