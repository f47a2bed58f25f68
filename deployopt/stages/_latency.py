"""Decisions by timing while pruning: cut candidates run on the target backend, interleaved with the network they are cut from.

A candidate is exported, prepared and built as `export` and `build` would, as FP32, untrained and in the default opset: latency depends on widths, not
on weights.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from deployopt.artifact import Artifact
from deployopt.errors import PruningImpossible
from deployopt.runtime.progress import Progress
from deployopt.stages import StageContext
from deployopt.stages._timing import SECONDS, Candidates, TimedOn

if TYPE_CHECKING:
    from deployopt.bench.harness import Measured
    from deployopt.nn.models import Network
    from deployopt.nn.pruning import Cuts

ALIGNMENTS = (1, 4, 8, 16)
ALIGNING_LIFETIMES = 3  # of all alignments' sessions, timed together as long as one lifetime is elsewhere: two give no interval worth the name
PRECISION: Literal["fp32"] = "fp32"
PARENT = "parent"
CONFIRMING_LIFETIMES = 4  # of its sessions' processes, for the candidate that is taken, twice that if undecided: each keeps its luck in memory layout for life
BLOCKS = 40  # of candidate and parent in turn: more than reports need, since each decision costs or saves a build
TOLERANCE = 0.03  # a candidate this far below the target is close enough
CONFIRMED = 0.01  # the confirming measurement may be so far above it: intervals are about as wide
TRIES = 14


@dataclass(frozen=True)
class Reading:
    """A candidate's p50 latency, and its ratio to the parent's from the rounds they share.

    Attributes:
        ratio_ci95: of a single lifetime a bootstrap over rounds, None below 20 of them; of several, Student's over lifetimes.
        blocks: rounds, of all lifetimes.
        invalid: why the machine was too disturbed for a reported row; the ratio, being taken inside rounds, suffers less.
    """

    ratio: float
    ratio_ci95: list[float] | None
    ms: float
    parent_ms: float
    blocks: int
    invalid: str | None


class Timing(Candidates):
    """Times cut networks against the `parent` they are cut from; those of one architecture are built once."""

    def __init__(self, context: StageContext, parent: Network, where: TimedOn) -> None:
        super().__init__(context, where, PRECISION)
        self._parent = parent

    def parent_ms(self) -> float:
        """p50 of the parent alone."""
        return float(self._measured({}, SECONDS, 0)[PARENT].host["p50"])

    def compare(self, candidates: Mapping[str, Network], lifetimes: int = 1, seconds: float | None = None) -> dict[str, Reading]:
        """Time candidates and the parent in shuffled rounds, in new processes for each of `lifetimes`.

        Args:
            seconds: for each network in each lifetime, at least; None: `SECONDS`.

        Raises:
            BuildFailed, ExportFailed: of a candidate. StageFailed: one could not be timed.
        """
        found = [self._measured(candidates, seconds or SECONDS, seed) for seed in range(lifetimes)]
        return {key: _reading([(results[key], results[PARENT]) for results in found]) for key in candidates}

    def _measured(self, candidates: Mapping[str, Network], seconds: float, seed: int) -> dict[str, Measured]:
        networks = {PARENT: self._parent, **candidates}
        return self.measure({key: self._artifact(network) for key, network in networks.items()}, seconds, BLOCKS, seed)

    def _artifact(self, network: Network) -> Artifact:
        from deployopt.nn.export import canonical, deployed

        return self.built(_architecture(network), lambda: canonical(deployed(network), network, None))


def _reading(lifetimes: Sequence[tuple[Measured, Measured]]) -> Reading:
    """What (candidate, parent) of each lifetime say together."""
    from deployopt.bench.harness import speedup
    from deployopt.runtime.statistics import ratio_over_lifetimes

    shares = [speedup(candidate, parent) for candidate, parent in lifetimes]  # of the parent over the candidate: the share of its latency that is left
    ratio, interval = shares[0]
    if len(shares) > 1:
        ratio, *interval = ratio_over_lifetimes([share for share, _ in shares])
    ms, parent_ms = (statistics.median(float(pair[side].host["p50"]) for pair in lifetimes) for side in (0, 1))
    blocks = sum(min(len(candidate.block_medians_ms), len(parent.block_medians_ms)) for candidate, parent in lifetimes)
    invalid = next((measured.invalid for pair in lifetimes for measured in pair if measured.invalid), None)
    return Reading(ratio, interval, ms, parent_ms, blocks, invalid)


def _architecture(network: Network) -> str:
    from deployopt.runtime.hashing import sha256_json

    return sha256_json({name: list(tensor.shape) for name, tensor in network.state_dict().items()})[:16]


def _candidate(network: Network, cuts: Cuts, kept: Sequence[int]) -> Network:
    from deployopt.nn import pruning

    candidate = copy.deepcopy(network).cpu()
    pruning.replay(candidate, cuts.history(kept))
    return candidate


def fastest(timing: Timing, network: Network, cuts: Cuts, reach: Callable[[Cuts], list[int]]) -> dict[str, Any]:
    """Which multiple of channels to keep: of `ALIGNMENTS` at the same target the largest that cannot be told from the fastest.

    That is, whose interval over process lifetimes reaches down to the fastest's ratio. Kernels work on whole vectors of channels, and INT8's are four
    times as long as the FP32 ones that are timed here: where timing cannot tell, the larger multiple is the safer one.

    Args:
        reach: channels to keep by some cuts so that the target is met.

    Returns:
        {"round_to": the choice, "fastest": that of the least ratio, "ratio" (to the parent's latency), "ratio_ci95" and "p50_ms": each by alignment,
        "backend", "batch", "lifetimes"}; alignments that cannot reach the target are left out.

    Raises:
        PruningImpossible: none of them can.
    """
    impossible: PruningImpossible | None = None
    candidates: dict[str, Network] = {}
    for alignment in ALIGNMENTS:
        aligned = cuts.with_rules(round_to=alignment)
        try:
            candidates[str(alignment)] = _candidate(network, aligned, reach(aligned))
        except PruningImpossible as error:
            impossible = error
    if not candidates and impossible is not None:
        raise impossible
    readings = timing.compare(candidates, ALIGNING_LIFETIMES, SECONDS / ALIGNING_LIFETIMES)
    best = min(readings, key=lambda key: readings[key].ratio)
    alike = [int(key) for key, r in readings.items() if key == best or (r.ratio_ci95 is not None and r.ratio_ci95[0] <= readings[best].ratio)]
    return {
        "round_to": max(alike),
        "fastest": int(best),
        "backend": timing.backend,
        "batch": timing.batch,
        "lifetimes": ALIGNING_LIFETIMES,
        "ratio": {key: r.ratio for key, r in readings.items()},
        "ratio_ci95": {key: r.ratio_ci95 for key, r in readings.items()},
        "p50_ms": {key: r.ms for key, r in readings.items()},
    }


@dataclass
class _Tried:
    """A candidate of the search and the latest reading of it; `lucky` if an earlier one met the target."""

    kept: tuple[int, ...]
    macs: int
    reading: Reading
    confirmed: bool = False
    lucky: bool = False


class Search:
    """Finds the largest cut of `network` whose latency meets a target, by measuring candidates.

    The search runs over the share of MACs that is kept, of which latency is a rising, if bumpy, function: candidates lie close together, since any
    MACs can be reached closely. Each step interpolates between the nearest candidates on either side of the target, or extrapolates to it. What is taken is
    measured again, over several lifetimes of its process; if that says otherwise, the search goes on from there. So is the candidate that bounds the search
    from above, where a larger one was faster: a process may be slow for life, and what lies beyond would never be tried.

    Args:
        metric: what is aimed at: "ratio" to the parent, or "ms".
        goal: largest value of it that will do.
        whole: the value of `network` itself.
        parent_macs: of the network that `timing` compares with; None if that is `network`.
        stage: the instance's name in the recipe, for errors.
    """

    def __init__(
        self,
        timing: Timing,
        network: Network,
        cuts: Cuts,
        metric: Literal["ratio", "ms"],
        goal: float,
        whole: float,
        *,
        stage: str,
        parent_macs: int | None = None,
    ) -> None:
        self._timing, self._network, self._cuts = timing, network, cuts
        self._metric, self._goal, self._whole, self._stage = metric, goal, whole, stage
        self._macs = cuts.cost([g.size for g in cuts.groups])["macs"]
        self._parent_macs = parent_macs or self._macs
        self._smallest = cuts.smallest_macs
        self._tried: dict[tuple[int, ...], _Tried] = {}
        self._trace: list[dict[str, Any]] = []

    def run(self, progress: Progress) -> dict[str, Any]:
        """The widths found, as a JSON value.

        Returns:
            {"kept": {group: channels}, "reached": the confirming reading, "trace": every measurement, in order}.

        Raises:
            PruningImpossible: no candidate meets the target; says the best reached.
        """
        with progress.track("search for latency", TRIES) as bar:
            for _ in range(TRIES):
                best = self._best()
                bound = self._bound(best)
                budget = None if best is not None and self._close(best) else self._next(best)
                if bound is not None and not bound.confirmed and self._is_slower_than_a_larger_one(bound):
                    self._read(bound.kept, CONFIRMING_LIFETIMES)
                elif budget is not None:
                    self._read(budget)
                elif best is not None and not best.confirmed:
                    self._read(best.kept, CONFIRMING_LIFETIMES)
                else:
                    break
                bar.advance(1, f"{self._trace[-1]['ratio']:.3f} of the parent's")
        while (best := self._best() or self._nearest()) is not None and not best.confirmed:  # out of tries: down the list, until one holds or none is left
            self._read(best.kept, CONFIRMING_LIFETIMES)
        if best is None:
            raise self._impossible()
        names = [g.name for g in self._cuts.groups]
        return {"kept": dict(zip(names, best.kept, strict=True)), "reached": asdict(best.reading), "trace": self._trace}

    def _read(self, kept: tuple[int, ...], lifetimes: int = 1) -> None:
        candidate = {"candidate": _candidate(self._network, self._cuts, kept)}
        reading = self._timing.compare(candidate, lifetimes)["candidate"]
        before = self._tried.get(kept)
        confirming, lucky = before is not None, before is not None and (before.lucky or self._meets(before))
        if self._undecided(reading):
            reading = self._timing.compare(candidate, 2 * lifetimes if confirming else CONFIRMING_LIFETIMES)["candidate"]
        tried = _Tried(kept, self._cuts.cost(kept)["macs"], reading, confirming, lucky)
        self._tried[kept] = tried
        self._trace.append({"macs_ratio": tried.macs / self._parent_macs, **asdict(reading), "confirming": confirming})

    def _undecided(self, reading: Reading) -> bool:
        """Whether the interval holds the goal and is too wide to say that the candidate is close to it."""
        if reading.ratio_ci95 is None:
            return False
        low, high = (bound / reading.ratio * self._value(reading) for bound in reading.ratio_ci95)
        return low < self._goal < high and high - low > 2 * TOLERANCE * self._goal

    def _value(self, reading: Reading) -> float:
        return reading.ratio if self._metric == "ratio" else reading.ms

    def _meets(self, tried: _Tried) -> bool:
        return self._value(tried.reading) <= self._goal * (1 + CONFIRMED * tried.confirmed)

    def _close(self, tried: _Tried) -> bool:
        return self._value(tried.reading) >= self._goal * (1 - TOLERANCE)

    def _best(self) -> _Tried | None:
        """The largest candidate that meets the target by its latest reading."""
        return max((t for t in self._tried.values() if self._meets(t)), key=lambda t: t.macs, default=None)

    def _bound(self, best: _Tried | None) -> _Tried | None:
        """The smallest candidate above `best` that does not meet the target."""
        slower = (t for t in self._tried.values() if not self._meets(t) and (best is None or t.macs > best.macs))
        return min(slower, key=lambda t: t.macs, default=None)

    def _is_slower_than_a_larger_one(self, tried: _Tried) -> bool:
        larger = [self._value(t.reading) for t in self._tried.values() if t.macs > tried.macs]
        return min([self._whole, *larger]) < (1 - TOLERANCE) * self._value(tried.reading)

    def _nearest(self) -> _Tried | None:
        """The fastest candidate read once, if that reading is as little above the target as a confirming one may be."""
        near = (t for t in self._tried.values() if not t.confirmed and self._value(t.reading) <= self._goal * (1 + CONFIRMED))
        return min(near, key=lambda t: self._value(t.reading), default=None)

    def _next(self, best: _Tried | None) -> tuple[int, ...] | None:
        """The widths to try next, None if nothing untried lies between the nearest candidates."""
        aim = self._goal * (1 - TOLERANCE / 2)
        bound = self._bound(best)
        high_macs, high = (self._macs, self._whole) if bound is None else (bound.macs, self._value(bound.reading))
        if not self._tried:
            low_macs, wanted = self._smallest, self._macs * self._goal / self._whole  # as if latency were proportional to MACs
        elif best is None:  # on the line that the uncut network and the nearest candidate tell, since a part of latency goes with no MACs
            per_mac = (self._whole - high) / (self._macs - high_macs) if high_macs < self._macs else 0.0
            low_macs, wanted = self._smallest, high_macs - (high - aim) / per_mac if per_mac > 0 else 0.0
        else:
            low_macs, low = best.macs, self._value(best.reading)
            share = (aim - low) / (high - low) if high > low else 0.5
            wanted = low_macs + min(max(share, 0.1), 0.9) * (high_macs - low_macs)
        for macs in (wanted, (low_macs + high_macs) / 2, low_macs):
            kept = tuple(self._cuts.nearest(int(macs)))
            if kept not in self._tried:
                return kept
        return None

    def _impossible(self) -> PruningImpossible:
        fastest_tried = min(self._tried.values(), key=lambda t: self._value(t.reading))
        rules, reading, tried = self._cuts.rules, fastest_tried.reading, len(self._tried)
        lucky = sum(t.lucky for t in self._tried.values())
        unconfirmed = f"; {lucky} met it at first and not when confirmed over {CONFIRMING_LIFETIMES} process lifetimes" if lucky else ""
        return PruningImpossible(
            f"wanted latency.{self._metric} {self._goal:.3g} on {self._timing.backend} at batch {self._timing.batch}; "
            f"the best reached by {tried} candidate{'s' if tried > 1 else ''}, with max_layer_ratio {rules.max_layer_ratio:g} and "
            f"round_to {rules.round_to}, is {reading.ms:.3g} ms, {reading.ratio:.3f} of the parent's {reading.parent_ms:.3g} ms, "
            f"with {fastest_tried.macs / self._parent_macs:.3f} of its MACs{unconfirmed}",
            f"raise {self._stage}.target.latency, raise {self._stage}.max_layer_ratio, or lower {self._stage}.round_to",
        )
