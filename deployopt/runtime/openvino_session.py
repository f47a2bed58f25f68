"""Sessions of OpenVINO's CPU plugin."""

import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from deployopt.errors import ArtifactMismatch, BackendUnavailable
from deployopt.runtime.feeds import check_feed, check_feeds
from deployopt.runtime.profile import WARM_UP_RUNS
from deployopt.runtime.saturation import VNNI_KEY, saturates_here
from deployopt.runtime.session import Array, Feed, LayerTime, Loaded, SessionOptions, TensorSpec

DEVICE = "CPU"
_ONNX_METADATA = "framework"  # where a model that was read from ONNX keeps it
_TELEMETRY = "openvino_telemetry"
_HINTS = {"fp32": "f32", "int8": "f32", "fp16": "f16", "bf16": "bf16"}  # of what is not INT8; without it AMX machines run FP32 in BF16
_CAPABILITIES = {"int8": "INT8", "fp16": "FP16", "bf16": "BF16"}
_PRECISIONS = {"i8": "int8", "u8": "int8", "f32": "fp32", "f16": "fp16", "bf16": "bf16"}
Origins = Callable[[Path, Sequence[Sequence[str]]], Sequence[Tuple[str, ...]]]  # (file, what OpenVINO fused by layer) → the file's nodes by layer
LACKS_VNNI = "its INT8 is for CPUs with VNNI; on this one sums of products would overflow"
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


class Executed(NamedTuple):
    """A layer of a compiled model.

    Attributes:
        name: as OpenVINO calls it.
        kind: the CPU plugin's `layerType`.
        precision: that the plugin chose.
        origins: names of what was fused into it, after ONNX nodes or tensors or made up by OpenVINO.
    """

    name: str
    kind: str
    precision: str
    origins: Tuple[str, ...]


def compile_model(path: Path, options: SessionOptions, profiling: bool = False, to_run: bool = True) -> Any:
    """An `openvino.CompiledModel` for the lowest latency of one stream, or the throughput of several; no precision that was not asked for.

    Args:
        profiling: have every layer timed, which slows inference down.
        to_run: False if only its layers are to be read.

    Raises:
        BackendUnavailable: OpenVINO is not installed, or does not execute this precision here.
        ArtifactMismatch: not a model that this version of OpenVINO can run, or to be run and for CPUs with VNNI, which this one lacks.
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
        "PERF_COUNT": profiling,
    }
    try:
        model = core.read_model(str(path))
        if to_run and saturates_here() and model.has_rt_info([_ONNX_METADATA, VNNI_KEY]):
            raise ArtifactMismatch(f"{path.name}: {LACKS_VNNI}", "build it on this machine, or with build.options.openvino.vnni: false")
        return core.compile_model(model, DEVICE, properties)
    except RuntimeError as exc:
        raise ArtifactMismatch(f"OpenVINO {ov.__version__} cannot run {path.name}: {exc}", "deployopt run RECIPE --fresh --until build") from exc


def executed_layers(compiled: Any) -> List[Executed]:
    """What the CPU plugin really runs, constants and the like among it, read from the compiled model's runtime graph."""
    layers = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = {key: _text(value) for key, value in op.get_rt_info().items()}
        if "layerType" in info:
            chosen, fused = info["runtimePrecision"], info.get("originalLayersNames", "")
            layers.append(Executed(op.friendly_name, info["layerType"], _PRECISIONS.get(chosen, chosen), tuple(name for name in fused.split(",") if name)))
    return layers


def _text(value: Any) -> str:
    """An entry of rt_info: an OVAny in some versions, a string in others."""
    return str(value.astype(str)) if hasattr(value, "astype") else str(value)


def open_session(path: Path, options: SessionOptions, origins: Optional[Origins] = None) -> "OpenVINOSession":
    """Open an ONNX (or OpenVINO IR) file. Raises as `compile_model`.

    Args:
        origins: finds a profile's ONNX nodes; where it is None they are called as OpenVINO calls them.
    """
    return OpenVINOSession(path, options, origins)


