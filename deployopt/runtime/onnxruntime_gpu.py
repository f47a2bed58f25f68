"""Sessions of ONNX Runtime's CUDA and TensorRT providers. Where ONNX Runtime would quietly compute on the CPU instead, nothing opens.

ONNX Runtime warns, and goes on without it, when a provider's libraries do not load; and it gives the CPU every node that a provider does not take. Both
are read from the session itself before it is used.
"""

import contextlib
import ctypes
import importlib
import io
import os
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from deployopt.errors import BackendUnavailable, ProviderFallback, UsageError
from deployopt.runtime import onnxruntime_session
from deployopt.runtime.cuda import Cuda, Gpu, Pinned, device_index, find_gpu
from deployopt.runtime.feeds import check_feeds
from deployopt.runtime.onnxruntime_session import QUANTIZING_WEIGHTS, Create, OnnxRuntimeSession, load_vendor
from deployopt.runtime.session import Array, Feed, Loaded, SessionOptions

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
PROVIDERS = (CUDA, TENSORRT)
_RECORD = "session.record_ep_graph_assignment_info"  # onnxruntime_session_options_config_keys.h, from 1.24 on
_NO_INT8 = "ONNX Runtime's CUDA provider has no INT8 convolution and would compute Q/DQ graphs in floating point"
CUDA_NOT_OFFERED = {  # docs/OperatorKernels.md, CUDAExecutionProvider
    "bf16": "ONNX Runtime's CUDA provider has no BF16 pooling, which would run on the CPU",
    "int8": _NO_INT8,
    "int8_fp16": _NO_INT8,
}
_TENSORRT_VERSIONS = ">=10,<11"  # onnxruntime-gpu 1.31.1's provider is linked to libnvinfer.so.10
PROFILE = "profile"  # in a session's `extra`: the shapes that the TensorRT provider builds its one engine for, as `runtime.tensorrt.Ranges`
_TENSORRT_FLAGS = {"fp32": (), "fp16": ("fp16",), "bf16": ("bf16",), "int8": ("int8",), "int8_fp16": ("int8", "fp16")}


def require(provider: str, device: str = "cpu") -> Gpu:
    """The GPU that a provider would compute on; "cpu" means no choice was made.

    Raises:
        BackendUnavailable: ONNX Runtime, its provider, the GPU or a library is missing: all that can be told, with what to install.
        DeviceUnavailable: there are GPUs, but not that one.
    """
    ort = load_vendor()
    offered = ort.get_available_providers()
    if provider in offered:
        gpu = find_gpu(device_index(device))
        _require_libraries(ort, provider)
        return gpu
    missing = f"the package onnxruntime {ort.__version__} is built without {provider} (it has: {', '.join(offered)})"
    install = f"pip uninstall onnxruntime; {_install(ort, provider)}"
    try:
        find_gpu(device_index(device))
    except BackendUnavailable as exc:
        raise BackendUnavailable(f"{missing}, and {exc.message}", f"{exc.remedy}; {install}") from exc
    raise BackendUnavailable(missing, install)


def _install(ort: Any, provider: str) -> str:
    """The command that brings a provider with the libraries it is linked to."""
    command = f"pip install 'onnxruntime-gpu[cuda,cudnn]=={ort.__version__}'"
    if provider == TENSORRT:
        major = str(getattr(ort, "cuda_version", "")).partition(".")[0]  # "" where ONNX Runtime is built for CPUs alone
        command += f"; pip install 'tensorrt{f'-cu{major}' if major else ''}{_TENSORRT_VERSIONS}'"
    return f"{command}  # with the CUDA and cuDNN that it was built for"


