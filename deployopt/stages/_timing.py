"""Candidates timed while a stage decides: built by the real backend, with the defaults of its options, and measured interleaved, as `build` and `benchmark`
do with what is shipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, field_validator

from deployopt import backends, plugins
from deployopt.artifact import Artifact, Precision
from deployopt.bench.environment import versions
from deployopt.errors import BackendUnavailable, StageFailed, UsageError
from deployopt.runtime import host
from deployopt.runtime.session import SessionOptions
from deployopt.stages import StageConfig, StageContext

if TYPE_CHECKING:
    from onnx import ModelProto

    from deployopt.bench.harness import Measured

EXPORTERS = ("onnx", "onnxscript")  # distributions
SECONDS = 1.0  # timed for each candidate
IMAGES = 32


class TimedOn(StageConfig):
    """Where candidates are timed."""

    backend: str = "onnxruntime"
    """Runtime (`deployopt list backends`), or one provider of it, as onnxruntime-cuda."""
    batch: int = Field(default=1, ge=1, le=65_536)
    """Images a timed inference."""

    @field_validator("backend")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in plugins.names("backends"):
            try:
                backends.find(name)
            except UsageError as exc:
                raise ValueError(exc.message) from exc
        return name


def key_parts(where: TimedOn) -> dict[str, Any]:
    """What a decision timed there depends on beside the step's inputs, for `Expansion.parameters`: this machine, the runtime's version, and those of
    the packages that export and prepare candidates."""
    from deployopt.stages import build

    backend = backends.find(where.backend)
    return {
        "build": build.version,
        "machine": host.timing_facts(),
        "runtime": backend.probe().version,
        "distributions": versions((*EXPORTERS, *backend.distributions)),
    }


class Candidates:
    """Builds candidates for one backend, precision and batch size, and times them. A context manager: it keeps what it built, by name."""

    def __init__(self, context: StageContext, where: TimedOn, precision: Precision) -> None:
        self.backend, self.batch, self.precision = where.backend, where.batch, precision
        self._context = context
        self._built: dict[str, Artifact] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._folder = Path(self._stack.enter_context(TemporaryDirectory()))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def unavailable(self) -> str | None:
        """Why this machine cannot time here, None if it can."""
        return _obstacle(self.backend, self.precision)

    def require(self, key: str) -> None:
        """Raises:
        BackendUnavailable: the backend that the option `key` names cannot time here.
        """
        reason = self.unavailable()
        if reason is not None:
            working = ", ".join(name for name in backends.names() if _obstacle(name, self.precision) is None) or "none"
            wanted = f"{key} wants latency on {self.backend}, which cannot be measured on this machine: {reason} (available here: {working})"
            raise BackendUnavailable(wanted, f"run on the target, or set {key} to one of those")

    def built(self, name: str, export: Callable[[], ModelProto]) -> Artifact:
        """The artifact of a canonical graph; `export` is called if none of this name was built yet.

        Raises:
            BuildFailed, ExportFailed.
        """
        import onnx

        from deployopt.backends import BuildRequest
        from deployopt.stages.build import build_prepared

        if name not in self._built:
            context, folder = self._context, self._folder / str(len(self._built))
            folder.mkdir()
            with context.progress.track(f"export {name}", None):
                onnx.save(export(), str(folder / "canonical.onnx"))
            request = BuildRequest(self.precision, (self.batch,), self._threads, context.device)
            self._built[name] = build_prepared(self.backend, folder / "canonical.onnx", folder, request, context.progress)
        return self._built[name]

    def measure(self, artifacts: Mapping[str, Artifact], seconds: float, blocks: int | None = None, seed: int = 0) -> dict[str, Measured]:
        """Time artifacts, each in a new process, in shuffled rounds over validation images.

        Args:
            seconds: for each of them, at least. blocks: at least; None takes the harness's own.
            seed: of the order of the rounds, beside the run's.

        Raises:
            StageFailed: one could not be timed.
        """
        from deployopt.bench.harness import Failure, Settings, Subject, measure
        from deployopt.bench.targets import opener

        context, images = self._context, self._context.dataset().validation
        subjects = []
        for key, artifact in artifacts.items():
            options = SessionOptions(self._threads, context.device, self.precision, dict(artifact.metadata.get("options") or {}))
            subjects.append(Subject(key, opener(self.backend), artifact.path, options))
        settings = Settings(min_seconds=seconds, seed=context.seed + seed, blocks=Settings.blocks if blocks is None else blocks)
        shown = images.images(range(min(IMAGES * self.batch, len(images))))
        results = measure(subjects, shown, settings, context.progress, batch=self.batch, source="validation split")
        failed = [f"{key}: {result.reason}" for key, result in results.items() if isinstance(result, Failure)]
        if failed:
            raise StageFailed(f"candidates could not be timed on {self.backend}: {'; '.join(failed)}", "name another backend, or decide without timing")
        return {key: result for key, result in results.items() if not isinstance(result, Failure)}

    @property
    def _threads(self) -> int:
        """Of all processes that train together: only one of them times."""
        return self._context.threads * self._context.processes


def _obstacle(backend: str, precision: Precision) -> str | None:
    return backends.find(backend).probe().obstacle(backend, precision, to_run=True)
