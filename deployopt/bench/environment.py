"""Where figures were taken: the machine, its software, and what else went on. Never host, user or path names or environment variables."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from deployopt.errors import DeployoptError
from deployopt.runtime import host

# not behind a letter, dot, colon or slash: those are relative paths and URLs
_FOLDERS = re.compile(r"""(?<![\w.:/~-])/(?P<root>[^\s/'":;,()<>|]+)/(?:[^\s/'":;,()<>|]+/)*""")


def without_folders(text: str, *folders: Path) -> str:
    """A message with files by their names alone: no `folders`, and no other absolute path's.

    Names of graph nodes ("/layer1/conv1/Conv") stay: only what begins with a folder in this machine's root is a path.
    """
    for folder in folders:
        text = text.replace(f"{folder}/", "")
    return _FOLDERS.sub(lambda found: "" if Path("/", found["root"]).is_dir() else found[0], text)


def reason_of(error: DeployoptError, *folders: Path) -> str:
    """An error as a row's reason: the first line of its message and its remedy, both `without_folders`. `report.summary.split_remedy` takes it apart."""
    remedy = f"\n  → {error.remedy}" if error.remedy else ""
    return without_folders(error.message.splitlines()[0] + remedy, *folders)


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def versions(distributions: Iterable[str]) -> dict[str, str | None]:
    """Installed versions by distribution name, None for what is not installed."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in distributions}


def environment(distributions: Iterable[str]) -> dict[str, Any]:
    """What `environment.json` and a report say: cpu, memory, gpus, python, os, container, versions, utc."""
    return {
        "cpu": host.cpu(),
        "memory_bytes": host.memory()["total_bytes"],
        "gpus": host.gpus(),
        "python": platform.python_version(),
        "os": host.operating_system(),
        "container": host.container(),
        "versions": versions(distributions),
        "utc": utc_now(),
    }


class Condition(NamedTuple):
    """State of the machine at one moment, read before and after a measurement.

    Attributes:
        frequency_mhz: of the allowed cores, mean. load_average: over the last minute.
        throttles: of the CPU for heat since boot.
        gpus: as `host.gpus`.
    """

    frequency_mhz: float | None
    load_average: float | None
    throttles: int | None
    gpus: list[dict[str, Any]]

    @staticmethod
    def now() -> Condition:
        return Condition(host.frequency_mhz(), host.load_average(), host.throttle_count(), host.gpus())