class OpenVINOSession:
    """A session on one compiled model. Outputs of `infer` are copies each time; everything loaded has an infer request of its own.

    Args: as of `open_session`.
    """

    def __init__(self, path: Path, options: SessionOptions, origins: Optional[Origins] = None) -> None:
        compiled = self._compiled = compile_model(path, options)
        self._path, self._options, self._origins = path, options, origins
        self._tensor = load_vendor().Tensor
        self._request = compiled.create_infer_request()
        self.streams = options.streams
        self._threads = compiled.get_property("INFERENCE_NUM_THREADS") // options.streams  # fewer than asked for where the process may use fewer cores
        self.inputs = [_spec(port) for port in compiled.inputs]  # type: Sequence[TensorSpec]
        self.outputs = [_spec(port) for port in compiled.outputs]  # type: Sequence[TensorSpec]
        self.provider = DEVICE

    def infer(self, feed: Feed) -> Dict[str, Array]:
        check_feed(feed, self.inputs)  # OpenVINO would reuse the last run's array for a missing one
        _Loaded(self._tensor, self._request, self.inputs, [feed]).run(0)
        return {spec.name: self._request.get_output_tensor(i).data.copy() for i, spec in enumerate(self.outputs)}

    def load(self, feeds: Sequence[Feed]) -> Loaded:
        check_feeds(feeds, self.inputs)
        return _Loaded(self._tensor, self._compiled.create_infer_request(), self.inputs, feeds, self._threads)

    def profile(self, feeds: Sequence[Feed], runs: int) -> List[LayerTime]:
        """As `session.Profiling`. Layers are timed by OpenVINO's performance counters, in whole microseconds.

        A counter gives the mean over all runs since the model was compiled, the first one included, which packs weights and compiles kernels and can
        take a hundred times as long (perf_count.h of the CPU plugin). So what the warm-up took is subtracted.
        """
        check_feeds(feeds, self.inputs)
        compiled = compile_model(self._path, self._options._replace(streams=1), profiling=True)
        request = compiled.create_infer_request()
        loaded = _Loaded(self._tensor, request, self.inputs, feeds)
        totals = [_totals_us(loaded, request, 0, WARM_UP_RUNS), _totals_us(loaded, request, WARM_UP_RUNS, WARM_UP_RUNS + runs)]
        times = {name: max(0.0, (total - totals[0].get(name, 0.0)) / runs) for name, total in totals[1].items()}
        layers = [layer for layer in executed_layers(compiled) if layer.name in times]
        names = [layer.origins for layer in layers]
        nodes = self._origins(self._path, names) if self._origins is not None else names
        return [LayerTime(layer.name, layer.kind, tuple(nodes[i]), layer.precision, times[layer.name]) for i, layer in enumerate(layers)]

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

    Args:
        threads: that one inference uses, the caller's among them.
    """

    def __init__(self, tensor: Any, request: Any, inputs: Sequence[TensorSpec], feeds: Sequence[Mapping[str, Array]], threads: int = 1) -> None:
        self._request, self._threads = request, threads
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

    def execution(self) -> Dict[str, str]:
        """As `session.Explained`. The caller computes too, in oneTBB's arena of its stream, and there is no option: whoever of an arena finds no work pauses
        and yields about a hundred times (the caller more often), then sleeps until there is some.

        Source: OpenVINO's iasync_infer_request.cpp (ImmediateStreamsExecutor); oneTBB 2021.13's scheduler_common.h (stealing_loop_backoff) and waiters.h.
        """
        return {"waiting_threads": "spin, then block"} if self._threads > 1 else {}


def _totals_us(loaded: _Loaded, request: Any, done: int, until: int) -> Dict[str, float]:
    """Run from `done` to `until` inferences and give each executed layer's time in all `until` of them; what was fused away is listed as not run."""
    for index in range(done, until):
        loaded.run(index)
    ran = [entry for entry in request.get_profiling_info() if entry.status.name == "EXECUTED"]
    return {entry.node_name: until * entry.real_time.total_seconds() * 1e6 for entry in ran}


def _spec(port: Any) -> TensorSpec:
    """OpenVINO keeps no names of dynamic axes: the first is the batch, others are called by their position."""
    shape = tuple((f"dim{axis}" if axis else "batch") if dim.is_dynamic else dim.get_length() for axis, dim in enumerate(port.partial_shape))
    return TensorSpec(port.any_name, shape, port.element_type.to_dtype().name)
