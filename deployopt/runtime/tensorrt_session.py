"""Running an engine: named tensors, pinned buffers allocated once, `execute_async_v3` or a CUDA graph of it, CUDA events for the device clock."""

import ctypes
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from deployopt.errors import ArtifactMismatch, BackendUnavailable, UsageError
from deployopt.runtime import manifest as manifests
from deployopt.runtime.cuda import Cuda, Device, Graph, Pinned, device_index, find_gpu, number_of
from deployopt.runtime.manifest import REBUILD, Manifest
from deployopt.runtime.profile import WARM_UP_RUNS, typical
from deployopt.runtime.session import Array, Feed, LayerTime, Loaded, SessionOptions, TensorSpec
from deployopt.runtime.tensorrt import inspect, load_engine, new_context, sizes
from deployopt.runtime.tensorrt_api import Vendor
from deployopt.runtime.tensorrt_layers import Layer
from deployopt.runtime.tensorrt_vendor import load_vendor, make_logger, make_profiler
from deployopt.runtime.tensorrt_versions import is_rtx, specializes_kernels

_NOT_CAPTURED = "refused: TensorRT-RTX's engines are not captured"
_TO_DEVICE, _TO_HOST, _NON_BLOCKING = 1, 2, 1  # cudaMemcpyKind, cudaStreamNonBlocking
Shape = Tuple[int, ...]


def open_session(vendor: str, path: Path, options: SessionOptions) -> "TensorRTSession":
    """Open an engine on this machine's GPU; its bytes, version and GPU are checked before it is deserialised.

    Args:
        vendor: "tensorrt" or "tensorrt_rtx".
        options: `extra` may have "cuda_graph": True, which TensorRT heeds; TensorRT-RTX's sessions say that they do not.

    Raises:
        ArtifactCorrupt, ArtifactMismatch, BackendUnavailable, DeviceUnavailable.
    """
    described, plan = manifests.read_engine(path)
    trt = load_vendor(vendor)
    manifests.check_version(path, described, vendor, trt.__version__)
    index = device_index(options.device)
    try:
        gpu = find_gpu(index)
    except BackendUnavailable as exc:
        raise BackendUnavailable(
            f"{path.name} needs a GPU of compute capability {', '.join(described.compute_capabilities)}: {exc.message}", exc.remedy
        ) from exc
    manifests.check_gpu(path, described, gpu)
    return TensorRTSession(trt, plan, described, gpu.name, index, bool(options.extra.get("cuda_graph")))


