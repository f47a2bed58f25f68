"""Find a stage, backend, data set, task or model by the name a recipe gives: our module of that name, else an entry point.

A third party registers in its own `pyproject.toml`, e.g. `[project.entry-points."deployopt.stages"] distill = "my_package.distill"`;
the entry point names a module (or object) with the attributes our own modules of that room have. Nothing is imported before its name is used.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import EntryPoint, EntryPoints, distributions
from typing import Any, Literal

from deployopt.errors import UsageError

Kind = Literal["stages", "backends", "data", "tasks", "models"]


@lru_cache
def _ours(kind: Kind) -> frozenset[str]:
    if kind == "models":  # our own architectures are torchvision's; `nn.models` knows them
        return frozenset()
    package = importlib.import_module(f"deployopt.{kind}")
    return frozenset(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


@lru_cache
def _installed(path: tuple[str, ...]) -> EntryPoints:
    """All entry points on a search path: reading every package's takes a while."""
    return EntryPoints(entry for distribution in distributions() for entry in distribution.entry_points)


def _theirs(kind: Kind) -> dict[str, EntryPoint]:
    return {e.name: e for e in _installed(tuple(sys.path)).select(group=f"deployopt.{kind}")}


def names(kind: Kind) -> list[str]:
    """All names of a kind, ours and installed third parties', sorted."""
    return sorted(_ours(kind) | set(_theirs(kind)))


def find(kind: Kind, name: str) -> Any:
    """The module (or entry point's object) that a name stands for.

    Raises:
        UsageError: no such name; says which there are and the nearest one.
    """
    if name in _ours(kind):
        return importlib.import_module(f"deployopt.{kind}.{name}")
    theirs = _theirs(kind)
    if name in theirs:
        return theirs[name].load()
    raise UsageError(unknown(kind.rstrip("s") if kind != "data" else "data set", name, names(kind)))


def origin(kind: Kind, name: str) -> str | None:
    """The third party's distribution that a name comes from, as "my-package 1.0"; None for ours."""
    entry = None if name in _ours(kind) else _theirs(kind).get(name)
    return None if entry is None or entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


def unknown(what: str, name: str, available: Iterable[str]) -> str:
    """The sentence for a name that does not exist, with the nearest that does."""
    options = sorted(available)
    return f"unknown {what} '{name}'{did_you_mean(name, options)} (available: {', '.join(options) or 'none'})"


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """The end of a sentence about a misspelt word: "; did you mean 'qat'?", or nothing."""
    near = difflib.get_close_matches(word, list(options), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
