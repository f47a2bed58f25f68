"""TensorRT-RTX: engines built ahead of time, on any machine, for the GPU classes asked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from deployopt.artifact import FLOAT_PRECISIONS, INT8_PRECISIONS, Artifact, Availability
from deployopt.backends import BuildRequest, _shared, _tensorrt, _trial
from deployopt.errors import BackendUnavailable, BuildFailed
from deployopt.runtime.cuda import Gpu, device_index, find_gpu, find_gpus, names_of
from deployopt.runtime.progress import Progress
from deployopt.runtime.session import Session, SessionOptions
from deployopt.runtime.tensorrt import BuildOptions, compute_capabilities
from deployopt.runtime.tensorrt_api import Vendor
from deployopt.runtime.tensorrt_session import open_session
from deployopt.runtime.tensorrt_vendor import load_vendor

distributions = ("tensorrt-rtx-cu13", "tensorrt-rtx")
build_depends_on_machine = False

_VENDOR = "tensorrt_rtx"
_TURING = "7.5"
_PORTABLE = ("8.6", "8.9", "12.0")  # GeForce RTX 30, 40 and 50
_PRECISIONS: dict[str, str | None] = dict.fromkeys((*FLOAT_PRECISIONS, *INT8_PRECISIONS))


def _distinct(capabilities: list[float]) -> list[float]:
    if wrong := [f"{c:g}" for c in capabilities if not 5 <= c < 20 or round(c, 1) != c]:  # NVIDIA's are MAJOR.MINOR, from Maxwell's 5.0 on
        raise ValueError(f"wants compute capabilities such as 8.6, found {', '.join(wrong)}")
    if len(set(capabilities)) != len(capabilities):
        raise ValueError("each compute capability once")
    return capabilities


class Options(_tensorrt.BuildOptionsModel):
    """Build options of TensorRT-RTX."""

    compute_capabilities: Annotated[list[float], AfterValidator(_distinct)] | None = Field(None, min_length=1, examples=[[8.6, 8.9, 12.0]])
    """GPU classes to build for, as [8.6, 8.9, 12.0]; by default the class of this machine's GPU, without a GPU [8.6, 8.9, 12.0]."""


def probe() -> Availability:
    return _shared.probe(partial(load_vendor, _VENDOR), _offered)


def _offered(trt: Vendor) -> Availability:
    try:
        gpus = find_gpus()
    except BackendUnavailable as exc:
        return Availability(False, True, trt.__version__, None, f"{exc.message}; engines are built ahead of time and not run", _PRECISIONS, exc.remedy)
    reason = _unserved(trt, gpus)
    if reason is not None:
        other = "build for this GPU with the backend tensorrt, or run these engines on a machine with a GPU that is served"
        return Availability(False, True, trt.__version__, names_of(gpus), reason, _PRECISIONS, other)
    known = compute_capabilities(trt)
    index, served = next((i, gpu.compute_capability) for i, gpu in enumerate(gpus) if gpu.compute_capability in known)
    tried = _trial.take(_VENDOR, index, (served,), "update the NVIDIA driver to one that serves CUDA 13")
    return Availability(tried.runs, True, trt.__version__, names_of(gpus), tried.reason, _PRECISIONS, tried.remedy)


def _unserved(trt: Vendor, gpus: Sequence[Gpu]) -> str | None:
    """Why TensorRT-RTX runs on none of these GPUs, if so."""
    known = compute_capabilities(trt)
    if any(gpu.compute_capability in known for gpu in gpus):
        return None
    found = ", ".join(dict.fromkeys(f"{gpu.name} (compute capability {gpu.compute_capability})" for gpu in gpus))
    return f"TensorRT-RTX {trt.__version__} does not run on {found}; it serves {', '.join(known)}; engines are built for other GPUs and not run"


def prepare(canonical: Path, precision: str, out: Path) -> Path:
    return _tensorrt.prepare(canonical, out)


def build(prepared: Path, out: Path, request: BuildRequest, progress: Progress) -> Artifact:
    """One optimisation profile: minimum batch 1, optimum and maximum the largest of `request.batch_sizes`."""
    options = _shared.bind(_VENDOR, Options, request.options)
    targets = tuple(f"{c:.1f}" for c in options.compute_capabilities) if options.compute_capabilities else _default_targets(request.device)
    if request.precision in INT8_PRECISIONS and _TURING in targets and len(targets) > 1:
        raise BuildFailed(
            f"INT8 for compute capabilities {', '.join(targets)}: one engine for {_TURING} and others runs its convolutions in FP16 on all of them",
            f"build for {_TURING} in a recipe of its own: take it out of tensorrt_rtx's compute_capabilities here",
        )
    wanted = BuildOptions(tuple(request.batch_sizes), targets, tf32=options.tf32)
    return _tensorrt.build(prepared, out, request, progress, vendor=_VENDOR, options=wanted, compress=options.compress)


def _default_targets(device: str) -> tuple[str, ...]:
    try:
        here = find_gpu(device_index(device)).compute_capability
    except BackendUnavailable:
        return _PORTABLE
    return (here,) if here in compute_capabilities(load_vendor(_VENDOR)) else _PORTABLE


def open(path: Path, options: SessionOptions) -> Session:
    return open_session(_VENDOR, path, options)
