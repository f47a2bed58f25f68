"""Where figures were taken: the machine, its software, and what else went on. Never host, user or path names or environment variables."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from deployopt.runtime import host
from deployopt.runtime.host import CpuTimes

# not behind a letter, dot, colon or slash: those are relative paths and URLs
_FOLDERS = re.compile(r"""(?<![\w.:/~-])/(?P<root>[^\s/'":;,()<>|]+)/(?:[^\s/'":;,()<>|]+/)*""")


def without_folders(text: str, *folders: Path) -> str:
    """A message with files by their names alone: no `folders`, and no other absolute path's.

    Names of graph nodes ("/layer1/conv1/Conv") stay: only what begins with a folder in this machine's root is a path.
    """
    for folder in folders:
        text = text.replace(f"{folder}/", "")
    return _FOLDERS.sub(lambda found: "" if Path("/", found["root"]).is_dir() else found[0], text)


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


class Load:
    """CPU time that others took while blocks of one row were timed. Time between its blocks does not count."""

    def __init__(self) -> None:
        self._wall_s = self._other_s = self._stolen_s = 0.0
        self._known = True

    def add(self, before: CpuTimes | None, after: CpuTimes | None, wall_s: float, own_cpu_s: float) -> None:
        """One block: /proc/stat on either side, its wall time, and the CPU time of the timed process."""
        self._wall_s += wall_s
        if before is None or after is None:
            self._known = False
            return
        self._other_s += after.busy_s - before.busy_s - own_cpu_s
        self._stolen_s += after.stolen_s - before.stolen_s

    @property
    def other_cores(self) -> float | None:
        """Cores' worth of CPU time that other processes used, on average."""
        return max(0.0, self._other_s) / self._wall_s if self._known and self._wall_s > 0 else None

    @property
    def stolen_cores(self) -> float | None:
        """Cores' worth of CPU time that the hypervisor gave to other guests, on average."""
        return max(0.0, self._stolen_s) / self._wall_s if self._known and self._wall_s > 0 else None


def gpu_throttling(*conditions: Condition) -> list[str]:
    """Reasons for which a GPU throttled at any of the moments."""
    return sorted({f"{gpu['name']}: {reason}" for condition in conditions for gpu in condition.gpus for reason in gpu["throttled"] or []})


def percent_of_cores(used: float | None) -> float | None:
    return None if used is None else round(100 * used / host.usable_cores(), 2)


def contract_load(load: Load, before: Condition, after: Condition) -> dict[str, Any]:
    """The contract's `load`: what else used the machine, and its clocks before and after."""
    return {
        "steal_percent": percent_of_cores(load.stolen_cores),
        "other_cpu_percent": percent_of_cores(load.other_cores),
        "load_average": [before.load_average, after.load_average],
        "frequency_mhz": [before.frequency_mhz, after.frequency_mhz],
        "gpus": [{"name": gpu["name"], "before": _state(gpu), "after": _state(late)} for gpu, late in zip(before.gpus, after.gpus, strict=True)],
    }


def _state(gpu: dict[str, Any]) -> dict[str, Any]:
    return {key: gpu[key] for key in ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w", "throttled")}
