"""TensorRT 8.5 or later: engines for the GPU of this machine."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import Field, model_validator

from deployopt.artifact import FLOAT_PRECISIONS, INT8_PRECISIONS, Artifact, Availability
from deployopt.backends import BuildRequest, _shared, _tensorrt
from deployopt.errors import BackendUnavailable
from deployopt.runtime.cuda import find_gpus, names_of
from deployopt.runtime.progress import Progress
from deployopt.runtime.session import Session, SessionOptions
from deployopt.runtime.tensorrt import BuildOptions
from deployopt.runtime.tensorrt_api import Vendor
from deployopt.runtime.tensorrt_session import open_session
from deployopt.runtime.tensorrt_vendor import load_vendor
from deployopt.runtime.tensorrt_versions import is_weakly_typed, not_offered
from deployopt.store import cache_home

distributions = ("tensorrt",)
build_depends_on_machine = True

_VENDOR = "tensorrt"


class Options(_tensorrt.BuildOptionsModel):
    """Build options of TensorRT."""

    workspace_mib: int | None = Field(None, ge=1)
    """Scratch memory in MiB that a layer may use; by default all of the GPU's memory."""
    optimization_level: int = Field(3, ge=0, le=5)
    """0 builds fastest, 5 searches longest for faster kernels."""
    timing_cache: bool = True
    """Keep the timings of kernels in deployopt's cache folder, a file for each TensorRT version and GPU, so that later builds are faster and choose alike."""
    error_on_timing_cache_miss: bool = False
    """Fail where a kernel had to be timed, so that a rebuild is known to have chosen from the timings of the build before."""

    @model_validator(mode="after")
    def _cache_to_miss(self) -> Options:
        if self.error_on_timing_cache_miss and not self.timing_cache:
            raise ValueError("error_on_timing_cache_miss wants timing_cache: true")
        return self


def probe() -> Availability:
    found = _shared.probe(partial(load_vendor, _VENDOR), _offered)
    return found if found.version else _without_driver(found)


def _without_driver(found: Availability) -> Availability:
    """Where the package is lacking: the driver, if it is lacking too, so that both are mended at once."""
    try:
        find_gpus()
    except BackendUnavailable as exc:
        remedies = [remedy for remedy in (found.remedy, exc.remedy) if remedy]
        return replace(found, reason=f"{found.reason}; {exc.message}", remedy="; ".join(remedies) or None)
    return found


def _offered(trt: Vendor) -> Availability:
    offered: dict[str, str | None] = {precision: not_offered(trt, precision) for precision in (*FLOAT_PRECISIONS, *INT8_PRECISIONS)}
    try:
        gpus = find_gpus()
    except BackendUnavailable as exc:
        return Availability(False, False, trt.__version__, None, exc.message, offered, exc.remedy)
    return Availability(True, True, trt.__version__, names_of(gpus), None, offered)


def prepare(canonical: Path, precision: str, out: Path) -> Path:
    """In the dialect of the version that is installed here; without one, of TensorRT 10 and later."""
    try:
        weakly_typed = is_weakly_typed(load_vendor(_VENDOR))
    except BackendUnavailable:
        weakly_typed = False
    return _tensorrt.prepare(canonical, out, weakly_typed=weakly_typed)


def build(prepared: Path, out: Path, request: BuildRequest, progress: Progress) -> Artifact:
    """One optimisation profile: minimum batch 1, optimum and maximum the largest of `request.batch_sizes`."""
    options = _tensorrt.bind(_VENDOR, Options, request.options)
    wanted = BuildOptions(
        tuple(request.batch_sizes),
        workspace_mib=options.workspace_mib,
        optimization_level=options.optimization_level,
        tf32=options.tf32,
        timing_cache=str(cache_home() / "tensorrt") if options.timing_cache else None,
        error_on_timing_cache_miss=options.error_on_timing_cache_miss,
    )
    return _tensorrt.build(prepared, out, request, progress, vendor=_VENDOR, options=wanted)


def open(path: Path, options: SessionOptions) -> Session:
    return open_session(_VENDOR, path, options)
