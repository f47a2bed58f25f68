"""A torch model, in FP32, eager or compiled, behind the `Session` interface."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deployopt.errors import BackendUnavailable, DeviceUnavailable, UsageError
from deployopt.nn import checkpoint, parametrizations
from deployopt.runtime.session import Feed, SessionOptions, TensorSpec


class TorchLoaded:
    """Feeds on the host; each run copies one to the device, computes, and copies the outputs back."""

    def __init__(self, module: nn.Module, device: str, feeds: list[Tensor]) -> None:
        self._module, self._device, self._feeds = module, device, feeds

    def __len__(self) -> int:
        return len(self._feeds)

    @torch.inference_mode()
    def run(self, index: int) -> None:
        self._module(self._feeds[index % len(self._feeds)].to(self._device)).cpu()

    def device_ms(self) -> float | None:
        return None


class TorchSession:
    """Runs a network in one stream: Python, which launches its operators, runs in one thread at a time.

    Opening sets the process's number of torch threads.
    """

    streams = 1

    def __init__(self, module: nn.Module, inputs: TensorSpec, outputs: TensorSpec, device: str) -> None:
        self.inputs, self.outputs = (inputs,), (outputs,)
        self.provider = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
        self._module, self._device = module, device

    @torch.inference_mode()
    def infer(self, feed: Feed) -> dict[str, NDArray[Any]]:
        outputs = self._module(self._tensor(feed).to(self._device))
        return {self.outputs[0].name: outputs.cpu().numpy().copy()}

    def load(self, feeds: Sequence[Feed]) -> TorchLoaded:
        return TorchLoaded(self._module, self._device, [self._tensor(feed).clone() for feed in feeds])

    def _tensor(self, feed: Feed) -> Tensor:
        spec = self.inputs[0]
        if set(feed) != {spec.name}:
            raise UsageError(f"wanted the input '{spec.name}', found {sorted(feed)}")
        array = np.ascontiguousarray(feed[spec.name])
        if array.dtype != spec.dtype or array.ndim != len(spec.shape) or array.shape[1:] != spec.shape[1:]:
            raise UsageError(f"input '{spec.name}': wanted {spec.dtype} {list(spec.shape)}, found {array.dtype} {list(array.shape)}")
        return torch.from_numpy(array)

    def close(self) -> None:
        self._module = nn.Identity()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open(path: Path, options: SessionOptions) -> TorchSession:
    """Open a model folder, or the model.safetensors in it. A quantized network runs fake-quantized, in FP32.

    TF32 is off from then on in this process.

    Raises:
        BackendUnavailable: another precision than fp32 was asked for.
        DeviceUnavailable: no such CUDA device.
        ArtifactError, ArtifactMismatch: files that cannot be loaded.
    """
    return _open(path, options, compiled=False)


def open_compiled(path: Path, options: SessionOptions) -> TorchSession:
    """As `open`, with `torch.compile`, which works for many seconds at the first inference of each shape.

    Raises:
        BackendUnavailable: also where the compiler that it calls is missing.
        DeviceUnavailable, ArtifactError, ArtifactMismatch: as `open`.
    """
    _require_compiler(options.device)
    return _open(path, options, compiled=True)


def _open(path: Path, options: SessionOptions, *, compiled: bool) -> TorchSession:
    if options.precision != "fp32":
        raise BackendUnavailable(f"torch runs in fp32 here, wanted {options.precision}", "open the ONNX or engine of that precision")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise DeviceUnavailable(f"wanted {options.device}, torch sees no CUDA device", "--device cpu")
    torch.set_num_threads(options.threads * options.streams)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # a 10-bit mantissa is not FP32
    network = checkpoint.load(path if path.is_dir() else path.parent)
    parametrizations.replay(network, parametrizations.modules(network))  # exports hold the weights, not what computes them
    module: nn.Module = network
    if any(entry["op"] == "quantize" for entry in network.lineage):
        from deployopt.nn import quantizer

        module = quantizer.fake_quantized(network)
    module = module.to(options.device)
    if compiled:
        module.compile(fullgraph=True, dynamic=False)  # nothing left to eager execution unsaid; each shape anew, as engines are built
    return TorchSession(module, *checkpoint.specs(network), options.device)


def _require_compiler(device: str) -> None:
    """Raises BackendUnavailable where Inductor would find no compiler: C++ for its CPU kernels, C for the launchers of Triton's."""
    variable, default, package = ("CXX", "g++", "g++") if device == "cpu" else ("CC", "gcc", "gcc")
    wanted = os.environ.get(variable) or default
    if shutil.which(wanted.split()[0]) is None:
        raise BackendUnavailable(f"torch.compile needs a compiler, and '{wanted}' is not found", f"apt-get install {package}, or name another in {variable}")
