"""Sessions of ONNX Runtime's CPU provider."""

import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from deployopt.errors import ArtifactMismatch, BackendUnavailable
from deployopt.runtime.feeds import check_feed, check_feeds
from deployopt.runtime.profile import WARM_UP_RUNS, typical
from deployopt.runtime.saturation import SATURATION_KEY, saturates_here
from deployopt.runtime.session import Array, Feed, LayerTime, Loaded, SessionOptions, TensorSpec

PROVIDER = "CPUExecutionProvider"
QUANTIZING_WEIGHTS = "WeightBiasQuantization"  # gives float weights behind a DequantizeLinear INT8 ones, asked or not
EXACT = "session.x64quantprecision"  # "1": kernels that cannot saturate; source: onnxruntime_session_options_config_keys.h
NOT_OFFERED = {  # ONNX Runtime inserts casts around its FP32 kernels: right results, but never that precision
    "fp16": "ONNX Runtime's CPU kernels compute FP16 graphs in FP32",
    "bf16": "ONNX Runtime has no BF16 convolution on CPUs",
    "int8_fp16": "ONNX Runtime's CPU kernels compute in FP32 what is not INT8: that is precision int8",
}
PRODUCTS = {  # convolutions and matrix products of optimised graphs (docs/ContribOperators.md), and what they compute in
    **dict.fromkeys(("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm"), "int8"),
    **dict.fromkeys(("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"), "fp32"),
}
_PRECISIONS = {"float": "fp32", "float16": "fp16", "int8": "int8", "uint8": "int8"}  # by an input's type, as profiles name it
Origins = Callable[[Path, Path], Sequence[Tuple[str, ...]]]  # (file, optimised file) → the file's nodes that each optimised node stands for
Create = Callable[..., Any]
_KERNEL = "_kernel_time"  # ends the name of an operator's event
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


def load_vendor() -> Any:
    """The module `onnxruntime`, its telemetry off: it would report to its maker from its import on.

    Raises:
        BackendUnavailable: it is not installed or does not import.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as exc:
        raise BackendUnavailable(f"onnxruntime cannot be imported ({exc})", "pip install 'deployopt[runtimes]'") from exc
    return onnxruntime


def create(
    path: Path,
    threads: int,
    config: Optional[Mapping[str, str]] = None,
    optimized: Optional[Path] = None,
    profile: Optional[Path] = None,
    optimize: bool = True,
    providers: Sequence[Any] = (PROVIDER,),
    without: Sequence[str] = (),
) -> Any:
    """An `onnxruntime.InferenceSession`, all graph optimisations on unless told otherwise.

    Its threads spin between operators and for a moment after a run, which is ONNX Runtime's default: on a two-core machine that is worth 15-27 % of
    a small ResNet-18's time. The harness waits before each block until the spinning of the session before has ended.

    Args:
        threads: that one inference uses, the caller's among them.
        config: further session configuration entries.
        optimized: where to write the graph that is really executed.
        profile: how the path begins of the file that its `end_profiling` writes; None times no operators.
        providers: names, or (name, options).
        without: graph optimisations to leave out, by their names.

    Raises:
        ArtifactMismatch: not a model that this version of ONNX Runtime can run.
    """
    ort = load_vendor()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    try:
        return ort.InferenceSession(str(path), options, providers=list(providers), disabled_optimizers=list(without))
    except _vendor_errors(ort) as exc:
        raise ArtifactMismatch(f"ONNX Runtime {ort.__version__} cannot run {path.name}: {exc}", "deployopt run RECIPE --fresh --until build") from exc


def create_exact(path: Path, threads: int, optimized: Optional[Path] = None, profile: Optional[Path] = None) -> Any:
    """As `create`, with slower kernels that cannot saturate where the model says that the fast ones might, and this CPU is one on which they do."""
    session = create(path, threads, optimized=optimized, profile=profile)
    if saturates_here() and SATURATION_KEY in session.get_modelmeta().custom_metadata_map:
        del session  # its profile is written when it goes, under the name that the next one's may get
        return create(path, threads, {EXACT: "1"}, optimized, profile)
    return session


def _is_exact(options: Any) -> bool:
    """Whether a session was made with `EXACT`."""
    try:
        return bool(options.get_session_config_entry(EXACT) == "1")
    except RuntimeError:  # it was not said
        return False


def _vendor_errors(ort: Any) -> Any:
    """Every exception type of ONNX Runtime; they share no base of their own."""
    state = ort.capi.onnxruntime_pybind11_state
    return tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))


def open_session(path: Path, options: SessionOptions, origins: Optional[Origins] = None) -> "OnnxRuntimeSession":
    """Open an ONNX file.

    Args:
        origins: tells a profile's ONNX nodes; where it is None they are not told.

    Raises:
        BackendUnavailable: ONNX Runtime is not installed, or does not execute this precision.
        ArtifactMismatch: not a model that this version of ONNX Runtime can run.
    """
    if options.precision in NOT_OFFERED:
        raise BackendUnavailable(NOT_OFFERED[options.precision], "open the FP32 or INT8 model")
    return OnnxRuntimeSession(partial(create_exact, path, options.threads), options.streams, partial(origins, path) if origins else None)


def open_unoptimized(path: Path, threads: int = 1) -> "OnnxRuntimeSession":
    """Open an ONNX file to be executed node by node as it is written, in any precision that has kernels: for checking it, not for timing.

    Raises:
        BackendUnavailable, ArtifactMismatch: as `open_session`.
    """
    return OnnxRuntimeSession(partial(create, path, threads, optimize=False))


class OnnxRuntimeSession:
    """A session on one ONNX file. Outputs of `infer` are new arrays each time.

    ONNX Runtime lets several threads run one session at once. Threads within a run are shared by them, so streams want one thread each.

    Args:
        create: makes an `InferenceSession`; takes `optimized` and `profile` as `create` does.
        origins: as `Origins`, of an optimised file.
    """

    def __init__(self, create: Create, streams: int = 1, origins: Optional[Callable[[Path], Sequence[Tuple[str, ...]]]] = None) -> None:
        self._create, self._origins = create, origins
        session = self._session = create()
        self.streams = streams
        self.inputs = [_spec(node) for node in session.get_inputs()]  # type: Sequence[TensorSpec]
        self.outputs = [_spec(node) for node in session.get_outputs()]  # type: Sequence[TensorSpec]
        self.provider = session.get_providers()[0]  # type: str

    def infer(self, feed: Feed) -> Dict[str, Array]:
        check_feed(feed, self.inputs)
        names = [spec.name for spec in self.outputs]
        results = self._session.run(names, dict(feed))
        return {name: results[i] for i, name in enumerate(names)}

    def load(self, feeds: Sequence[Feed]) -> Loaded:
        check_feeds(feeds, self.inputs)
        return _Loaded(self._session, feeds, self.infer(feeds[0]))

    def profile(self, feeds: Sequence[Feed], runs: int) -> List[LayerTime]:
        """As `session.Profiling`. Kernels are timed by ONNX Runtime's own profiler, in whole microseconds."""
        check_feeds(feeds, self.inputs)
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            session = self._create(optimized=optimized, profile=Path(folder) / "profile")
            names = [spec.name for spec in self.outputs]
            for index in range(WARM_UP_RUNS + runs):
                session.run(names, dict(feeds[index % len(feeds)]))
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
            layers = typical(_runs(events)[WARM_UP_RUNS:])
            nodes = self._origins(optimized) if self._origins is not None else []
        if len(nodes) != len(layers):  # untold, or subgraphs: their nodes run too and are in no list of the graph's
            return layers
        return [layer._replace(nodes=tuple(nodes[i])) for i, layer in enumerate(layers)]

    def close(self) -> None:
        self._session = None

    def __enter__(self) -> "OnnxRuntimeSession":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


