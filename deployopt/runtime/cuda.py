"""The few CUDA calls that finding a GPU and running an engine need, through ctypes: no torch, no cuda-python."""

import contextlib
import ctypes
import glob
import importlib.util
import os
import re
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from deployopt.errors import BackendUnavailable, DeviceUnavailable
from deployopt.runtime import host

INSUFFICIENT_DRIVER = 35  # cudaErrorInsufficientDriver: this libcudart is newer than the driver
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_THREAD_LOCAL = 1  # cudaStreamCaptureMode: what other threads do meanwhile does not spoil a capture
SPIN, _SCHEDULE_MASK = 1, 7  # cudaDeviceScheduleSpin, cudaDeviceScheduleMask
_SCHEDULES = {0: "auto", SPIN: "spin", 2: "yield", 4: "block"}  # cudaDeviceSchedule…
# https://github.com/NVIDIA/TensorRT/issues/948, https://github.com/marcoslucianops/DeepStream-Yolo/issues/366: from 7 and 8
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|could not be allocated", re.IGNORECASE)
_POINTER, _OUT = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)

FUNCTIONS: Dict[str, List[Any]] = {  # of the CUDA runtime, with their arguments; all are there from 11.4 on, those for graphs not before
    "cudaGetErrorString": [ctypes.c_int],
    "cudaGetLastError": [],
    "cudaSetDevice": [ctypes.c_int],
    "cudaSetDeviceFlags": [ctypes.c_uint],
    "cudaGetDeviceFlags": [ctypes.POINTER(ctypes.c_uint)],
    "cudaMalloc": [_OUT, ctypes.c_size_t],
    "cudaFree": [_POINTER],
    "cudaHostAlloc": [_OUT, ctypes.c_size_t, ctypes.c_uint],
    "cudaFreeHost": [_POINTER],
    "cudaMemcpyAsync": [_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_int, _POINTER],
    "cudaStreamCreateWithFlags": [_OUT, ctypes.c_uint],
    "cudaStreamSynchronize": [_POINTER],
    "cudaStreamDestroy": [_POINTER],
    "cudaEventCreate": [_OUT],
    "cudaEventRecord": [_POINTER, _POINTER],
    "cudaEventElapsedTime": [ctypes.POINTER(ctypes.c_float), _POINTER, _POINTER],
    "cudaEventDestroy": [_POINTER],
    "cudaStreamBeginCapture": [_POINTER, ctypes.c_int],
    "cudaStreamEndCapture": [_POINTER, _OUT],
    "cudaGraphInstantiateWithFlags": [_OUT, _POINTER, ctypes.c_ulonglong],
    "cudaGraphLaunch": [_POINTER, _POINTER],
    "cudaGraphDestroy": [_POINTER],
    "cudaGraphExecDestroy": [_POINTER],
}


class Gpu(NamedTuple):
    """A GPU as the driver describes it.

    Attributes:
        name: e.g. "NVIDIA H100 80GB HBM3".
        compute_capability: e.g. "9.0".
        cuda_driver: newest CUDA version that the driver serves, e.g. "13.0".
        driver: its own version, e.g. "580.65.06"; None where NVML does not tell it.
    """

    name: str
    compute_capability: str
    cuda_driver: str
    driver: Optional[str] = None


def device_index(device: str) -> int:
    """N of "cuda:N"; 0 for "cuda" and for "cpu", which means no choice was made.

    Raises:
        DeviceUnavailable: neither of these.
    """
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise DeviceUnavailable(f"device '{device}' is not one of cpu, cuda, cuda:N")
    return int(index or 0)


def find_gpu(index: int = 0) -> Gpu:
    """Describe a GPU; the CUDA driver is asked, no context is made.

    Raises:
        BackendUnavailable: there is no driver or no GPU.
        DeviceUnavailable: there are GPUs, but not that one.
    """
    gpus = find_gpus()
    if index >= len(gpus):
        raise DeviceUnavailable(f"cuda:{index} was asked for; this machine has {len(gpus)} GPU(s)", "choose a device from cuda:0 on")
    return gpus[index]


