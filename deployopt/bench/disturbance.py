"""What disturbed a measurement: other load, steal, throttling, falling clocks, drift, spread. Beyond a limit a row is invalid, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from deployopt.bench.environment import Condition
from deployopt.runtime import host
from deployopt.runtime.clock import now_ns
from deployopt.runtime.host import CpuTimes, GpuMeter, GpuReading

DRIFT_BLOCKS = 9  # fewer have no thirds to speak of


@dataclass(frozen=True)
class Limits:
    """Above which a row is invalid.

    Attributes:
        max_spread: MAD / median of all samples.
        max_drift: change of the median of block medians from the first to the last third of the blocks, relative.
        max_contention: share of its threads for which others left no core.
        max_pressure: share of the time in which something that could run waited for a CPU.
        max_steal_percent: CPU time that the hypervisor gave to other guests, percent of the cores.
        max_clock_drop: fall of the SM clock of the row's GPU, or of the clock of the CPU core that a row on the CPU is timed on, from the first to the last
            third of its blocks, relative.
    """

    max_spread: float = 0.25
    max_drift: float = 0.3
    max_contention: float = 0.25
    max_pressure: float = 0.5
    max_steal_percent: float = 10.0
    max_clock_drop: float = 0.1


class Counters(NamedTuple):
    """What the kernel has counted since boot, each None where it does not say, and when they were read: `at_ns` of the host clock; with the row's GPU."""

    cpu: CpuTimes | None
    pressure_s: float | None
    at_ns: int
    gpu: GpuReading | None = None

    @staticmethod
    def now(meter: GpuMeter, gpu: int | None) -> Counters:
        return Counters(host.cpu_times(), host.cpu_pressure_s(), now_ns(), meter.read(gpu))


class Load:
    """CPU time that others took while blocks of one row were timed, as a share of the time between the counters on either side: for short blocks the way
    to the timed process and back is a large part of it. Time between its blocks does not count.

    Attributes:
        gpu: the row's GPU at the end of each block; empty for a row on the CPU, and where it cannot be told which GPU it is.
        core_mhz: clock of the core that the block was timed on, at its end; empty where Linux does not tell.
    """

    def __init__(self) -> None:
        self.gpu: list[GpuReading] = []
        self.core_mhz: list[float] = []
        self._wall_s = self._other_s = self._stolen_s = self._waited_s = self._energy_j = 0.0
        self._cpu_known = self._pressure_known = self._energy_known = True

    def add(self, before: Counters, after: Counters, own_cpu_s: float, core_mhz: float | None = None) -> None:
        """One block: counters on either side, the CPU time of the timed process, and its core's clock."""
        self._wall_s += (after.at_ns - before.at_ns) * 1e-9
        if before.cpu is None or after.cpu is None:
            self._cpu_known = False
        else:
            self._other_s += after.cpu.busy_s - before.cpu.busy_s - own_cpu_s
            self._stolen_s += after.cpu.stolen_s - before.cpu.stolen_s
        if before.pressure_s is None or after.pressure_s is None:
            self._pressure_known = False
        else:
            self._waited_s += after.pressure_s - before.pressure_s
        if after.gpu is not None:
            self.gpu.append(after.gpu)
        if core_mhz is not None:
            self.core_mhz.append(core_mhz)
        if before.gpu is None or after.gpu is None or before.gpu.energy_j is None or after.gpu.energy_j is None:
            self._energy_known = False
        else:
            self._energy_j += after.gpu.energy_j - before.gpu.energy_j

    @property
    def other_cores(self) -> float | None:
        """Cores' worth of CPU time that other processes used, on average."""
        return self._share(self._other_s, self._cpu_known)

    @property
    def stolen_cores(self) -> float | None:
        """Cores' worth of CPU time that the hypervisor gave to other guests, on average."""
        return self._share(self._stolen_s, self._cpu_known)

    @property
    def pressure(self) -> float | None:
        """Share of the time in which something that could run waited for a CPU."""
        return self._share(self._waited_s, self._pressure_known)

    @property
    def gpu_power_w(self) -> float | None:
        """Mean power of the row's GPU during its blocks, the way to the timed process and back included; whoever else computes on it counts too."""
        return self._share(self._energy_j, self._energy_known)

    def _share(self, seconds: float, known: bool) -> float | None:
        return max(0.0, seconds) / self._wall_s if known and self._wall_s > 0 else None


