"""Sessions of OpenVINO's CPU plugin."""

import sys
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence

import numpy as np

from deployopt.errors import ArtifactMismatch, BackendUnavailable
from deployopt.runtime.feeds import check_feed, check_feeds
from deployopt.runtime.session import Array, Feed, Loaded, SessionOptions, TensorSpec

DEVICE = "CPU"
_TELEMETRY = "openvino_telemetry"
_HINTS = {"fp32": "f32", "int8": "f32", "fp16": "f16", "bf16": "bf16"}  # of what is not INT8; without it AMX machines run FP32 in BF16
_CAPABILITIES = {"int8": "INT8", "fp16": "FP16", "bf16": "BF16"}
_MIXED = "OpenVINO's CPU plugin takes the INT8 dialect with FP32 around it: that is precision int8"


def load_vendor() -> Any:
    """The module `openvino`, imported so that it sends nothing: by default the import alone reports to its maker's analytics.

    Raises:
        BackendUnavailable: it is not installed or does not import.
    """
    hidden = "openvino" not in sys.modules and _TELEMETRY not in sys.modules
    if hidden:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # an ImportError, for which OpenVINO has a stub
    try:
        import openvino
    except ImportError as exc:
        raise BackendUnavailable(f"openvino cannot be imported ({exc})", "pip install 'deployopt[runtimes]'") from exc
    finally:
        if hidden:
            del sys.modules[_TELEMETRY]
    return openvino


def not_offered(capabilities: Sequence[str], precision: str) -> Optional[str]:
    """Why a precision would not really be executed, None if it is. OpenVINO accepts any hint and then computes in FP32.

    Args:
        capabilities: the device's OPTIMIZATION_CAPABILITIES.
    """
    if precision == "int8_fp16":
        return _MIXED
    needed = _CAPABILITIES.get(precision)
    if needed is None or needed in capabilities:
        return None
    return f"OpenVINO has no {needed} kernels for this CPU and would compute in FP32 (its capabilities: {', '.join(capabilities)})"


def compile_model(path: Path, options: SessionOptions) -> Any:
    """An `openvino.CompiledModel` for the lowest latency of one stream, or the throughput of several; no precision that was not asked for.

    Raises:
        BackendUnavailable: OpenVINO is not installed, or does not execute this precision here.
        ArtifactMismatch: not a model that this version of OpenVINO can run.
    """
    ov = load_vendor()
    core = ov.Core()
    reason = not_offered(core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"), options.precision)
    if reason is not None:
        raise BackendUnavailable(reason, "open the FP32 or INT8 model")
    properties = {
        "INFERENCE_PRECISION_HINT": _HINTS[options.precision],
        "PERFORMANCE_HINT": "LATENCY" if options.streams == 1 else "THROUGHPUT",
        "NUM_STREAMS": options.streams,
        "INFERENCE_NUM_THREADS": options.threads * options.streams,
    }
    try:
        return core.compile_model(core.read_model(str(path)), DEVICE, properties)
    except RuntimeError as exc:
        raise ArtifactMismatch(f"OpenVINO {ov.__version__} cannot run {path.name}: {exc}", "deployopt run RECIPE --fresh --until build") from exc


def open_session(path: Path, options: SessionOptions) -> "OpenVINOSession":
    """Open an ONNX (or OpenVINO IR) file. Raises as `compile_model`."""
    return OpenVINOSession(load_vendor(), compile_model(path, options), options.streams)


class OpenVINOSession:
    """A session on one compiled model. Outputs of `infer` are copies each time; everything loaded has an infer request of its own."""

    def __init__(self, ov: Any, compiled: Any, streams: int = 1) -> None:
        self._tensor = ov.Tensor
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self.streams = streams
        self.inputs = [_spec(port) for port in compiled.inputs]  # type: Sequence[TensorSpec]
        self.outputs = [_spec(port) for port in compiled.outputs]  # type: Sequence[TensorSpec]
        self.provider = DEVICE

    def infer(self, feed: Feed) -> Dict[str, Array]:
        check_feed(feed, self.inputs)  # OpenVINO would reuse the last run's array for a missing one
        _Loaded(self._tensor, self._request, self.inputs, [feed]).run(0)
        return {spec.name: self._request.get_output_tensor(i).data.copy() for i, spec in enumerate(self.outputs)}

    def load(self, feeds: Sequence[Feed]) -> Loaded:
        check_feeds(feeds, self.inputs)
        return _Loaded(self._tensor, self._compiled.create_infer_request(), self.inputs, feeds)

    def close(self) -> None:
        self._request = self._compiled = None

    def __enter__(self) -> "OpenVINOSession":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


class _Loaded:
    """Feeds as tensors that share the arrays' memory; the result stays in the request's host memory.

    Every inference of a session goes through here: OpenVINO copies an array that is not shared into the input it used last, and that may be
    the caller's.
    """

    def __init__(self, tensor: Any, request: Any, inputs: Sequence[TensorSpec], feeds: Sequence[Mapping[str, Array]]) -> None:
        self._request = request
        self._arrays = [[np.ascontiguousarray(feed[spec.name]) for spec in inputs] for feed in feeds]
        self._feeds = [[tensor(array, shared_memory=True) for array in arrays] for arrays in self._arrays]

    def __len__(self) -> int:
        return len(self._feeds)

    def run(self, index: int) -> None:
        for position, tensor in enumerate(self._feeds[index % len(self._feeds)]):
            self._request.set_input_tensor(position, tensor)
        self._request.infer(share_outputs=True)

    def device_ms(self) -> Optional[float]:
        return None


def _spec(port: Any) -> TensorSpec:
    """OpenVINO keeps no names of dynamic axes: the first is the batch, others are called by their position."""
    shape = tuple((f"dim{axis}" if axis else "batch") if dim.is_dynamic else dim.get_length() for axis, dim in enumerate(port.partial_shape))
    return TensorSpec(port.any_name, shape, port.element_type.to_dtype().name)
