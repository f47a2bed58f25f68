"""Does the gate of `deployopt compare --rerun` hold? False alarms, slowdowns found, and coverage of the interval, live and resampled.

    python benchmarks/gate.py                # about 100 minutes on two cores, which should have nothing else to do; goes on where it was interrupted
    python benchmarks/gate.py --aa 2 --slow 2 --longer 1 --resamples 200    # a try, five minutes
    python benchmarks/gate.py --aa 0 --slow 0 --longer 0    # resamples what was recorded, under a minute

Every comparison is what `--rerun` does: a ResNet-20's FP32 on ONNX Runtime, both sides in new processes for each lifetime, interleaved. "A/A" has the
same artifact twice; the slowed side spins 5 % (or 3 %) of its last inference's time longer, in its own process, which comes to a little more of the median. A
regression is found where the whole interval lies beyond the gate. Replays draw whole lifetimes with replacement (drawing blocks inside them too would count
their noise twice: Davison & Hinkley 1997, section 3.8) and swap the sides of an A/A lifetime at random, so that its true ratio is one; without the swaps a bias
of one side would show. "Exactly" 5 % slower are A/A lifetimes with one side times 1.05; exactly 3 % slower those with the longer budget, less what they were
slower by on average, times 1.03. Lifetimes of all comparisons are drawn together, so replays leave out what those of one comparison share; live ones have it.
Shares are of rows: `compare` judges every row of two runs, and a false alarm of any is one of the whole. Writes benchmarks/results/gate.json (with every
block) and gate.md; exits with 1 where a share that is wanted is not reached.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import _networks
import _slowed
import numpy as np
import onnx
from numpy.typing import NDArray

from deployopt.bench.environment import environment
from deployopt.bench.harness import Subject
from deployopt.bench.rerun import BLOCK_S, Plan, is_enough, measure_pair
from deployopt.bench.targets import opener
from deployopt.runtime.files import atomic_write
from deployopt.runtime.progress import SilentProgress
from deployopt.runtime.session import SessionOptions
from deployopt.runtime.statistics import Ratio, bootstrap_ratio, paired_ratio, ratio_over_lifetimes

RESULTS = Path(__file__).resolve().parent / "results"
STORED = RESULTS / "gate.json"
QUICK_S = 60  # a comparison that finds 5 % may take
COUNTS = ("aa", "slow", "longer", "resamples")  # options that may differ between calls
Lifetime = tuple[list[float], list[float]]  # block medians in ms: base, new
Timed = tuple[Lifetime, float]  # with the wall time that it took in seconds
LIVE_AA, LIVE_SLOW, RESAMPLED = 30, 20, 1000  # comparisons, without which a share says too little


def subjects(model: Path, threads: int, slowdown: float) -> tuple[Subject, Subject]:
    plain = SessionOptions(threads)
    if slowdown == 0:
        new = Subject("new", opener("onnxruntime"), model, plain)
    else:
        new = Subject("new", _slowed.OPENER, model, plain._replace(extra={"slowdown": slowdown}))
    return Subject("base", opener("onnxruntime"), model, plain), new


def trial(model: Path, slowdown: float, plan: Plan) -> dict[str, Any]:
    """One live comparison: seconds it took, its ratio and its lifetimes."""
    start = time.monotonic()
    pairs = measure_pair(subjects(model, plan.threads or 1, slowdown), 1, plan, SilentProgress())
    if isinstance(pairs, str):
        raise SystemExit(pairs)
    lifetimes = [(base.block_medians_ms, new.block_medians_ms) for base, new in pairs]
    noisy = sum(bool(base.invalid or new.invalid) for base, new in pairs)
    seconds = round(time.monotonic() - start, 1)
    return {"seconds": seconds, "slowdown": slowdown, "ratio": list(interval(lifetimes)), "noisy_lifetimes": noisy, "lifetimes": lifetimes}


def interval(lifetimes: Sequence[Lifetime]) -> Ratio:
    return ratio_over_lifetimes([paired_ratio(new, base) for base, new in lifetimes])


def until_enough(lifetime: Callable[[], Timed], plan: Plan) -> Ratio:
    """As `measure_pair` stops."""
    drawn: list[Lifetime] = []
    seconds = 0.0
    while not is_enough(plan, len(drawn), seconds, partial(interval, drawn)):
        blocks, took = lifetime()
        drawn.append(blocks)
        seconds += took
    return interval(drawn)


def without_slowdown(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Comparisons with what their slowed sides were slower by, on average over all of them, taken out."""
    slower = float(np.exp(np.mean([np.log(t["ratio"][0]) for t in trials]))) if trials else 1.0
    return [{**t, "lifetimes": [(base, [ms / slower for ms in new]) for base, new in t["lifetimes"]]} for t in trials]