class _Loaded:
    """Feeds bound with IOBinding, outputs included: some 10 µs a run less than `session.run`, and no copy."""

    def __init__(self, session: Any, feeds: Sequence[Feed], outputs: Mapping[str, Array]) -> None:
        make = load_vendor().OrtValue.ortvalue_from_numpy
        self._run = session.run_with_iobinding
        options = session.get_session_options()
        self._threads = options.intra_op_num_threads  # type: int
        self._exact = _is_exact(options)
        self._results = {name: make(np.empty_like(array)) for name, array in outputs.items()}
        self._feeds = [{name: make(np.ascontiguousarray(array)) for name, array in feed.items()} for feed in feeds]
        self._bindings = []
        for feed in self._feeds:
            binding = session.io_binding()
            for name, value in feed.items():
                binding.bind_ortvalue_input(name, value)
            for name, value in self._results.items():
                binding.bind_ortvalue_output(name, value)
            self._bindings.append(binding)

    def __len__(self) -> int:
        return len(self._bindings)

    def run(self, index: int) -> None:
        self._run(self._bindings[index % len(self._bindings)])

    def device_ms(self) -> Optional[float]:
        return None

    def execution(self) -> Dict[str, str]:
        """As `session.Explained`; see `create`."""
        exact = {"int8_kernels": "exact, since sums in 16 bits might overflow on this CPU"} if self._exact else {}
        return {**({"waiting_threads": "spin"} if self._threads > 1 else {}), **exact}


def _runs(events: Sequence[Mapping[str, Any]]) -> List[List[LayerTime]]:
    """The kernels of each inference in the order in which they ran; an event "model_run" closes each."""
    runs: List[List[LayerTime]] = [[]]
    for event in events:
        if event["name"] == "model_run":
            runs.append([])
        elif event["cat"] == "Node" and event["name"].endswith(_KERNEL):
            runs[-1].append(_layer(event))
    return runs[:-1]


def _layer(event: Mapping[str, Any]) -> LayerTime:
    kind = event["args"]["op_name"]
    types = [name for entry in event["args"].get("input_type_shape") or [] for name in entry]
    read = _PRECISIONS.get(types[0], types[0]) if types else "none"
    return LayerTime(event["name"][: -len(_KERNEL)], kind, (), PRODUCTS.get(kind, read), float(event["dur"]))


def _spec(node: Any) -> TensorSpec:
    """A dynamic axis that the file leaves unnamed is called by its position."""
    shape = tuple(dim if isinstance(dim, (int, str)) else f"dim{axis}" for axis, dim in enumerate(node.shape))
    return TensorSpec(node.name, shape, _DTYPES.get(node.type, node.type))
