"""ONNX Runtime on CPUs. The artifact is the ONNX file in the dialect its kernels fuse; it compiles when a session opens."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from deployopt.artifact import Artifact, Availability
from deployopt.backends import BuildRequest, _onnx
from deployopt.backends._shared import load, sentence
from deployopt.errors import BackendUnavailable
from deployopt.runtime import host
from deployopt.runtime.onnxruntime_session import NOT_OFFERED, PRODUCTS, PROVIDER, create_exact, load_vendor, open_session
from deployopt.runtime.progress import Progress
from deployopt.runtime.session import Session, SessionOptions

distributions = ("onnxruntime", "onnxruntime-gpu", "onnx")
build_depends_on_machine = False


def probe() -> Availability:
    try:
        ort = load_vendor()
    except BackendUnavailable as exc:
        return Availability(False, False, None, None, sentence(exc))
    return Availability(True, True, ort.__version__, host.cpu()["model"], None, {"fp32": None, "int8": None, **NOT_OFFERED})


def prepare(canonical: Path, precision: str, out: Path) -> Path:
    from deployopt.graph.dialects import to_unsigned

    return _onnx.prepare(canonical, precision, out, to_unsigned)


def build(prepared: Path, out: Path, request: BuildRequest, progress: Progress) -> Artifact:
    return _onnx.build(prepared, out, request, progress, counter=f"{__name__}:count_layers", provider=PROVIDER)


def open(path: Path, options: SessionOptions) -> Session:
    return open_session(path, options, _origins)


def _origins(path: Path, optimized: Path) -> list[tuple[str, ...]]:
    from deployopt.graph import origins

    return origins.of_optimized(load(path).graph, load(optimized).graph)


def count_layers(path: str, precision: str, progress: Progress) -> dict[str, int]:
    """Convolutions and matrix products of the graph that ONNX Runtime really executes, by precision."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        create_exact(Path(path), threads=1, optimized=optimized)
        kinds = [node.op_type for node in load(optimized).graph.node]
    return dict(Counter(PRODUCTS[kind] for kind in kinds if kind in PRODUCTS))
