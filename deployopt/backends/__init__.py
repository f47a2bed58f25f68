"""One file a runtime. This page is what a backend is. No torch here; vendor modules are imported on use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from deployopt.artifact import Artifact, Availability
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
        options: the recipe's options for this backend.
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

    Attributes:
        distributions: packages whose versions matter to what it builds.
        build_depends_on_machine: True if an artifact built here fits only this CPU or GPU model.
        Options: may be left out; a pydantic model of what the recipe's `build.options` takes for this backend. The planner checks against it.
    """

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

        `metadata["verified"]` is `asdict(Verified)` or None where this machine cannot tell, with `metadata["verified_reason"]`.

        Raises:
            BuildFailed: with the node, what is wrong and what to do.
        """

    def open(self, path: Path, options: SessionOptions) -> Session:
        """A session on this machine.

        Raises:
            BackendUnavailable, ArtifactCorrupt, ArtifactMismatch.
        """
