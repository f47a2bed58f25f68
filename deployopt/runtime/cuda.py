"""The few CUDA calls that finding a GPU and running an engine need, through ctypes: no torch, no cuda-python."""

import ctypes
import glob
import importlib.util
import os
from typing import Any, List, NamedTuple, Sequence, Tuple

import numpy as np

from deployopt.errors import BackendUnavailable, DeviceUnavailable

INSUFFICIENT_DRIVER = 35  # cudaErrorInsufficientDriver: this libcudart is newer than the driver
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


class Gpu(NamedTuple):
    """A GPU as the driver describes it.

    Attributes:
        name: e.g. "NVIDIA H100 80GB HBM3".
        compute_capability: e.g. "9.0".
        cuda_driver: newest CUDA version that the driver serves, e.g. "13.0".
    """

    name: str
    compute_capability: str
    cuda_driver: str


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
    return Gpu(name.value.decode(), ".".join(parts), f"{version // 1000}.{version % 1000 // 10}")


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
    """Where libcudart may be, best first: the loader's path, then the wheels that CUDA packages install."""
    found = ["libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0"]
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found += sorted(glob.glob(os.path.join(folder, "*", "lib", "libcudart.so.*")), reverse=True)
    return found


class Cuda:
    """The CUDA runtime: 11, 12 or 13, whichever is installed and served by the driver."""

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
        self._declare()
        self.call("cudaSetDevice", device)

    def _declare(self) -> None:
        pointer, size, code, flags = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint
        out = ctypes.POINTER(pointer)
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        for name, arguments in (
            ("cudaGetErrorString", [code]),
            ("cudaSetDevice", [code]),
            ("cudaMalloc", [out, size]),
            ("cudaFree", [pointer]),
            ("cudaHostAlloc", [out, size, flags]),
            ("cudaFreeHost", [pointer]),
            ("cudaMemcpyAsync", [pointer, pointer, size, code, pointer]),
            ("cudaStreamCreateWithFlags", [out, flags]),
            ("cudaStreamSynchronize", [pointer]),
            ("cudaStreamDestroy", [pointer]),
            ("cudaEventCreate", [out]),
            ("cudaEventRecord", [pointer, pointer]),
            ("cudaEventElapsedTime", [ctypes.POINTER(ctypes.c_float), pointer, pointer]),
            ("cudaEventDestroy", [pointer]),
        ):
            getattr(self._library, name).argtypes = arguments

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the CUDA runtime.

        Raises:
            BackendUnavailable: it returned an error, named with CUDA's text.
        """
        code = getattr(self._library, name)(*arguments)
        if code:
            raise BackendUnavailable(f"{name}: CUDA error {code} ({self._library.cudaGetErrorString(code).decode()})", "see `nvidia-smi` for the GPU's state")

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


class Device:
    """Memory on the GPU."""

    def __init__(self, cuda: Cuda, size_bytes: int) -> None:
        self._cuda = cuda
        self.address = cuda.make("cudaMalloc", max(1, size_bytes))

    def close(self) -> None:
        self._cuda.call("cudaFree", self.address)