class TensorRTSession:
    """A session on one engine, with one execution context on one CUDA stream. Device buffers hold the profile's largest shapes, so no shape
    allocates anew.

    Attributes:
        cuda_graph: "off"; "on"; or why a graph was wanted and kernels are launched one by one instead, as "refused: …".

    Args:
        trt: the vendor module.
        plan, manifest: bytes that passed the checks of `runtime/manifest.py`.
        provider: the GPU's name.
        device: index of the GPU.
        cuda_graph: launch the engine as a CUDA graph when it is timed. Copies stay outside of it, so the device clock measures the same thing.

    Raises:
        BackendUnavailable: CUDA does not work here.
        ArtifactMismatch: the vendor's library refuses the engine.
    """

    def __init__(self, trt: Vendor, plan: bytes, manifest: Manifest, provider: str, device: int = 0, cuda_graph: bool = False) -> None:
        self.inputs: Sequence[TensorSpec] = manifest.inputs
        self.outputs: Sequence[TensorSpec] = manifest.outputs
        self.provider = provider
        self.streams = 1
        self._trt = trt
        self.cuda_graph = "off" if not cuda_graph else _NOT_CAPTURED if is_rtx(trt) else "on"
        self._graph: Optional[Graph] = None
        self._cuda = Cuda(device)
        self._logger = make_logger(trt)
        self._dtypes = {s.name: np.dtype(s.dtype) for s in (*self.inputs, *self.outputs)}
        self._shapes: Dict[str, Shape] = {}
        self._device: Dict[str, Device] = {}
        self._host: Dict[str, Pinned] = {}
        self._bound: "weakref.WeakSet[_Loaded]" = weakref.WeakSet()  # whoever loaded them owns them
        with ExitStack() as acquired:  # what there is already is freed where the rest cannot be had
            self._acquire(plan, acquired)
            self._acquired = acquired.pop_all()

    def _acquire(self, plan: bytes, acquired: ExitStack) -> None:
        """Stream, events, engine and buffers of the largest shapes, in this order, each with what frees it; they are freed in the opposite one."""
        cuda = self._cuda
        self._stream = cuda.make("cudaStreamCreateWithFlags", _NON_BLOCKING)
        acquired.callback(cuda.call, "cudaStreamDestroy", self._stream)
        self._start = cuda.make("cudaEventCreate")
        acquired.callback(cuda.call, "cudaEventDestroy", self._start)
        self._stop = cuda.make("cudaEventCreate")
        acquired.callback(cuda.call, "cudaEventDestroy", self._stop)
        acquired.callback(self._let_go)
        self._engine, self._runtime = load_engine(self._trt, plan, self._logger)
        self._context = new_context(self._trt, self._engine, self._logger)
        self._limits = {s.name: [sizes(dims) for dims in self._engine.get_tensor_profile_shape(s.name, 0)] for s in self.inputs}
        self._set_shapes({name: limits[2] for name, limits in self._limits.items()})
        acquired.callback(self._free_buffers)
        for name in self._shapes:
            self._device[name] = Device(cuda, self._size(name))
            self._host[name] = Pinned(cuda, self._size(name))
            self._context.set_tensor_address(name, self._device[name].pointer)

    def _free_buffers(self) -> None:
        while self._device:
            self._device.popitem()[1].close()
        while self._host:
            self._host.popitem()[1].close()

    def _let_go(self) -> None:
        """Of the graph, and of the engine with its context and runtime, in this order."""
        self._drop_graph()
        for name in ("_context", "_engine", "_runtime"):
            self.__dict__.pop(name, None)

    def infer(self, feed: Feed) -> Dict[str, Array]:
        """Outputs by name, as copies that the caller owns.

        Raises:
            UsageError: inputs are missing or unknown, or a shape is outside the engine's profile.
        """
        self._set_shapes(self._checked(feed))
        for name, array in feed.items():
            self._host[name].view(array.shape, self._dtypes[name])[...] = array
        self._run({name: self._host[name] for name in feed})
        return {spec.name: self._host[spec.name].view(self._shapes[spec.name], self._dtypes[spec.name]).copy() for spec in self.outputs}

    def load(self, feeds: Sequence[Feed]) -> Loaded:
        """Bind feeds of one shape: each is put into pinned memory of its own, which is freed when the result is let go of.

        Raises:
            UsageError: no feeds, feeds of several shapes, or as `infer`.
        """
        shapes = [self._checked(feed) for feed in feeds]
        if not shapes or any(shape != shapes[0] for shape in shapes):
            raise UsageError(f"feeds to be timed must be of one shape, and at least one; {len(shapes)} were given, of shapes {shapes[:3]}")
        loaded = _Loaded(self, feeds, shapes[0])
        self._bound.add(loaded)
        return loaded

    def profile(self, feeds: Sequence[Feed], runs: int) -> List[LayerTime]:
        """As `session.Profiling`, with an execution context of its own and no CUDA graph, which has no layers.

        TensorRT times a layer from one CUDA event to the next, copies excluded.
        """
        loaded, measured, cuda_graph = self.load(feeds), self._context, self.cuda_graph
        profiler = make_profiler(self._trt)
        try:
            self.cuda_graph = "off"
            self._context, self._shapes = new_context(self._trt, self._engine, self._logger), {}  # no shape is set in it yet
            self._context.profiler = profiler
            for name, buffer in self._device.items():
                self._context.set_tensor_address(name, buffer.pointer)
            self._set_shapes(self._checked(feeds[0]))
            layers = {layer.name: layer for layer in self._layers()}
            found = []
            for index in range(WARM_UP_RUNS + runs):
                loaded.run(index)
                found.append([layer_time(layers.get(name), name, ms) for name, ms in profiler.take()])
        finally:
            self._context, self._shapes, self.cuda_graph = measured, {}, cuda_graph
        return typical(found[WARM_UP_RUNS:])

    def close(self) -> None:
        for loaded in list(self._bound):
            loaded.close()
        self._acquired.close()

    def execution(self) -> Dict[str, str]:
        """As `session.Explained`."""
        specialized = {"shape_specialization": "eager"} if specializes_kernels(self._trt) else {}
        return {"cuda_graph": self.cuda_graph, "waiting_threads": self._cuda.waiting_threads, **specialized}

    def __enter__(self) -> "TensorRTSession":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def _layers(self) -> List[Layer]:
        """What the engine runs at the shapes that are set; [] where its inspector does not tell."""
        try:
            return inspect(self._trt, self._engine, self._context)
        except ValueError:
            return []

    def _checked(self, feed: Feed) -> Dict[str, Shape]:
        names = [spec.name for spec in self.inputs]
        if set(feed) != set(names):
            raise UsageError(f"inputs {sorted(feed)} were given; the engine takes {names}")
        for name, array in feed.items():
            low, _, high = self._limits[name]
            if len(array.shape) != len(low) or any(not low[axis] <= size <= high[axis] for axis, size in enumerate(array.shape)):
                raise UsageError(f"input '{name}': shape {array.shape} is outside the engine's {low} to {high}", "build it with this batch size in batch_sizes")
        return {name: tuple(array.shape) for name, array in feed.items()}

    def _set_shapes(self, wanted: Dict[str, Shape]) -> None:
        if all(self._shapes.get(name) == shape for name, shape in wanted.items()):
            return
        self._drop_graph()  # a graph is of its context at the shapes of its capture
        for name, shape in wanted.items():
            if not self._context.set_input_shape(name, shape):
                raise UsageError(f"input '{name}': shape {shape} was refused: {'; '.join(self._logger.errors())}")
        self._shapes = {name: sizes(self._context.get_tensor_shape(name)) for name in self._dtypes}

    def _size(self, name: str) -> int:
        return int(np.prod(self._shapes[name], dtype=np.int64)) * self._dtypes[name].itemsize

    def _run(self, sources: Dict[str, Pinned]) -> None:
        """Copy in, execute, copy out, wait. The events enclose the execution alone."""
        for name, source in sources.items():
            self._cuda.call("cudaMemcpyAsync", self._device[name].address, source.address, self._size(name), _TO_DEVICE, self._stream)
        self._cuda.call("cudaEventRecord", self._start, self._stream)
        self._execute()
        self._cuda.call("cudaEventRecord", self._stop, self._stream)
        for spec in self.outputs:
            self._cuda.call("cudaMemcpyAsync", self._host[spec.name].address, self._device[spec.name].address, self._size(spec.name), _TO_HOST, self._stream)
        self._cuda.call("cudaStreamSynchronize", self._stream)

    def _execute(self) -> None:
        if self._graph is not None:
            self._graph.launch(self._stream)
        elif not self._enqueue():
            raise ArtifactMismatch(f"the engine refused to run: {'; '.join(self._logger.errors())}", REBUILD)

    def _enqueue(self) -> bool:
        return bool(self._context.execute_async_v3(number_of(self._stream)))

    def _capture(self) -> None:
        """Make a graph of the execution at the shapes that are set, if one is wanted and there is none; if that fails, none is wanted any more."""
        if self._graph is not None or self.cuda_graph != "on":
            return
        self._execute()  # what TensorRT postpones to the first run after a change of shapes may not be in the graph
        self._cuda.call("cudaStreamSynchronize", self._stream)
        try:
            self._graph = Graph(self._cuda, self._stream, self._enqueue)
        except BackendUnavailable as exc:
            self.cuda_graph = f"refused: {exc.message}"

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def _device_ms(self) -> float:
        milliseconds = ctypes.c_float()
        self._cuda.call("cudaEventElapsedTime", ctypes.byref(milliseconds), self._start, self._stop)
        return float(milliseconds.value)


