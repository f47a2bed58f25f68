"""Whether TensorRT and TensorRT-RTX work on this machine's GPU, found out by building and running the smallest engine, once a process."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from deployopt.errors import BackendUnavailable, DeployoptError
from deployopt.runtime.child import run_in_child
from deployopt.runtime.cuda import is_out_of_memory
from deployopt.runtime.progress import SilentProgress

LIMIT_S = 120.0  # the library alone may take seconds to start


class Trial(NamedTuple):
    """How far it came; of one that runs, `reason` and `remedy` are None."""

    builds: bool
    runs: bool
    reason: str | None = None
    remedy: str | None = None


@cache
def take(vendor: str, index: int, compute_capabilities: tuple[str, ...], install: str) -> Trial:
    """Try a vendor's library out in a child process, in which it may crash.

    Args:
        vendor: "tensorrt" or "tensorrt_rtx".
        index: of the GPU.
        compute_capabilities: to build for, as `runtime.tensorrt.BuildOptions` has them.
        install: the command that brings a library that fits the driver.
    """
    asked = {"vendor": vendor, "device": f"cuda:{index}", "compute_capabilities": list(compute_capabilities)}
    try:
        fault = run_in_child("deployopt.runtime.tensorrt_trial:try_out", asked, SilentProgress(), f"trying {vendor} out", LIMIT_S)
    except BackendUnavailable as exc:
        other = None if is_out_of_memory(exc.message) else install
        return Trial(False, False, exc.message, "; ".join(remedy for remedy in (exc.remedy, other) if remedy))
    except DeployoptError as exc:
        return Trial(False, False, exc.message, exc.remedy)
    return Trial(True, True) if fault is None else Trial(True, False, f"engines are built and do not run: {fault['message']}", fault["remedy"])
