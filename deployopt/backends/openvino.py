"""OpenVINO on CPUs. The artifact is the ONNX file in its INT8 dialect; it compiles when a session opens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from deployopt.artifact import FLOAT_PRECISIONS, INT8_PRECISIONS, Artifact, Availability, Verified
from deployopt.backends import BuildRequest, _onnx, _shared
from deployopt.runtime.openvino_session import DEVICE, LACKS_VNNI, compile_model, executed_layers, load_vendor, not_offered, open_session
from deployopt.runtime.progress import Progress
from deployopt.runtime.session import Session, SessionOptions

distributions = ("openvino", "onnx")
build_depends_on_machine = False
builds_onnx = True

Options = _onnx.CpuOptions
settle = _onnx.settle

_COUNTER = f"{__name__}:count_layers"
_LAYERS = frozenset({"Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul"})  # CPU plugin's layerType


def probe() -> Availability:
    return _shared.probe(load_vendor, _offered)


def _offered(ov: Any) -> Availability:
    core = ov.Core()
    if DEVICE not in core.available_devices:
        return Availability(False, False, ov.__version__, None, f"OpenVINO finds no CPU plugin (devices: {', '.join(core.available_devices) or 'none'})")
    capabilities = core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    offered: dict[str, str | None] = {precision: not_offered(capabilities, precision) for precision in (*FLOAT_PRECISIONS, *INT8_PRECISIONS)}
    return Availability(True, True, ov.__version__, core.get_property(DEVICE, "FULL_DEVICE_NAME"), None, offered)


def prepare(canonical: Path, precision: str, out: Path, options: Mapping[str, Any] = MappingProxyType({})) -> Path:
    from deployopt.graph.dialects import to_openvino

    return _onnx.prepare(canonical, precision, out, to_openvino, options)


def build(prepared: Path, out: Path, request: BuildRequest, progress: Progress) -> Artifact:
    return _onnx.build(prepared, out, request, progress, counter=_COUNTER, runtime="openvino", provider=DEVICE, accepted=Options, lacks_vnni=LACKS_VNNI)


def verify(path: Path, options: SessionOptions, progress: Progress, timeout_s: float) -> Verified:
    return _onnx.verify(path, options.precision, progress, timeout_s, counter=_COUNTER)


def open(path: Path, options: SessionOptions) -> Session:
    return open_session(path, options, _origins)


def _origins(path: Path, names: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    from deployopt.graph import origins

    return origins.of_names(_shared.load(path).graph, names)


def count_layers(path: str, precision: str, progress: Progress) -> dict[str, int]:
    """Convolutions and matrix products of the compiled model, by the precision the CPU plugin chose for each."""
    compiled = compile_model(Path(path), SessionOptions(precision=precision), to_run=False)
    return dict(Counter(layer.precision for layer in executed_layers(compiled) if layer.kind in _LAYERS))