class Watched(NamedTuple):
    """A GPU that is or may be the row's: its SM clocks in the order they were read, None where the driver does not tell, and why it throttled."""

    name: str
    clocks_mhz: list[int | None]
    throttled: set[str]


class Observed(NamedTuple):
    """All that is known of how a row was measured.

    Attributes:
        block_medians: in the order of the rounds, any unit.
        spread: MAD / median of all samples.
        threads: CPU threads that it computes with. device: that executes, "cpu" or "cuda:N".
        gpu: its place in `Condition.gpus`; None for a row on the CPU, and where it cannot be told which it is: then all are watched.
        before, after: the machine at the end of the warm-up and of the rounds.
    """

    block_medians: Sequence[float]
    spread: float
    load: Load
    threads: int
    device: str
    before: Condition
    after: Condition
    gpu: int | None = None

    @property
    def watched(self) -> list[Watched]:
        """The row's GPU at the end of each of its blocks; where it cannot be told which it is, every GPU before and after all rounds."""
        if self.gpu is not None and self.load.gpu:
            reasons = {reason for reading in self.load.gpu for reason in reading.throttled or []}
            return [Watched(self.before.gpus[self.gpu]["name"], [reading.sm_clock_mhz for reading in self.load.gpu], reasons)]
        pairs = list(zip(self.before.gpus, self.after.gpus, strict=True))
        return [
            Watched(pair[0]["name"], [gpu["sm_clock_mhz"] for gpu in pair], {reason for gpu in pair for reason in gpu["throttled"] or []})
            for pair in (pairs if self.gpu is None else pairs[self.gpu : self.gpu + 1])
        ]


def drift(block_medians: Sequence[float]) -> float | None:
    """Change from the first to the last third of the blocks, relative to the first; None with too few blocks."""
    third = len(block_medians) // 3
    if len(block_medians) < DRIFT_BLOCKS:
        return None
    return float(np.median(block_medians[-third:]) / np.median(block_medians[:third]) - 1)


def faults(seen: Observed, limits: Limits, cores: int) -> list[str]:
    """Reasons why a row is invalid, one sentence each; [] for a quiet machine."""
    if seen.device == "cpu":
        found = ["the CPU throttled for heat"] if (seen.after.throttles or 0) > (seen.before.throttles or 0) else []
        if len(seen.load.core_mhz) >= DRIFT_BLOCKS:
            found += _clock_drop("the clock of the CPU core that it was timed on", seen.load.core_mhz, limits)
    else:
        found = [f"throttled: {reason}" for reason in _gpu_throttling(seen)]
        found += [fall for gpu in seen.watched for fall in _clock_drop(f"the SM clock of {gpu.name}", [c for c in gpu.clocks_mhz if c], limits)]
    steal = _percent(seen.load.stolen_cores, cores)
    if steal is not None and steal > limits.max_steal_percent:
        found.append(f"the hypervisor took {steal:.0f} % of the CPU time (limit {limits.max_steal_percent:g} %)")
    lacking = max(0.0, (seen.load.other_cores or 0.0) + seen.threads - max(cores, seen.threads))
    if lacking / seen.threads > limits.max_contention:
        found.append(f"other processes used {seen.load.other_cores:.1f} of {cores} cores beside its {seen.threads} threads")
    pressure = seen.load.pressure
    if pressure is not None and pressure > limits.max_pressure and seen.threads <= cores:
        found.append(f"processes waited for a CPU {100 * pressure:.0f} % of the time (limit {100 * limits.max_pressure:g} %)")
    moved = drift(seen.block_medians)
    if moved is not None and abs(moved) > limits.max_drift:
        found.append(f"it drifted by {100 * moved:+.0f} % from the first to the last third of its blocks (limit {100 * limits.max_drift:g} %)")
    if seen.spread > limits.max_spread:
        found.append(f"MAD/median is {seen.spread:.2f} (limit {limits.max_spread:g})")
    return found