def find_gpus() -> List[Gpu]:
    """Describe every GPU, by index; there is at least one.

    Raises:
        BackendUnavailable: there is no driver or no GPU.
    """
    driver = _driver()
    count, version = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    driver.cuDriverGetVersion(ctypes.byref(version))
    if not count.value:
        raise BackendUnavailable("the NVIDIA driver shows no GPU", "see `nvidia-smi`, and CUDA_VISIBLE_DEVICES")
    return [_describe(driver, index, version.value) for index in range(count.value)]


def names_of(gpus: Sequence[Gpu]) -> str:
    """Each kind of GPU once, as "NVIDIA H100 80GB HBM3"."""
    return ", ".join(dict.fromkeys(gpu.name for gpu in gpus))


def _describe(driver: ctypes.CDLL, index: int, version: int) -> Gpu:
    device = ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), index)
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    parts = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        parts.append(str(value.value))
    return Gpu(name.value.decode(), ".".join(parts), _dotted(version), next((gpu["driver"] for gpu in host.gpus()), None))


def _dotted(version: int) -> str:
    """CUDA's 1000 · major + 10 · minor as "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as exc:
        raise BackendUnavailable("no NVIDIA driver (libcuda.so.1 not found)", "install the NVIDIA driver, or run on a machine with a GPU") from exc
    code = driver.cuInit(0)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        said = (text.value or b"unknown error").decode()
        raise BackendUnavailable(f"the NVIDIA driver found no usable GPU (cuInit: error {code}, {said})", "see `nvidia-smi`, and CUDA_VISIBLE_DEVICES")
    return driver


def runtime_libraries() -> List[str]:
    """Where libcudart may be, best first: one that this process has loaded already, as TensorRT's is, the loader's path, then the wheels that CUDA
    packages install."""
    found = [*_loaded("libcudart.so."), "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0"]
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found += sorted(glob.glob(os.path.join(folder, "*", "lib", "libcudart.so.*")), reverse=True)
    return found


def _loaded(start: str) -> List[str]:
    """Paths of libraries of this process whose file names start so; [] where there is no /proc."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            paths = [line.rstrip("\n").partition("/")[2] for line in maps]
    except OSError:
        return []
    return list(dict.fromkeys(f"/{path}" for path in paths if os.path.basename(path).startswith(start)))


def runtime_version() -> Optional[str]:
    """Version of the CUDA runtime library that is found first, e.g. "12.9"; None without one. It needs no driver."""
    for name in runtime_libraries():
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        version = ctypes.c_int()
        library.cudaRuntimeGetVersion(ctypes.byref(version))
        return _dotted(version.value)
    return None


def is_out_of_memory(said: str) -> bool:
    """Whether a message of CUDA or TensorRT tells that a GPU's memory is taken."""
    return _OUT_OF_MEMORY.search(said) is not None


