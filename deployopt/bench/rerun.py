"""Measure the artifacts of two runs against each other, interleaved on this machine: what `deployopt compare --rerun` trusts instead of stored latencies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deployopt.bench.comparison import Reran, check_same_recipe, chosen
from deployopt.bench.environment import reason_of
from deployopt.bench.harness import Failure, Group, Measured, Settings, Subject
from deployopt.bench.images import SYNTHETIC, images_for
from deployopt.bench.scenarios import Scenario
from deployopt.bench.targets import opener, resolve
from deployopt.errors import ArtifactError, DeployoptError, UsageError
from deployopt.report import Report, summary
from deployopt.report.summary import JsonRow
from deployopt.runtime import host
from deployopt.runtime.progress import Progress
from deployopt.runtime.statistics import Ratio, paired_ratio, ratio_over_lifetimes

# Of sessions with one thread, between whose blocks nothing has to wait. A machine's mood wanders over tens of milliseconds, and what two blocks share of it
# cancels in their ratio: lifetimes of a second in blocks of 50 ms had ratios that spread by 2.1 %, in these by 1.3 % (benchmarks/gate.py, on two hours
# of one machine).
BLOCK_S = 0.012
MINIMUM_LIFETIMES = 3  # Student's interval of two is 4.5 times as wide


@dataclass(frozen=True)
class Plan:
    """How to measure again.

    Attributes:
        lifetimes: of both processes of a row, at least. Each gives one ratio; their spread gives the interval.
        precision: half of that interval's width, as a share of the ratio, down to which more lifetimes are added, at most as many again. Stopping
            by width favours intervals that came out narrow by chance: in simulation they cover the true ratio in 93 % of cases or more, not in 95 %
            (tests/bench/test_rerun.py). Stopping by the verdict would cost far more.
        budget: seconds of wall time for a row: beyond `lifetimes`, none is begun that would not end in it if it took as long as the others.
        seconds: timed for each artifact and lifetime.
        threads: of both sides; None takes the base row's.
        settings: of each lifetime otherwise.
    """

    lifetimes: int = 5
    precision: float = 0.01
    budget: float = 60.0
    seconds: float = 1.0
    threads: int | None = None
    settings: Settings = field(default_factory=Settings)


def rerun(
    base: Report, new: Report, plan: Plan, progress: Progress, only: Sequence[str] = (), images: NDArray[np.uint8] | None = None
) -> dict[str, Reran | str]:
    """Measure each row of both runs (`only` these if any are named) on `images` (as `measure_pair` takes them), or say why one was not.

    Load and throttling hit both sides of a round alike, so a lifetime that would make a stored row invalid counts here, and the row says so.

    Raises:
        UsageError: runs of different recipes, fewer than 3 lifetimes, or no row with an artifact in both.
        ArtifactError: a report that does not lie in a run folder.
    """
    check_same_recipe(base, new)
    if plan.lifetimes < MINIMUM_LIFETIMES:
        raise UsageError(f"wanted at least {MINIMUM_LIFETIMES} process lifetimes, found {plan.lifetimes}: an interval comes from their spread")
    before, after = ({summary.row_key(r): r for r in report.rows if r.get("artifact")} for report in (base, new))
    wanted = [key for key in chosen(only, base, new) if key in before and key in after]
    if not wanted:
        raise UsageError(f"wanted rows with an artifact in both runs, found none (base: {', '.join(before) or 'none'}; new: {', '.join(after) or 'none'})")
    found: dict[str, Reran | str] = {}
    with progress.track("measure again", len(wanted)) as bar:
        for key in wanted:
            try:
                found[key] = _measure_again((before[key], after[key]), (_folder(base), _folder(new)), plan, progress, images)
            except DeployoptError as exc:
                found[key] = _on_one_line(reason_of(exc))
            bar.advance(1, key)
    return found


def _folder(report: Report) -> Path:
    if report.folder is None:
        raise ArtifactError("wanted a report inside a run folder, found one without", "give the folders that `deployopt run` named")
    return report.folder


def _measure_again(rows: tuple[JsonRow, JsonRow], folders: tuple[Path, Path], plan: Plan, progress: Progress, images: NDArray[np.uint8] | None) -> Reran | str:
    subjects = []
    devices = [device for row in rows if (device := (row.get("contract") or {}).get("device"))]
    if len(set(devices)) > 1:
        return f"device: {' → '.join(devices)}"
    device = devices[0] if devices else "cpu"
    threads = plan.threads or rows[0].get("threads") or host.usable_cores()
    for side, row, folder in zip(("base", "new"), rows, folders, strict=True):
        target = resolve(f"{folder}:{summary.row_key(row)}")
        scenario = Scenario(row.get("scenario") or "single_stream", threads)
        subjects.append(Subject(side, opener(target.backend), target.path, scenario.options(target.session_options(threads, device)), scenario.name))
    pairs = measure_pair((subjects[0], subjects[1]), rows[0]["batch"], plan, progress, images)
    return pairs if isinstance(pairs, str) else summarize(pairs)


Pair = tuple[Measured, Measured]


def measure_pair(subjects: tuple[Subject, Subject], batch: int, plan: Plan, progress: Progress, images: NDArray[np.uint8] | None = None) -> list[Pair] | str:
    """Time two sessions interleaved, in new processes each lifetime; the reason where one could not be timed.

    Args:
        subjects: base and new.
        images: uint8 [n, H, W, C]; None makes noise of each model's size.

    Returns:
        (base, new) of each lifetime.
    """
    pairs: list[Pair] = []
    begun = time.monotonic()
    while not is_enough(plan, len(pairs), time.monotonic() - begun, partial(_judged, pairs)):
        found = _lifetime(subjects, batch, plan, len(pairs), progress, images)
        if isinstance(found, str):
            return found
        pairs.append(found)
    return pairs


def _lifetime(subjects: tuple[Subject, Subject], batch: int, plan: Plan, number: int, progress: Progress, images: NDArray[np.uint8] | None) -> Pair | str:
    """Both sessions in new processes; who is opened first changes, as it may get the better place in memory."""
    ordered = subjects if number % 2 == 0 else subjects[::-1]
    block_s = BLOCK_S if all(s.threads == 1 for s in subjects) else None
    settings = replace(plan.settings, min_seconds=plan.seconds, block_s=block_s, seed=plan.settings.seed + number)
    with Group(ordered, settings, progress) as group:
        given = {key: images_for(opened.inputs, batch, settings.seed) if images is None else images for key, opened in group.opened.items()}
        timed = group.measure(given, batch, SYNTHETIC if images is None else "images that were given")
        results = {key: found if isinstance(found, Failure) else group.checked(found, given[key]) for key, found in timed.items()}
    base, new = (results[s.key] for s in subjects)
    if isinstance(base, Failure) or isinstance(new, Failure):
        return "; ".join(f"{s.key}: {_on_one_line(r.reason)}" for s, r in zip(subjects, (base, new), strict=True) if isinstance(r, Failure))
    return base, new


def is_enough(plan: Plan, lifetimes: int, seconds: float, ratio: Callable[[], Ratio]) -> bool:
    """Whether a row gets no further lifetime, after so many that took so many seconds; their `ratio` is asked for where it decides."""
    if not plan.lifetimes <= lifetimes < 2 * plan.lifetimes:
        return lifetimes >= plan.lifetimes
    return seconds * (lifetimes + 1) / lifetimes > plan.budget or half_width(ratio()) <= plan.precision


def _on_one_line(reason: str) -> str:
    return " ".join(reason.split())


def _latency(pairs: Sequence[Pair]) -> Ratio:
    return ratio_over_lifetimes([paired_ratio(new.block_medians_ms, base.block_medians_ms) for base, new in pairs])


def _throughput(pairs: Sequence[Pair]) -> Ratio:
    return ratio_over_lifetimes([paired_ratio(new.block_throughputs_per_s, base.block_throughputs_per_s) for base, new in pairs])


def _device(pairs: Sequence[Pair]) -> Ratio | None:
    """By the device clock; None where a side has none."""
    blocks = [(new.device_block_medians_ms, base.device_block_medians_ms) for base, new in pairs]
    known = [paired_ratio(new, base) for new, base in blocks if new and base]
    return ratio_over_lifetimes(known) if len(known) == len(pairs) else None


def _judged(pairs: Sequence[Pair]) -> Ratio:
    """The ratio of what the scenario's figure is."""
    return _throughput(pairs) if pairs[0][0].contract["scenario"] == "offline" else _latency(pairs)


