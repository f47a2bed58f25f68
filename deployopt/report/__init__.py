"""A report's dict → terminal, Markdown, HTML, JSON or JUnit. One `report.json` holds everything that is shown."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from deployopt.errors import ArtifactError, UsageError
from deployopt.runtime.files import atomic_write, atomic_write_json

SCHEMA = 1
FORMATS = ("terminal", "markdown", "html", "json", "junit")
TERMINAL_WIDTH = 100  # of a terminal report that is written to a file
RERUN = "deployopt run RECIPE --run-dir RUN continues the run and writes its report again"


class Report(dict[str, Any]):
    """A run's `report.json` as it is, with the questions that are asked most.

    Attributes:
        folder: of the run, where the paths in it lead; None for a report that is not on disk.
    """

    folder: Path | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Every row: measured, built, unavailable, failed and invalid."""
        rows: list[dict[str, Any]] = self["rows"]
        return rows

    @property
    def met(self) -> bool:
        """Whether the recipe's budget was met."""
        return bool(self["budget"]["met"])

    @property
    def recommended(self) -> dict[str, Any] | None:
        """The recommended row, None if no row was measured."""
        return None if self["recommended"] is None else self.rows[self["recommended"]["row"]]


def load(path: Path) -> Report:
    """Read a report.

    Args:
        path: a run folder or its report.json.

    Raises:
        UsageError: nothing there.
        ArtifactError: empty, cut off, not a report, of another schema, or with something in it that is not as renderers read it, NaN included.
    """
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        held = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else ""
        found = f"the folder holds {held or 'nothing'}" if path.is_dir() else "there is no such file or folder"
        raise UsageError(f"wanted a run folder or a report.json: {path}: {found}", RERUN if path.is_dir() else "give the folder that `deployopt run` named")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        not_finite = _first_not_finite(report)  # json reads NaN, Infinity and 1e999; no gate is ever missed by a NaN
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as exc:
        what = "is empty" if file.stat().st_size == 0 else f"is not whole JSON ({exc})"
        raise ArtifactError(f"{file} {what}", RERUN) from exc
    if not isinstance(report, dict) or "schema" not in report:
        raise ArtifactError(f'{file} is JSON but not a report: it has no "schema"', "give a run folder or its report.json")
    if not_finite:
        raise ArtifactError(f"{file} holds a figure that is not finite at {not_finite}", RERUN)
    if report["schema"] != SCHEMA:
        found = f"found schema {report['schema']!r} (written by deployopt {report.get('deployopt', 'of unknown version')})"
        raise ArtifactError(f"{file}: wanted report schema {SCHEMA}, {found}", "read it with that version of deployopt, or run the recipe again")
    from deployopt.report import form

    if wrong := form.fault(report):
        raise ArtifactError(f"{file}: {wrong}", RERUN)
    loaded = Report(report)
    loaded.folder = file.parent
    return loaded


def render(report: Mapping[str, Any], format: str) -> str:
    """The report as text.

    Raises:
        UsageError: a format that is not in `FORMATS`.
        ArtifactError: for "json", a figure that is not finite.
    """
    from deployopt.report import html, junit, markdown, terminal

    if format == "terminal":
        console = Console(file=io.StringIO(), width=TERMINAL_WIDTH, no_color=True, force_terminal=False)
        with console.capture() as captured:
            terminal.render(report, console)
        return captured.get()
    if format == "json":
        try:
            return json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        except ValueError as exc:
            raise ArtifactError(f"the report holds a figure that is not finite at {_first_not_finite(report)}") from exc
    renderers = {"markdown": markdown.render, "html": html.render, "junit": junit.render}
    if format not in renderers:
        raise UsageError(f"unknown report format '{format}' (available: {', '.join(FORMATS)})")
    return renderers[format](report)


def _first_not_finite(value: Any, where: str = "report") -> str:
    """Where the first NaN or infinity lies, as "report.rows[3].speedup"; "" if there is none."""
    if isinstance(value, float) and not math.isfinite(value):
        return where
    items: list[tuple[Any, str]] = []
    if isinstance(value, Mapping):
        items = [(v, f"{where}.{k}") for k, v in value.items()]
    elif isinstance(value, list | tuple):
        items = [(v, f"{where}[{i}]") for i, v in enumerate(value)]
    return next((found for item, inner in items if (found := _first_not_finite(item, inner))), "")


def write_all(report: Mapping[str, Any], run_dir: Path) -> dict[str, Path]:
    """Write report.json, report.md and report.html into the run folder, each atomically.

    Raises:
        ArtifactError: a figure is NaN or infinite (says where); then nothing is written.
    """
    where = _first_not_finite(report)
    if where:
        raise ArtifactError(f"the report holds a figure that is not finite at {where}", "this is a defect of the stage that wrote it: please report it")
    paths = {"json": run_dir / "report.json", "markdown": run_dir / "report.md", "html": run_dir / "report.html"}
    texts = {name: render(report, name) for name in ("markdown", "html")}
    atomic_write_json(paths["json"], report)
    for name, text in texts.items():
        atomic_write(paths[name], text)
    return paths