def share(found: Sequence[bool]) -> str:
    return f"{sum(found)} of {len(found)}" + (f" ({100 * sum(found) / len(found):.1f} %)" if found else "")


class Replay:
    """Comparisons drawn from recorded lifetimes."""

    def __init__(self, trials: Sequence[dict[str, Any]], seed: int) -> None:
        self._pool: list[Timed] = [(lifetime, t["seconds"] / len(t["lifetimes"])) for t in trials for lifetime in t["lifetimes"]]
        self._rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self._pool)

    def draw(self, plan: Plan, *, swapped: bool, slowdown: float) -> Ratio:
        """`swapped`: the sides change places at random, as they may where both are the same artifact; then the new one gets slower by a share."""
        return until_enough(lambda: self._lifetime(swapped, 1 + slowdown), plan)

    def _lifetime(self, swapped: bool, factor: float) -> Timed:
        (base, new), took = self._pool[self._rng.integers(len(self._pool))]
        if swapped and self._rng.random() < 0.5:
            base, new = new, base
        return (base, [ms * factor for ms in new]), took


def simulated(plan: Plan, resamples: int, layout: float, noise: float, seed: int) -> list[bool]:
    """Whether intervals cover, for lifetimes with a bias of their own (standard deviation of its logarithm: `layout`) and blocks with noise and outliers."""
    rng = np.random.default_rng(seed)

    def blocks(mood: NDArray[np.float64]) -> list[float]:
        clean = mood * np.exp(rng.normal(0, noise, len(mood)))
        disturbed = rng.random(len(mood)) < 0.05
        return list(np.where(disturbed, clean * (1 + rng.exponential(0.5, len(mood))), clean))

    def lifetime() -> Timed:
        mood = np.exp(rng.normal(0, 0.05, 20))
        return (blocks(mood), blocks(mood * np.exp(rng.normal(0, layout)))), 0.0

    found = [until_enough(lifetime, plan) for _ in range(resamples)]
    return [ratio.low <= 1 <= ratio.high for ratio in found]


class Finding(NamedTuple):
    """A line of the table: how many of the comparisons, and what share is wanted, if one is."""

    what: str
    found: Sequence[bool]
    least: float = 0.0
    most: float = 1.0
    fewest: int = 0

    @property
    def met(self) -> bool:
        return len(self.found) >= self.fewest and (not self.found or self.least <= sum(self.found) / len(self.found) <= self.most)

    @property
    def wanted(self) -> str:
        if (self.least, self.most) == (0.0, 1.0):
            return ""
        least, most = f"{100 * self.least:g}", f"{100 * self.most:g}"
        share = f"≤ {most} %" if self.least == 0 else f"≥ {least} %" if self.most == 1 else f"{least}–{most} %"
        return f"{share}, of {self.fewest} or more" if self.fewest else share


COVERAGE: dict[str, Any] = {"least": 0.93, "most": 0.97, "fewest": RESAMPLED}


