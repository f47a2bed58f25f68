"""Installed distributions of a third party, as tests need them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def install(folder: Path, name: str, entry_points: str, modules: Mapping[str, str]) -> None:
    """Write version 1.0 of a distribution with one package of the same name into a folder that is, or will be, on `sys.path`.

    Args:
        entry_points: contents of entry_points.txt.
        modules: source by module name.
    """
    info, package = folder / f"{name}-1.0.dist-info", folder / name
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    package.mkdir()
    (package / "__init__.py").touch()
    for module, source in modules.items():
        (package / f"{module}.py").write_text(source)