def layer_time(layer: Optional[Layer], name: str, ms: float) -> LayerTime:
    """A time under its layer's facts; what an engine hides of a layer is "?"."""
    if layer is None:
        return LayerTime(name, "?", (), "?", ms * 1e3)
    return LayerTime(name, layer.kind, layer.nodes, layer.precision, ms * 1e3)


class _Loaded:
    """Feeds in pinned memory, rotated."""

    def __init__(self, session: TensorRTSession, feeds: Sequence[Feed], shapes: Dict[str, Shape]) -> None:
        self._session = session
        self._shapes = shapes
        self._ran = False
        self._sources: List[Dict[str, Pinned]] = []
        self._free = weakref.finalize(self, _free, self._sources)
        self._free.atexit = False  # the driver frees what a process leaves
        for feed in feeds:
            source: Dict[str, Pinned] = {}
            self._sources.append(source)
            for name, array in feed.items():
                dtype = session._dtypes[name]
                source[name] = Pinned(session._cuda, array.size * dtype.itemsize)
                source[name].view(array.shape, dtype)[...] = array

    def __len__(self) -> int:
        return len(self._sources)

    def run(self, index: int) -> None:
        self._session._set_shapes(self._shapes)
        self._session._capture()
        self._session._run(self._sources[index % len(self._sources)])
        self._ran = True

    def device_ms(self) -> Optional[float]:
        return self._session._device_ms() if self._ran else None

    def execution(self) -> Dict[str, str]:
        return self._session.execution()

    def close(self) -> None:
        self._free()


def _free(sources: List[Dict[str, Pinned]]) -> None:
    while sources:
        for buffer in sources.pop().values():
            buffer.close()
