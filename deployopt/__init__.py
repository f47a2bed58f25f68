"""deployopt: fine-tune, prune, quantise, export and build a ResNet from one recipe, and measure what each stage bought.

From Python: `load_recipe(path, overrides)`, `plan(recipe)`, `run(recipe, run_dir=…)`, `open_session(artifact)`. Importing this
package imports neither torch nor a runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "load_recipe", "open_session", "plan", "run"]

if TYPE_CHECKING:
    from deployopt.pipeline import Observer, Plan
    from deployopt.recipe import Recipe
    from deployopt.report import Report
    from deployopt.runtime.session import Session


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `KEY=VALUE` overrides.

    Raises:
        RecipeError: with every problem found, each with file, line and column.
    """
    from deployopt.recipe import load_recipe as load

    return load(path, overrides)


def plan(recipe: Recipe, *, device: str = "auto", threads: int | None = None, processes: int = 1, until: str | None = None, fresh: bool = False) -> Plan:
    """What a run would do: every step, whether it is cached, and why not. Imports no torch.

    Args:
        device, threads, processes, until, fresh: as in `run`.

    Raises:
        RecipeError, UsageError, DeviceUnavailable.
    """
    from deployopt.pipeline import plan as make

    return make(recipe, device=device, threads=threads, processes=processes, until=until, fresh=fresh)


def run(
    recipe: Recipe,
    *,
    run_dir: str | Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    processes: int = 1,
    until: str | None = None,
    fresh: bool = False,
    observer: Observer | None = None,
) -> Report:
    """Run a recipe. Returns the report: the dict of its `report.json`, with `rows`, `met` and `recommended`.

    Args:
        run_dir: the run folder; one that exists is continued. None makes one under `runs/`.
        device: "auto" (a GPU when there is one), "cpu", "cuda" or "cuda:N".
        threads: CPU threads of everything together; None takes the cores this process may use.
        processes: that train side by side on shares of every batch, dividing `threads` between them, or each with a GPU of its own from `device` on.
        until: name of the last stage instance to run.
        fresh: take nothing from the cache.

    Raises:
        RecipeError, DataNotFound, MissingDependency, DeviceUnavailable, StageFailed, RunLocked.
    """
    from deployopt.pipeline import execute

    made = plan(recipe, device=device, threads=threads, processes=processes, until=until, fresh=fresh)
    return execute(made, Path(run_dir) if run_dir is not None else None, observer, fresh=fresh)


def open_session(artifact: str | Path, backend: str | None = None, *, threads: int = 1, device: str = "cpu") -> Session:
    """Open an artifact for inference in this process.

    Args:
        artifact: `.onnx`, an engine, a torch model folder or its `model.safetensors`, "RUN:variant/backend/precision/b1", or a run folder (the
            artifact that it recommends).
        backend: name of the runtime; None takes it from the file's kind (ONNX Runtime for `.onnx`).

    Raises:
        UsageError: nothing is there, or a file of unknown kind. BackendUnavailable, DeviceUnavailable, ArtifactCorrupt, ArtifactMismatch.
    """
    from deployopt.bench.inference import open_artifact
    from deployopt.runtime.session import SessionOptions

    return open_artifact(artifact, backend, SessionOptions(threads=threads, device=device))