class Cuda:
    """The CUDA runtime: 11, 12 or 13, whichever is installed and served by the driver.

    Attributes:
        waiting_threads: how a thread waits for the device: "spin", which is asked for, as by trtexec's --useSpinWait, because it adds the least to a latency;
            or what is in force instead ("auto", "yield", "block") and why.

    Args:
        device: index of the GPU that this thread uses from now on.
    """

    def __init__(self, device: int = 0) -> None:
        problems = []
        for name in runtime_libraries():
            try:
                self._library = ctypes.CDLL(name)
            except OSError as exc:
                problems.append(str(exc))
                continue
            code = self._library.cudaGetDeviceCount(ctypes.byref(ctypes.c_int()))
            if code != INSUFFICIENT_DRIVER:
                break
            problems.append(f"{os.path.basename(name)} is newer than the NVIDIA driver")
        else:
            raise BackendUnavailable(
                f"no CUDA runtime library works here: {'; '.join(problems)}",
                "update the NVIDIA driver, or pip install nvidia-cuda-runtime for its CUDA version",
            )
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        for function, arguments in FUNCTIONS.items():
            if hasattr(self._library, function):
                getattr(self._library, function).argtypes = arguments
        self.call("cudaSetDevice", device)
        self.waiting_threads = self._spin()

    def _spin(self) -> str:
        """Have threads spin while they wait, and read back how they do.

        From 12 on the flags of a device that is in use already are overwritten; 11 refuses that (cudaErrorSetOnActiveProcess).
        """
        try:
            self.call("cudaSetDeviceFlags", SPIN)
        except BackendUnavailable as exc:
            refusal = f": {exc.message}"
        else:
            refusal = ""
        flags = ctypes.c_uint()
        self.call("cudaGetDeviceFlags", ctypes.byref(flags))
        chosen = flags.value & _SCHEDULE_MASK
        return _SCHEDULES[SPIN] if chosen == SPIN else f"{_SCHEDULES.get(chosen, chosen)} (spin was refused{refusal})"

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the CUDA runtime.

        Raises:
            BackendUnavailable: it returned an error, named with CUDA's text, or this CUDA runtime lacks it.
        """
        function = getattr(self._library, name, None)
        if function is None:
            raise BackendUnavailable(f"this CUDA runtime has no {name}", "install CUDA 11.4 or later")
        code = function(*arguments)
        if code:
            self._library.cudaGetLastError()  # or who asks for the last error next would take it for its own
            raise BackendUnavailable(f"{name}: CUDA error {code} ({self._library.cudaGetErrorString(code).decode()})", "see what `nvidia-smi` says of the GPU")

    def make(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """What a function writes through its first argument: an address, a stream, an event."""
        made = ctypes.c_void_p()
        self.call(name, ctypes.byref(made), *arguments)
        return made


class Pinned:
    """Page-locked host memory, which the GPU copies to and from without a detour."""

    def __init__(self, cuda: Cuda, size_bytes: int) -> None:
        self._cuda = cuda
        self.address = cuda.make("cudaHostAlloc", max(1, size_bytes), 0)
        raw = (ctypes.c_ubyte * max(1, size_bytes)).from_address(self.address.value or 0)
        self._bytes = np.ctypeslib.as_array(raw)

    def view(self, shape: Tuple[int, ...], dtype: Any) -> np.ndarray:
        """The first bytes, as an array."""
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return np.ndarray(shape, dtype, self._bytes[:size])

    def close(self) -> None:
        self._cuda.call("cudaFreeHost", self.address)


def number_of(handle: ctypes.c_void_p) -> int:
    """A stream or address as a number; ctypes tells zero, which is the default stream, as None."""
    return handle.value or 0


class Device:
    """Memory on the GPU."""

    def __init__(self, cuda: Cuda, size_bytes: int) -> None:
        self._cuda = cuda
        self.address = cuda.make("cudaMalloc", max(1, size_bytes))

    @property
    def pointer(self) -> int:
        """The address as a number."""
        return number_of(self.address)

    def close(self) -> None:
        self._cuda.call("cudaFree", self.address)


class Graph:
    """Work for a stream, captured once, launched as one: the host's cost of starting kernel after kernel is gone.

    Args:
        enqueue: enqueues the work on `stream`; False if it could not.

    Raises:
        BackendUnavailable: it cannot be captured.
    """

    def __init__(self, cuda: Cuda, stream: ctypes.c_void_p, enqueue: Callable[[], bool]) -> None:
        self._cuda = cuda
        captured = ctypes.c_void_p()
        cuda.call("cudaStreamBeginCapture", stream, _THREAD_LOCAL)
        try:
            enqueued = enqueue()
        except BaseException:  # Ctrl-C too: a stream that goes on capturing runs nothing any more
            with contextlib.suppress(BackendUnavailable):
                cuda.call("cudaStreamEndCapture", stream, ctypes.byref(captured))
                cuda.call("cudaGraphDestroy", captured)
            raise
        cuda.call("cudaStreamEndCapture", stream, ctypes.byref(captured))  # an invalidated capture ends with an error
        try:
            if not enqueued:
                raise BackendUnavailable("the engine does not run while it is captured")
            self._executable = cuda.make("cudaGraphInstantiateWithFlags", captured, 0)
        finally:
            cuda.call("cudaGraphDestroy", captured)

    def launch(self, stream: ctypes.c_void_p) -> None:
        self._cuda.call("cudaGraphLaunch", self._executable, stream)

    def close(self) -> None:
        self._cuda.call("cudaGraphExecDestroy", self._executable)
