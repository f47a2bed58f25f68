"""TensorRT 8.5 or later: engines for the GPU of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import Field, model_validator

from deployopt.artifact import FLOAT_PRECISIONS, INT8_PRECISIONS, Artifact, Availability
from deployopt.backends import BuildRequest, _shared, _tensorrt, _trial
from deployopt.errors import BackendUnavailable
from deployopt.runtime.cuda import Gpu, find_gpus, names_of
from deployopt.runtime.progress import Progress
from deployopt.runtime.session import Session, SessionOptions
from deployopt.runtime.tensorrt import BuildOptions
from deployopt.runtime.tensorrt_api import Vendor
from deployopt.runtime.tensorrt_session import open_session
from deployopt.runtime.tensorrt_vendor import load_vendor
from deployopt.runtime.tensorrt_versions import is_weakly_typed, not_offered
from deployopt.store import cache_home

distributions = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
build_depends_on_machine = True

_VENDOR = "tensorrt"
_INSTALL = "pip install 'deployopt[tensorrt]'"  # the package for CUDA 13
_INSTALL_CUDA_12 = "pip install 'deployopt[tensorrt-cu12]'"
_OTHERS = "tensorrt tensorrt-cu13 tensorrt-cu13-libs tensorrt-cu13-bindings"  # which hold the same module


class Options(_tensorrt.BuildOptionsModel):
    """Build options of TensorRT. Not yet tried on a GPU."""

    workspace_mib: int | None = Field(None, ge=1)
    """Scratch memory in MiB that a layer may use; by default all of the GPU's memory. Not yet tried on a GPU."""
    optimization_level: int = Field(3, ge=0, le=5)
    """0 builds fastest, 5 searches longest for faster kernels. Not yet tried on a GPU."""
    timing_cache: bool = True
    """Keep the timings of kernels in deployopt's cache folder, a file for each TensorRT version and GPU, so that later builds are faster and choose alike.
    Not yet tried on a GPU."""
    error_on_timing_cache_miss: bool = False
    """Fail where a kernel had to be timed, so that a rebuild is known to have chosen from the timings of the build before. Not yet tried on a
    GPU."""

    @model_validator(mode="after")
    def _cache_to_miss(self) -> Options:
        if self.error_on_timing_cache_miss and not self.timing_cache:
            raise ValueError("error_on_timing_cache_miss wants timing_cache: true")
        return self


def probe() -> Availability:
    found = _shared.probe(partial(load_vendor, _VENDOR), _offered)
    return found if found.version else _without_package(found)


def _without_package(found: Availability) -> Availability:
    """What to install depends on the driver; where that is lacking too, both are told, so that they are mended at once."""
    try:
        gpus = find_gpus()
    except BackendUnavailable as exc:
        remedies = [remedy for remedy in (found.remedy, exc.remedy) if remedy]
        return replace(found, reason=f"{found.reason}; {exc.message}", remedy="; ".join(remedies) or None)
    return replace(found, remedy=_install(gpus)) if found.remedy == _INSTALL else found


def _install(gpus: Sequence[Gpu], instead_of: str = "") -> str:
    """The command that brings a TensorRT for the CUDA version that the driver serves: of 10.13 and later there are packages for 12 and for 13."""
    served = gpus[0].cuda_driver
    major = int(served.partition(".")[0])
    if major < 12:
        return f"update the NVIDIA driver; {_INSTALL}  # it serves CUDA {served}, and TensorRT's packages are for 12 and 13"
    return f"{instead_of}{_INSTALL_CUDA_12}  # the driver serves CUDA {served}" if major == 12 else _INSTALL


def _offered(trt: Vendor) -> Availability:
    offered: dict[str, str | None] = {precision: not_offered(trt, precision) for precision in (*FLOAT_PRECISIONS, *INT8_PRECISIONS)}
    try:
        gpus = find_gpus()
    except BackendUnavailable as exc:
        return Availability(False, False, trt.__version__, None, exc.message, offered, exc.remedy)
    tried = _trial.take(_VENDOR, 0, (), _install(gpus, f"pip uninstall {_OTHERS}; "))
    return Availability(tried.runs, tried.builds, trt.__version__, names_of(gpus), tried.reason, offered, tried.remedy)


def prepare(canonical: Path, precision: str, out: Path) -> Path:
    """In the dialect of the version that is installed here; without one, of TensorRT 10 and later."""
    try:
        weakly_typed = is_weakly_typed(load_vendor(_VENDOR))
    except BackendUnavailable:
        weakly_typed = False
    return _tensorrt.prepare(canonical, out, weakly_typed=weakly_typed)


def build(prepared: Path, out: Path, request: BuildRequest, progress: Progress) -> Artifact:
    """One optimisation profile: minimum batch 1, optimum and maximum the largest of `request.batch_sizes`."""
    options = _shared.bind(_VENDOR, Options, request.options)
    wanted = BuildOptions(
        tuple(request.batch_sizes),
        workspace_mib=options.workspace_mib,
        optimization_level=options.optimization_level,
        tf32=options.tf32,
        timing_cache=str(cache_home() / "tensorrt") if options.timing_cache else None,
        error_on_timing_cache_miss=options.error_on_timing_cache_miss,
    )
    return _tensorrt.build(prepared, out, request, progress, vendor=_VENDOR, options=wanted, compress=options.compress)


def open(path: Path, options: SessionOptions) -> Session:
    return open_session(_VENDOR, path, options)
