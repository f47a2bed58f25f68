"""One file a runtime. This page is what a backend is. No torch here; vendor modules are imported on use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from deployopt import plugins
from deployopt.artifact import Artifact, Availability
from deployopt.errors import UsageError
from deployopt.runtime.progress import Progress
from deployopt.runtime.session import Session, SessionOptions


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        precision: an `artifact.Precision`, as typed in the prepared graph.
        batch_sizes: that will be measured; an optimisation profile spans them.
        threads: CPU threads the artifact will run with.
        device: "cpu" or "cuda:N".
        options: the recipe's options for this backend, as `settled` says them.
        timeout_s: native code that takes longer is ended, and the build has failed.
    """

    precision: str
    batch_sizes: tuple[int, ...] = (1,)
    threads: int = 1
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 3600.0


class Backend(Protocol):
    """The attributes of a backend module.

    Six more are optional: `Options`, the pydantic model of its build options; `settle(options, precision) -> options`, which says what they leave to this
    machine: that is part of a build's key, and the fourth argument of its `prepare`; `builds_onnx`, True if what it builds is ONNX files that the runtime
    reads, so no engine that must be held to ONNX Runtime's outputs; `builds_on_opening`, True if `open` builds an engine whose kernels are chosen by timing
    them, so that nothing else may go on meanwhile; `verify(path, options: SessionOptions, progress, timeout_s) -> Verified`, which tells of any ONNX file
    what the runtime really executes, and raises as `build`: so `deployopt bench` can show it of files that no build stage has seen; and `providers`, the
    other devices or libraries that the runtime computes with, by name. Each is a module that is a backend of its own. A recipe asks for them with the build
    option `providers`; their rows are called NAME-PROVIDER, so that they are compared with their own FP32 row. Of the backend's
    options they get those that their own `Options` has, if there is one.

    Attributes:
        __name__: of the module; a session's child process imports it to call `open`.
        distributions: packages whose versions matter to what it builds.
        build_depends_on_machine: True if an artifact built here fits only this CPU or GPU model.
        Options: may be left out; a pydantic model of what the recipe's `build.options` takes for this backend. The planner checks against it.
    """

    __name__: str
    distributions: tuple[str, ...]
    build_depends_on_machine: bool

    def probe(self) -> Availability:
        """What works here. Never raises: a reason instead."""

    def prepare(self, canonical: Path, precision: str, out: Path) -> Path:
        """Write to `out` the canonical ONNX in the dialect this runtime runs fastest. Returns `out`. Runs on any machine.

        Raises:
            ExportFailed: the graph cannot be said in this dialect (names the node).
        """

    def build(self, prepared: Path, out: Path, request: BuildRequest, progress: Progress) -> Artifact:
        """Build into the folder `out`, verify what the runtime made of it, return the artifact.

        `metadata["verified"]` is `asdict(Verified)` or None where this machine cannot tell, with `metadata["verified_reason"]`; then
        `metadata["verifiable"]` is True if of other artifacts it could, so that not to be told is a fault of this one. `metadata["notes"]`, if there is
        one, lists what a reader of its row should know; `metadata["misfit"]` says why an engine is not for this machine's device, though the backend runs.

        Raises:
            BuildFailed: with the node, what is wrong and what to do.
        """

    def open(self, path: Path, options: SessionOptions) -> Session:
        """A session on this machine.

        Raises:
            BackendUnavailable, ArtifactCorrupt, ArtifactMismatch.
        """


PROVIDERS, OWN = "providers", "cpu"  # the build option, and what it calls the backend's own provider
_SEPARATOR = "-"


def _providers(backend: Backend) -> Mapping[str, str]:
    found: Mapping[str, str] = getattr(backend, "providers", {})
    return found


def runtime_of(name: str) -> str:
    """NAME of NAME-PROVIDER, whatever it names; a backend's own name is whole."""
    return name if name in plugins.names("backends") else name.partition(_SEPARATOR)[0]


def find(name: str) -> Backend:
    """The backend that a row's name stands for: NAME, or NAME-PROVIDER.

    Raises:
        UsageError: no such name; says which there are and the nearest one.
    """
    base = runtime_of(name)
    backend: Backend = plugins.find("backends", base)
    if base == name:
        return backend
    modules = {f"{base}{_SEPARATOR}{provider}": module for provider, module in _providers(backend).items()}
    if name not in modules:
        raise UsageError(plugins.unknown("backend", name, [*plugins.names("backends"), *modules]))
    module: Any = import_module(modules[name])
    return cast(Backend, module)


def names() -> list[str]:
    """Every backend, each followed by its further providers. Imports them all."""
    return [row for name in plugins.names("backends") for row in (name, *(f"{name}{_SEPARATOR}{p}" for p in _providers(plugins.find("backends", name))))]


def settled(name: str, options: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """Build options that concern the row `name`, with all said that they leave to this machine. Again settled, they are the same."""
    backend = find(name)
    model, settle = getattr(backend, "Options", None), getattr(backend, "settle", None)
    if model is not None and name != runtime_of(name):
        options = {key: value for key, value in options.items() if key in model.model_fields}
    return dict(options) if settle is None else settle(options, precision)


def asked(name: str, options: Mapping[str, Any]) -> list[str]:
    """A backend by the names of its rows, as its build options ask for providers; "cpu" is the backend's own."""
    return [name if provider == OWN else f"{name}{_SEPARATOR}{provider}" for provider in options.get(PROVIDERS, (OWN,))]