def evaluate(recorded: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> list[Finding]:
    beyond: Callable[[Sequence[float]], bool] = lambda ratio: ratio[1] > 1 + arguments.gate  # noqa: E731
    covers: Callable[[Ratio], bool] = lambda ratio: ratio.low <= 1 <= ratio.high  # noqa: E731
    aa, slow, longer = (recorded[name] for name in ("aa", "slow", "longer"))
    quick, patient = plans(arguments)

    def resampled(trials: Sequence[dict[str, Any]], plan: Plan, *, swapped: bool = False, slowdown: float = 0.0) -> list[Ratio]:
        replay = Replay(trials, seed=1)
        return [replay.draw(plan, swapped=swapped, slowdown=slowdown) for _ in range(arguments.resamples if len(replay) else 0)]

    def found(what: str, among: Sequence[Sequence[float]], fewest: int) -> Finding:
        return Finding(f"{what}: found", [beyond(ratio) for ratio in among], least=0.95, fewest=fewest)

    def alarms(what: str, among: Sequence[Sequence[float]], fewest: int) -> Finding:
        return Finding(f"A/A, {what}: false alarms", [beyond(ratio) for ratio in among], most=0.01, fewest=fewest)

    swapped, live = resampled(aa, quick, swapped=True), [Ratio(*t["ratio"]) for t in aa]
    equal = without_slowdown(longer)
    rows = [
        alarms("live", live, LIVE_AA),
        alarms("resampled", swapped, 2 * RESAMPLED),
        alarms("resampled without swapping sides", resampled(aa, quick), 2 * RESAMPLED),
        found("5 % slower, live", [t["ratio"] for t in slow], LIVE_SLOW),
        found(f"5 % slower, live, within {QUICK_S} s", [t["ratio"] if t["seconds"] <= QUICK_S else (1.0, 1.0, 1.0) for t in slow], LIVE_SLOW),
        found("5 % slower, resampled", resampled(slow, quick), RESAMPLED),
        found("exactly 5 % slower, resampled", resampled(aa, quick, swapped=True, slowdown=0.05), RESAMPLED),
        found("3 % slower, longer budget, live", [t["ratio"] for t in longer], LIVE_SLOW),
        found("3 % slower, longer budget, resampled", resampled(longer, patient), RESAMPLED),
        found("exactly 3 % slower, longer budget, resampled", resampled(equal, patient, swapped=True, slowdown=0.03), RESAMPLED),
        Finding("A/A, resampled: the interval over lifetimes covers 1", [covers(r) for r in swapped], **COVERAGE),
        Finding("A/A, live: the interval over lifetimes covers 1", [covers(r) for r in live]),
    ]
    for layout, noise in ((0.0, 0.02), (0.01, 0.02), (0.02, 0.05)):
        covered = simulated(quick, arguments.resamples, layout, noise, seed=2)
        rows.append(Finding(f"simulated (lifetimes {100 * layout:g} %, blocks {100 * noise:g} %): the interval covers", covered, **COVERAGE))
    once = [bootstrap_ratio(new, base, paired=True) for t in aa for base, new in t["lifetimes"]]
    rows.append(Finding("A/A, live, in one lifetime alone, as `run` and `bench` have it: the bootstrap over blocks covers 1", [covers(r) for r in once]))
    return rows


def table(rows: Sequence[Finding], document: dict[str, Any]) -> str:
    """The findings as Markdown, with what they were taken on and how long comparisons took."""
    where = document["environment"]
    lines = [f"| {row.what} | {share(row.found)} | {row.wanted} |" for row in rows]
    for name, trials in document["recorded"].items():
        if trials:
            seconds, ratios = [t["seconds"] for t in trials], [t["ratio"][0] for t in trials]
            noisy, lifetimes = (sum(found) for found in ([t["noisy_lifetimes"] for t in trials], [len(t["lifetimes"]) for t in trials]))
            lines.append(f"| {name}: seconds of a comparison, median and longest | {np.median(seconds):.0f}, {max(seconds):.1f} | |")
            lines.append(f"| {name}: ratio, mean of the comparisons | {np.mean(ratios):.4f} | |")
            lines.append(f"| {name}: lifetimes so disturbed that a stored row would be invalid | {noisy} of {lifetimes} | |")
    options = document["options"]
    facts = f"{where['cpu']['model']}, {where['cpu']['cores']} cores, {where['os']}; ONNX Runtime {where['versions']['onnxruntime']}; begun {where['utc']}. "
    facts += f"ResNet-20 at 32 pixels, FP32, batch 1, threads: {options['threads']}; blocks of {1e3 * BLOCK_S:g} ms with one thread; {options['seconds']:g} s "
    facts += f"timed for each side and lifetime, {options['longer_seconds']:g} s with the longer budget; gate {100 * options['gate']:g} %"
    return "\n".join([facts, "", "| what | found | wanted |", "|---|---|---|", *lines]) + "\n"


def plans(arguments: argparse.Namespace) -> tuple[Plan, Plan]:
    """Of a quick comparison and of one with the longer budget."""
    return (
        Plan(arguments.lifetimes, arguments.precision, QUICK_S, arguments.seconds, arguments.threads),
        Plan(arguments.longer_lifetimes, arguments.longer_precision, arguments.longer_budget, arguments.longer_seconds, arguments.threads),
    )


def record(document: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Make the comparisons that `document` still lacks; it is stored after each."""
    plan, longer = plans(arguments)
    # kinds take turns, so that a noisy hour hits all of them
    kinds = [("aa", 0.0, plan, arguments.aa), ("slow", 0.05, plan, arguments.slow), ("longer", 0.03, longer, arguments.longer)]
    recorded: dict[str, list[dict[str, Any]]] = document["recorded"]
    with TemporaryDirectory() as folder:
        model = Path(folder) / "model.onnx"
        onnx.save(_networks.exported(_networks.network("resnet20", 32)[0]), str(model))
        for number in range(max(wanted for *_, wanted in kinds)):
            for name, slowdown, how, wanted in kinds:
                if len(recorded[name]) <= number < wanted:
                    recorded[name].append(trial(model, slowdown, replace(how, settings=replace(how.settings, seed=1000 * number))))
                    atomic_write(STORED, json.dumps(document).encode() + b"\n")
                    print(name, {k: v for k, v in recorded[name][-1].items() if k != "lifetimes"}, flush=True)


def stored(arguments: argparse.Namespace) -> dict[str, Any]:
    """What earlier calls recorded with these options on this machine, or nothing yet."""
    options = {k: v for k, v in vars(arguments).items() if k not in COUNTS} | {"block_s": BLOCK_S}
    here = {"environment": environment(("onnxruntime",)), "options": options}
    if not STORED.exists():
        return {**here, "recorded": {"aa": [], "slow": [], "longer": []}}
    found: dict[str, Any] = json.loads(STORED.read_text())
    if found["options"] != here["options"] or any(found["environment"][k] != here["environment"][k] for k in ("cpu", "versions")):
        raise SystemExit(f"{STORED.name} was recorded with other options or versions or on another CPU; move it away to begin anew")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gate", type=float, default=0.02)
    parser.add_argument("--aa", type=int, default=30, help="live comparisons of an artifact with itself")
    parser.add_argument("--slow", type=int, default=20, help="live comparisons with one that is 5 %% slower")
    parser.add_argument("--longer", type=int, default=20, help="live comparisons with one that is 3 %% slower")
    parser.add_argument("--lifetimes", type=int, default=5)
    parser.add_argument("--precision", type=float, default=0.01, help="half of the interval's width at which no lifetimes are added")
    parser.add_argument("--seconds", type=float, default=1.0, help="timed for each side and lifetime")
    parser.add_argument("--longer-lifetimes", type=int, default=10)
    parser.add_argument("--longer-precision", type=float, default=0.004)
    parser.add_argument("--longer-budget", type=float, default=150.0, help="seconds of wall time of such a comparison")
    parser.add_argument("--longer-seconds", type=float, default=1.2)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    document = stored(arguments)
    record(document, arguments)
    rows = evaluate(document["recorded"], arguments)
    text = table(rows, document)
    (RESULTS / "gate.md").write_text(text)
    print(text, end="")
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