def _require_libraries(ort: Any, provider: str) -> None:
    """Load what the provider is linked to from where Python packages put it.

    Raises:
        BackendUnavailable: with the loader's words, which name the library.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every library that is not there
        ort.preload_dlls()
    if provider == TENSORRT:
        with contextlib.suppress(ImportError):  # this package's import loads its libraries, which no loader's path has
            importlib.import_module("tensorrt")
    name = provider[: -len("ExecutionProvider")].lower()
    library = Path(ort.__file__).parent / "capi" / f"libonnxruntime_providers_{name}.so"
    try:
        ctypes.CDLL(str(library))
    except OSError as exc:
        if "undefined symbol" in str(exc):  # of ONNX Runtime, which gives it when it loads the library itself; all others were found
            return
        raise BackendUnavailable(
            f"{provider} of onnxruntime-gpu {ort.__version__}, built for CUDA {ort.cuda_version}, does not load ({exc})", _install(ort, provider)
        ) from exc


def fallback(wanted: str, registered: Sequence[str], assigned: Sequence[Tuple[str, str]]) -> Optional[str]:
    """Why a session would compute elsewhere than it was asked to, None if it would not.

    Args:
        wanted: a provider.
        registered: the session's providers, the preferred one first.
        assigned: provider and description of every node.
    """
    if not registered or registered[0] != wanted:
        return f"{wanted} did not start, and ONNX Runtime went on with {', '.join(registered) or 'nothing'}"
    elsewhere = [(provider, node) for provider, node in assigned if provider != wanted]
    if not elsewhere:
        return None
    named = ", ".join(node for _, node in elsewhere[:3]) + (", …" if len(elsewhere) > 3 else "")
    where = ", ".join(dict.fromkeys(provider for provider, _ in elsewhere))
    return f"{wanted} takes {len(assigned) - len(elsewhere)} of {len(assigned)} nodes, {where} the others: {named}"


def provider_options(provider: str, precision: str, index: int, profile: Mapping[str, Mapping[str, Sequence[int]]]) -> Dict[str, str]:
    """Of an `onnxruntime.InferenceSession`. TensorRT's networks are weakly typed there: flags allow what the graph's types say.

    With a profile the TensorRT provider builds one engine for all batch sizes, when the session opens. Without one it takes its range from the inputs that
    come, and builds anew whenever one lies outside: then batches of 1 and of 8, and timing and scoring, may run different engines.
    No engine cache is kept: ONNX Runtime would deserialise what lies there, which is native code, unchecked.

    Args:
        profile: `PROFILE`'s value; {} where no input is dynamic, or nothing is known of the inputs to come.
    """
    if provider == CUDA:
        return {"device_id": str(index), "use_tf32": "0"}  # a 10-bit mantissa is not FP32
    shapes = {
        f"trt_profile_{bound}_shapes": ",".join(f"{name}:{'x'.join(map(str, shapes[bound]))}" for name, shapes in profile.items())
        for bound in ("min", "opt", "max")
        if profile
    }
    return {"device_id": str(index), **{f"trt_{flag}_enable": "1" for flag in _TENSORRT_FLAGS[precision]}, **shapes}


def create(path: Path, provider: str, options: SessionOptions, optimized: Optional[Path] = None, profile: Optional[Path] = None) -> Any:
    """An `onnxruntime.InferenceSession` of which every node is the provider's.

    Weights that the file holds in float stay so.
    For the TensorRT provider, TF32 is off from then on in this process: it has no option for that.

    Args:
        optimized, profile: as `onnxruntime_session.create` takes them.

    Raises:
        BackendUnavailable, DeviceUnavailable: as `require`.
        ProviderFallback: the provider did not start, or left nodes to another.
        ArtifactMismatch: not a model that this version of ONNX Runtime can run.
    """
    if provider == TENSORRT:
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # cuBLAS, cuDNN and TensorRT read it when they are loaded
    require(provider, options.device)
    asked = (provider, provider_options(provider, options.precision, device_index(options.device), options.extra.get(PROFILE, {})))
    session = onnxruntime_session.create(path, options.threads, {_RECORD: "1"}, optimized, profile, providers=[asked], without=[QUANTIZING_WEIGHTS])
    session.disable_fallback()  # of `run`, which would go on on the CPU after an error
    reason = fallback(provider, session.get_providers(), assignment(session))
    if reason is not None:
        raise ProviderFallback(f"{path.name}: {reason}", "see the log for ONNX Runtime's warnings; or take this provider out of build.options.onnxruntime")
    return session


def assignment(session: Any) -> List[Tuple[str, str]]:
    """Provider and description of every node, as the session was partitioned; it has to have been opened with that recorded."""
    parts = session.get_provider_graph_assignment_info()
    return [(part.ep_name, f"{node.op_type} '{node.name}'") for part in parts for node in part.get_nodes()]


def open_session(path: Path, provider: str, options: SessionOptions) -> "OnnxRuntimeGpuSession":
    """Open an ONNX file. The TensorRT provider builds its engine meanwhile, which may take minutes; without a profile, at the first inference of a shape.

    Args:
        options: `extra` may have `PROFILE`.

    Raises:
        BackendUnavailable: also where the provider does not execute this precision. DeviceUnavailable, ProviderFallback, ArtifactMismatch: as `create`.
    """
    if provider == CUDA and options.precision in CUDA_NOT_OFFERED:
        raise BackendUnavailable(CUDA_NOT_OFFERED[options.precision], "open the FP32 or FP16 model, or use the TensorRT provider")
    largest = {name: shapes["max"] for name, shapes in options.extra.get(PROFILE, {}).items()}
    return OnnxRuntimeGpuSession(partial(create, path, provider, options), device_index(options.device), largest)


class OnnxRuntimeGpuSession(OnnxRuntimeSession):
    """A session on one ONNX file on one GPU, in one stream. Outputs of `infer` are new arrays each time.

    Its `profile` has the host's time of each node, as ONNX Runtime's profiler does: of kernels that are launched and not waited for, that of the launch.

    Args:
        create: as `OnnxRuntimeSession` takes it.
        index: of the GPU.
        largest: shapes that the engine behind it takes, by input; ONNX Runtime would build another for larger ones.
    """

    def __init__(self, create: Create, index: int, largest: Optional[Mapping[str, Sequence[int]]] = None) -> None:
        super().__init__(create, streams=1)
        self._index = index
        self._largest = largest or {}
        self._cuda: Optional[Cuda] = None
        self._pinned: List[Pinned] = []

    def infer(self, feed: Feed) -> Dict[str, Array]:
        """As `session.Session`.

        Raises:
            UsageError: also where a batch is larger than those that the engine was built for.
        """
        self._check_batch(feed)
        return super().infer(feed)

    def _check_batch(self, feed: Feed) -> None:
        for name, shape in self._largest.items():
            if name in feed and feed[name].shape[:1] > tuple(shape[:1]):
                raise UsageError(
                    f"input '{name}': a batch of {len(feed[name])}; the engine is for up to {shape[0]}", "build it with this batch size in batch_sizes"
                )

    def load(self, feeds: Sequence[Feed]) -> Loaded:
        check_feeds(feeds, self.inputs)
        return DeviceLoaded(self._session, feeds, self.infer(feeds[0]), ("cuda", self._index), self._page_locked)

    def _page_locked(self, array: Array) -> Array:
        self._cuda = self._cuda or Cuda(self._index)
        memory = Pinned(self._cuda, array.nbytes)
        self._pinned.append(memory)
        view = memory.view(array.shape, array.dtype)
        view[...] = array
        return view

    def close(self) -> None:
        super().close()
        for memory in self._pinned:
            memory.close()
        self._pinned = []


class DeviceLoaded:
    """Feeds in host memory; each run copies one to the device, computes, and has the results copied to host memory.

    ONNX Runtime copies a host array to the device once, when it is bound, which timing would then leave out. So bound is memory of the device, which
    each run fills. Results are bound in host memory, to which ONNX Runtime copies them before it returns.

    Args:
        outputs: arrays of the shapes that these feeds give.
        device: kind and index, as `OrtValue` takes them.
        page_locked: puts an array into memory that the device copies from and to without a detour.
    """

    def __init__(
        self, session: Any, feeds: Sequence[Feed], outputs: Mapping[str, Array], device: Tuple[str, int], page_locked: Callable[[Array], Array]
    ) -> None:
        make = load_vendor().OrtValue.ortvalue_from_numpy
        self._run = session.run_with_iobinding
        self._feeds = [{name: page_locked(array) for name, array in feed.items()} for feed in feeds]
        self._inputs = {name: make(np.array(array), *device) for name, array in feeds[0].items()}
        self.results = {name: page_locked(array) for name, array in outputs.items()}
        self._binding = session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, array in self.results.items():
            self._binding.bind_ortvalue_output(name, make(array))

    def __len__(self) -> int:
        return len(self._feeds)

    def run(self, index: int) -> None:
        for name, array in self._feeds[index % len(self._feeds)].items():
            self._inputs[name].update_inplace(array)
        self._run(self._binding)

    def device_ms(self) -> Optional[float]:
        return None