def flags(seen: Observed, limits: Limits, cores: int) -> list[str]:
    """What a reader should know of other load, and what does not make a row invalid by itself."""
    used = _percent(seen.load.other_cores, cores)
    found = ["other load unknown"] if used is None else []
    if used is not None and used > 100 * limits.max_contention:
        found.append(f"other processes used {used:.0f} % of the cores")
    if seen.threads > cores:  # which wait for each other: the kernel's counter does not say whose threads wait
        found.append(f"its {seen.threads} threads share {cores} cores, so waiting for a CPU is not counted as other load")
    return found


def contract(seen: Observed, cores: int) -> dict[str, Any]:
    """The contract's `load`: what else used the machine, and its clocks, temperatures and power before and after; `gpu_power_w` and
    `own_gpu` are of the row's own GPU during its blocks, `core_clock_mhz` of the CPU core that it was timed on: at first, at its lowest and at last, None where
    the machine does not tell, and then no fall of it is found."""
    pressure, moved, before, after = seen.load.pressure, drift(seen.block_medians), seen.before, seen.after
    power = seen.load.gpu_power_w
    return {
        "steal_percent": _percent(seen.load.stolen_cores, cores),
        "other_cpu_percent": _percent(seen.load.other_cores, cores),
        "pressure_percent": None if pressure is None else round(100 * pressure, 2),
        "drift_percent": None if moved is None else round(100 * moved, 2),
        "load_average": [before.load_average, after.load_average],
        "gpu_power_w": None if power is None or seen.device == "cpu" else round(power, 2),
        "core_clock_mhz": [clocks[0], min(clocks), clocks[-1]] if (clocks := seen.load.core_mhz) else None,
        "own_gpu": _during(seen.load.gpu) if seen.load.gpu else None,
        "frequency_mhz": [before.frequency_mhz, after.frequency_mhz],
        "gpus": [{"name": gpu["name"], "before": _state(gpu), "after": _state(late)} for gpu, late in zip(before.gpus, after.gpus, strict=True)],
    }


def _gpu_throttling(seen: Observed) -> list[str]:
    """Reasons for which the row's GPU throttled whenever it was read."""
    return sorted({f"{gpu.name}: {reason}" for gpu in seen.watched for reason in gpu.throttled})


def _clock_drop(name: str, clocks_mhz: Sequence[float], limits: Limits) -> list[str]:
    """That a clock fell from the first to the last third of its readings, [] if it did not or nothing was read."""
    third = max(1, len(clocks_mhz) // 3)
    first, last = (float(np.median(part)) for part in (clocks_mhz[:third], clocks_mhz[-third:])) if clocks_mhz else (0.0, 0.0)
    if first and 1 - last / first > limits.max_clock_drop:
        return [f"{name} fell from {first:g} to {last:g} MHz (limit {100 * limits.max_clock_drop:g} %)"]
    return []


def _during(readings: Sequence[GpuReading]) -> dict[str, Any]:
    """The row's GPU at the ends of its blocks: its clock at first, at its lowest and at last, its temperature at first and at its highest."""
    clocks = [r.sm_clock_mhz for r in readings if r.sm_clock_mhz is not None]
    temperatures = [r.temperature_c for r in readings if r.temperature_c is not None]
    return {
        "sm_clock_mhz": [clocks[0], min(clocks), clocks[-1]] if clocks else None,
        "temperature_c": [temperatures[0], max(temperatures)] if temperatures else None,
        "throttled": sorted({reason for r in readings for reason in r.throttled or []}),
    }


def _percent(used_cores: float | None, cores: int) -> float | None:
    return None if used_cores is None else round(100 * used_cores / cores, 2)


def _state(gpu: dict[str, Any]) -> dict[str, Any]:
    return {key: gpu[key] for key in ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w", "throttled")}
