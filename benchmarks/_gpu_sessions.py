"""What runs in the child processes of `gpu.py`: sessions by their openers, and the bare CUDA-event loop that the harness is held to."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _gpu_rows import read_samples

from deployopt.errors import BackendUnavailable
from deployopt.runtime import manifest
from deployopt.runtime.cuda import Cuda, Device, Pinned, number_of
from deployopt.runtime.preprocessing import to_feed
from deployopt.runtime.progress import Progress
from deployopt.runtime.sampler import time_block, warm_up
from deployopt.runtime.session import Session, SessionOptions, TensorSpec
from deployopt.runtime.statistics import bootstrap_ratio
from deployopt.runtime.tensorrt import load_engine, new_context, sizes
from deployopt.runtime.tensorrt_session import open_session
from deployopt.runtime.tensorrt_vendor import load_vendor, make_logger

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deployopt.nn.session import TorchSession

_TO_DEVICE, _TO_HOST, _NON_BLOCKING = 1, 2, 1  # cudaMemcpyKind, cudaStreamNonBlocking


def open_tensorrt(path: Path, options: SessionOptions) -> Session:
    return open_session("tensorrt", path, options)


def open_tensorrt_rtx(path: Path, options: SessionOptions) -> Session:
    return open_session("tensorrt_rtx", path, options)


def open_onnxruntime(path: Path, options: SessionOptions) -> Session:
    """`extra`: "provider", and what that takes."""
    from deployopt.runtime.onnxruntime_gpu import open_session as open_on_gpu

    return open_on_gpu(path, options.extra["provider"], options)


def open_torch(path: Path, options: SessionOptions) -> TorchSession:
    """torchvision's network with random weights, as its users run it. `extra`: "arch", "channels_last", and torch.compile's "mode" (None: eager)."""
    import torch
    import torchvision

    from deployopt.nn.session import TorchSession

    if not torch.cuda.is_available():
        raise BackendUnavailable(f"torch {torch.__version__} sees no GPU", "run this on a machine with a GPU and a torch built for CUDA")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    body = torchvision.models.get_model(options.extra["arch"], weights=None, num_classes=10).eval().to(options.device)
    module = _typed(body, torch.float16 if options.precision == "fp16" else torch.float32, options.extra["channels_last"])
    if options.extra["mode"] is not None:
        module = torch.compile(module, mode=options.extra["mode"], dynamic=False)  # type: ignore[assignment]
    specs = TensorSpec("input", ("batch", 3, 224, 224), "float32"), TensorSpec("output", ("batch", 10), "float32")
    return TorchSession(module, *specs, options.device)


def _typed(body: nn.Module, dtype: Any, channels_last: bool) -> nn.Module:
    """The network computing in a type and memory layout, with FP32 inputs and outputs."""
    import torch

    layout = torch.channels_last if channels_last else torch.contiguous_format

    class Typed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body.to(dtype=dtype).to(memory_format=layout)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.to(dtype=dtype, memory_format=layout)).float()  # type: ignore[no-any-return]

    return Typed()


class BareLoop:
    """As little as timing an engine takes: one context, one stream, one buffer a tensor, two events."""

    def __init__(self, vendor: str, path: Path, feed: np.ndarray) -> None:
        described, plan = manifest.read_engine(path)
        trt = load_vendor(vendor)
        self._cuda, self._logger = Cuda(), make_logger(trt)
        self._engine, self._runtime = load_engine(trt, plan, self._logger)
        self._context = new_context(trt, self._engine, self._logger)
        source, result = described.inputs[0].name, described.outputs[0].name
        self._context.set_input_shape(source, feed.shape)
        self._sizes = feed.nbytes, 4 * int(np.prod(sizes(self._context.get_tensor_shape(result))))  # float32
        self._host = [Pinned(self._cuda, size) for size in self._sizes]
        self._device = [Device(self._cuda, size) for size in self._sizes]
        self._host[0].view(feed.shape, feed.dtype)[...] = feed
        for name, buffer in zip((source, result), self._device, strict=True):
            self._context.set_tensor_address(name, buffer.pointer)
        self._stream = self._cuda.make("cudaStreamCreateWithFlags", _NON_BLOCKING)
        self._events = [self._cuda.make("cudaEventCreate") for _ in range(2)]

    def device_ms(self, iterations: int) -> list[float]:
        call, stream, elapsed, times = self._cuda.call, self._stream, ctypes.c_float(), []
        for _ in range(iterations):
            call("cudaMemcpyAsync", self._device[0].address, self._host[0].address, self._sizes[0], _TO_DEVICE, stream)
            call("cudaEventRecord", self._events[0], stream)
            self._context.execute_async_v3(number_of(stream))
            call("cudaEventRecord", self._events[1], stream)
            call("cudaMemcpyAsync", self._host[1].address, self._device[1].address, self._sizes[1], _TO_HOST, stream)
            call("cudaStreamSynchronize", stream)
            call("cudaEventElapsedTime", ctypes.byref(elapsed), *self._events)
            times.append(elapsed.value)
        return times


def compare_with_bare_loop(
    *, vendor: str, engine: str, samples: str, batch: int, rounds: int, most_runs: int, seconds: float, progress: Progress
) -> dict[str, Any]:
    """Device medians of the harness's sampler and of a bare loop over the same engine, in turn: their ratio should be within 1 % of 1.

    Each round has `most_runs` of either, or fewer so that all rounds take about so many seconds.
    """
    feed = to_feed(read_samples(Path(samples)).images[:batch])
    rng = np.random.default_rng(batch)
    with open_session(vendor, Path(engine), SessionOptions(device="cuda")) as session:
        loaded, bare = session.load([{session.inputs[0].name: feed}]), BareLoop(vendor, Path(engine), feed)
        iterations = max(1, min(most_runs, int(seconds * 1e3 / (2 * rounds * warm_up(loaded).estimate_ms))))
        bare.device_ms(iterations)
        ours, theirs = [], []
        for _ in range(rounds):
            for harness in rng.permutation([True, False]):
                if harness:
                    ours.append(float(np.median(np.asarray(time_block(loaded, iterations).device_ms))))
                else:
                    theirs.append(float(np.median(bare.device_ms(iterations))))
    return {
        "harness_ms": float(np.median(ours)),
        "bare_ms": float(np.median(theirs)),
        "ratio": list(bootstrap_ratio(ours, theirs, paired=True)),
        "rounds": rounds,
        "iterations": iterations,
    }


def listing(*, vendor: str, engine: str, progress: Progress) -> str:
    """The engine inspector's JSON, with the profile's largest shapes set."""
    described, plan = manifest.read_engine(Path(engine))
    trt = load_vendor(vendor)
    logger = make_logger(trt)
    loaded, runtime = load_engine(trt, plan, logger)
    inspector, context = loaded.create_engine_inspector(), new_context(trt, loaded, logger)
    for name, bounds in described.profiles[0].items():
        context.set_input_shape(name, bounds["max"])
    inspector.execution_context = context
    text = str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    del inspector, context, loaded, runtime  # in this order
    return text
