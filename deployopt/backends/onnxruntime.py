"""ONNX Runtime on CPUs. The artifact is the ONNX file in the dialect its kernels fuse; it compiles when a session opens."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from deployopt.artifact import Artifact, Availability, Verified
from deployopt.backends import BuildRequest, _onnx, _shared
from deployopt.runtime import host
from deployopt.runtime.onnxruntime_session import NOT_OFFERED, PRODUCTS, PROVIDER, create_exact, load_vendor, open_session
from deployopt.runtime.progress import Progress
from deployopt.runtime.session import Session, SessionOptions

if TYPE_CHECKING:
    from onnx import NodeProto

distributions = ("onnxruntime", "onnxruntime-gpu", "onnx")
build_depends_on_machine = False
builds_onnx = True
providers = {name: f"{__package__}._onnxruntime_{name}" for name in ("cuda", "tensorrt")}

settle = _onnx.settle

_COUNTER = f"{__name__}:count_layers"
_FLOATS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Options(_onnx.CpuOptions):
    """Build options of ONNX Runtime; `vnni` concerns its CPU provider."""

    providers: tuple[Literal["cpu", "cuda", "tensorrt"], ...] = Field(("cpu",), min_length=1, strict=False)
    """Execution providers to build for; each has rows of its own (onnxruntime, onnxruntime-cuda, onnxruntime-tensorrt). cuda and
    tensorrt: not yet tried on a GPU."""

    @field_validator("providers")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError(f"a provider is named twice: {', '.join(names)}")
        return names

    @model_validator(mode="after")
    def _of_the_cpu(self) -> Self:
        if self.vnni is not None and "cpu" not in self.providers:
            raise ValueError("vnni concerns the provider cpu, which is not among the providers")
        return self


def probe() -> Availability:
    return _shared.probe(load_vendor, _offered)


def _offered(ort: Any) -> Availability:
    return Availability(True, True, ort.__version__, host.cpu()["model"], None, {"fp32": None, "int8": None, **NOT_OFFERED})


def prepare(canonical: Path, precision: str, out: Path, options: Mapping[str, Any] = MappingProxyType({})) -> Path:
    from deployopt.graph.dialects import to_unsigned

    return _onnx.prepare(canonical, precision, out, to_unsigned, options)


def build(prepared: Path, out: Path, request: BuildRequest, progress: Progress) -> Artifact:
    return _onnx.build(prepared, out, request, progress, counter=_COUNTER, runtime="onnxruntime", provider=PROVIDER, accepted=_onnx.CpuOptions)


def verify(path: Path, options: SessionOptions, progress: Progress, timeout_s: float) -> Verified:
    return _onnx.verify(path, options.precision, progress, timeout_s, counter=_COUNTER)


def open(path: Path, options: SessionOptions) -> Session:
    return open_session(path, options, _origins)


def _origins(path: Path, optimized: Path) -> list[tuple[str, ...]]:
    from deployopt.graph import origins

    return origins.of_optimized(_shared.load(path).graph, _shared.load(optimized).graph)


def count_layers(path: str, precision: str, progress: Progress) -> dict[str, int]:
    """Convolutions and matrix products of the graph that ONNX Runtime really executes, by precision."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        create_exact(Path(path), threads=1, optimized=optimized)
        return layers_by_precision(optimized)


def layers_by_precision(optimized: Path) -> dict[str, int]:
    """Of a graph that ONNX Runtime wrote: INT8 by the operator, otherwise by the type of the weights, whether stored or dequantised."""
    from deployopt.graph.editing import Graph

    graph = Graph(_shared.load(optimized).graph)

    def precision(layer: NodeProto) -> str:
        dequantizer = graph.producer(layer.input[1], "DequantizeLinear")
        dtype = graph.constant_dtype(layer.input[1] if dequantizer is None else dequantizer.input[1])
        return "float" if dtype is None else _FLOATS.get(dtype, dtype)

    return dict(Counter("int8" if PRODUCTS[layer.op_type] == "int8" else precision(layer) for layer in graph.nodes(*PRODUCTS)))