def half_width(ratio: Ratio) -> float:
    """Of its interval, as a share of the ratio."""
    return (ratio.high - ratio.low) / (2 * ratio.value)


def summarize(pairs: Sequence[Pair]) -> Reran:
    """One ratio a lifetime, each the median over its rounds, and over them Student's interval."""
    peaks = [new.peak_memory_bytes / base.peak_memory_bytes for base, new in pairs if base.peak_memory_bytes and new.peak_memory_bytes]
    on_gpu = [new.device_memory_bytes / base.device_memory_bytes for base, new in pairs if base.device_memory_bytes and new.device_memory_bytes]
    return Reran(
        base_p50_ms=float(np.median([base.host["p50"] for base, _ in pairs])),
        new_p50_ms=float(np.median([new.host["p50"] for _, new in pairs])),
        latency=_latency(pairs),
        throughput=_throughput(pairs),
        memory=ratio_over_lifetimes(peaks) if len(peaks) == len(pairs) else None,
        lifetimes=len(pairs),
        noise=_noise(pairs),
        device=_device(pairs),
        device_memory=float(np.median(on_gpu)) if on_gpu else None,
        threads=pairs[0][0].contract["threads"],
        ran_on=pairs[0][0].contract["device"],
    )


def _noise(pairs: Sequence[Pair]) -> str:
    """What would make stored rows invalid, "" if nothing."""
    reasons = [reason for base, new in pairs if (reason := base.invalid or new.invalid)]
    return f"{len(reasons)} of {len(pairs)} lifetimes were noisy, as the interval shows: {reasons[0]}" if reasons else ""
