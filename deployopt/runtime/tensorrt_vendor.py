"""The vendor's module: finding it, and the objects of ours that it calls back (logger, profiler, progress monitor)."""

import importlib
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Tuple, cast

from deployopt.errors import BackendUnavailable
from deployopt.runtime import tensorrt_versions as versions
from deployopt.runtime.tensorrt_api import Vendor
from deployopt.runtime.tensorrt_versions import product

if TYPE_CHECKING:
    from deployopt.runtime.tensorrt_api import Logger, Monitor, Profiler

DRIVER_NOISE = "CUDA driver version is insufficient"  # follows every error on a machine without a driver, whatever the error
_JETSON = Path("/etc/nv_tegra_release")  # there on every Jetson
_JETPACK = (
    "sudo apt install nvidia-jetpack  # TensorRT comes with it on a Jetson: on JetPack 7 (Python 3.12), in a virtual environment made with "
    "--system-site-packages; those of JetPack 5 and 6 are for Python 3.8 and 3.10, where deployopt.runtime works and these commands, which need 3.11, do not"
)


def usable(trt: Any) -> bool:
    """Whether this is the library. Packages of type stubs import too, as an empty namespace package."""
    return hasattr(trt, "Builder") and hasattr(trt, "__version__")


def load_vendor(name: str) -> Vendor:
    """Import "tensorrt" or "tensorrt_rtx".

    Raises:
        BackendUnavailable: it is not installed, cannot be loaded, or is a version that this deployopt does not serve.
    """
    install = _JETPACK if name == "tensorrt" and _JETSON.exists() else f"pip install 'deployopt[{name.replace('_', '-')}]'"
    try:
        trt = importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name != name:
            raise BackendUnavailable(f"package {name} lacks the module {exc.name}", install) from exc
        raise BackendUnavailable(f"package {name} is not installed", install) from exc
    except Exception as exc:  # whatever a vendor's loader raises is the reason to report
        raise BackendUnavailable(f"package {name} cannot be loaded ({type(exc).__name__}: {exc})", install) from exc
    if not usable(trt):
        raise BackendUnavailable(f"package {name} is not installed (only its type stubs are)", install)
    if not versions.is_served(trt):
        raise BackendUnavailable(
            f"{product(trt)} is not served: it has no named tensors", f"install TensorRT {'.'.join(map(str, versions.OLDEST))} or later, as JetPack 5.1 has it"
        )
    return cast("Vendor", trt)


def make_logger(trt: Vendor, verbose: bool = False) -> "Logger":
    """A logger that keeps (severity, text) in `messages`. Keep a reference for as long as any vendor object lives."""

    base: Any = trt.ILogger

    class KeepingLogger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: List[Tuple[str, str]] = []

        def log(self, severity: Any, msg: str) -> None:  # called from native threads: it must not raise
            if verbose or severity.name != "VERBOSE":
                self.messages.append((severity.name, msg))

        def errors(self) -> List[str]:
            texts = [text for severity, text in self.messages if severity.endswith("ERROR")]
            return [text for text in texts if DRIVER_NOISE not in text] or texts

    return KeepingLogger()


def make_profiler(trt: Vendor) -> "Profiler":
    """A profiler that keeps (layer's name, milliseconds) of every layer that ran since `take` was called."""

    base: Any = trt.IProfiler

    class KeepingProfiler(base):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self._times: List[Tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:  # called from native code: it must not raise
            self._times.append((layer_name, ms))

        def take(self) -> List[Tuple[str, float]]:
            times, self._times = self._times, []
            return times

    return KeepingProfiler()


def make_monitor(trt: Vendor, advance: Callable[[float, str], None]) -> "Monitor":
    """A progress monitor that calls `advance(fraction of the build done since the last call, phase)`.

    The builder calls it from several threads (NVIDIA's reference of IProgressMonitor); `advance` is called by one at a time. An exception in `advance`, or
    Ctrl-C, may not cross native frames: it is kept in `raised`, and the build is stopped.
    """

    base: Any = trt.IProgressMonitor

    class TellingMonitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.raised: Optional[BaseException] = None
            self.told = 0.0
            self._phases: Dict[str, List[Any]] = {}  # name → [parent, steps done, steps]
            self._lock = threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: Optional[str], num_steps: int) -> None:
            with self._held():
                self._phases[phase_name] = [parent_phase, 0, max(1, num_steps)]

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._held():
                if phase_name in self._phases:  # another thread may have finished it
                    self._phases[phase_name][1] = step + 1
                done = min(1.0, max((self._done(name) for name, (parent, _, _) in self._phases.items() if parent is None), default=0.0))
                gained, self.told = max(0.0, done - self.told), max(self.told, done)
                advance(gained, phase_name)
            return self.raised is None

        def phase_finish(self, phase_name: str) -> None:
            with self._held():
                self._phases.pop(phase_name, None)

        @contextmanager
        def _held(self) -> Iterator[None]:
            """One thread at a time; what is raised inside is kept for the caller of the build."""
            try:
                with self._lock:
                    yield
            except BaseException as exc:  # Ctrl-C too
                self.raised = self.raised or exc

        def _done(self, name: str) -> float:
            _, done, steps = self._phases[name]
            inside = max((self._done(child) for child, (parent, _, _) in self._phases.items() if parent == name), default=0.0)
            return float(min(steps, done + inside) / steps)

    return TellingMonitor()


def clean(text: str) -> str:
    """A vendor's message on one line, without what it adds on a missing driver on a machine without a GPU."""
    return " ".join(line.strip() for line in text.splitlines() if DRIVER_NOISE not in line)
