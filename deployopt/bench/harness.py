"""Time sessions against each other: one child process a session, blocks interleaved in shuffled rounds, every figure with its contract.

A `Group` keeps the children of everything that is compared alive together. `Group.measure` binds one batch size, warms each session up and
then runs rounds: each round times one block of every session, in a new random order. So whatever the machine does meanwhile is spread
over all of them, and the ratio of two sessions is taken inside rounds.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deployopt.artifact import Row
from deployopt.bench import disturbance
from deployopt.bench.disturbance import Counters, Limits, Load, Observed
from deployopt.bench.environment import Condition, reason_of, utc_now
from deployopt.bench.scenarios import ScenarioName
from deployopt.errors import DeployoptError, LackingEnvironment, WorkerDied
from deployopt.runtime import host, onnxruntime_gpu
from deployopt.runtime.cuda import device_index
from deployopt.runtime.files import atomic_write_json
from deployopt.runtime.progress import Bar, Progress
from deployopt.runtime.sampler import Block, WarmUp
from deployopt.runtime.session import LayerTime, SessionOptions
from deployopt.runtime.statistics import MINIMUM_BLOCKS, bootstrap_median, bootstrap_ratio, median_absolute_deviation, summary
from deployopt.runtime.worker import Memory, Opened, Worker

Images = NDArray[np.uint8]

OUTLYING, MANY_OUTLIERS = 2.0, 0.01  # times the median; share of the runs that is worth a flag
HEADLINE_RUNS, HEADLINE_SECONDS = 1000, 3.0  # a row is long enough after either
PAUSE_S = 0.02  # before each block where a session has several threads: spin-waiting ones of the session before go to sleep
RUNS_OF_A_STREAM = 4  # in a block, at least: at its end streams wait for the last of them
LEAD_IN_MS, LEAD_IN_RUNS = 10.0, 10  # untimed runs at the head of a block: about so long, at most so many, at least one


@dataclass(frozen=True)
class Subject:
    """A session to be timed.

    Attributes:
        key: names it in results ("qat/openvino/int8").
        opener: "module:function" that opens it in the child.
        path: of the artifact.
        options: how it is opened; with several streams, which all have `options.threads`, each is kept busy by a thread of its own.
        scenario: what its figure is: latency, or throughput.
    """

    key: str
    opener: str
    path: Path
    options: SessionOptions = field(default_factory=SessionOptions)
    scenario: ScenarioName = "single_stream"

    @property
    def threads(self) -> int:
        """CPU threads of all streams."""
        return self.options.threads * self.options.streams


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        min_seconds: timed for each subject; if the warm-up's estimate was off, 1,000 runs do too, but where `block_s` is given.
        blocks: at least so many for each subject; 20 are needed for an interval of a ratio.
        block_s: a block is timed about so long at most, if it is more than one run; None: as long as `blocks` of them need to be for `min_seconds`.
        max_seconds: a subject stops after so many timed seconds, with fewer blocks and a flag; None: a minute, or twice `min_seconds` if that is more.
        limits: above which a row is invalid.
        buffers: of different images, rotated.
        seed: of the order in the rounds, of the images' order and of the bootstrap.
        timeout_s: after which a child that does not answer counts as hanging.
    """

    min_seconds: float = 3.0
    blocks: int = MINIMUM_BLOCKS
    block_s: float | None = None
    max_seconds: float | None = None
    limits: Limits = field(default_factory=Limits)
    buffers: int = 8
    seed: int = 0
    timeout_s: float = 600.0

    @property
    def longest_s(self) -> float:
        """Of timed seconds."""
        return max(60.0, 2 * self.min_seconds) if self.max_seconds is None else self.max_seconds

    @property
    def wanted_block_s(self) -> float:
        """Of timed seconds."""
        longest = self.min_seconds / self.blocks
        return longest if self.block_s is None else min(longest, self.block_s)


@dataclass(frozen=True)
class Failure:
    """A subject without figures, and why. `unavailable`: this machine lacks what it needs."""

    reason: str
    unavailable: bool = False


@dataclass(frozen=True)
class Measured:
    """Figures of one subject at one batch size.

    Attributes:
        host, device: `statistics.summary` of all samples, ms, but `p50`, which is the median of block medians, and `p50_ci95`, its bootstrap over blocks:
            what intervals and ratios are about. device: None without such a clock.
        block_medians_ms, device_block_medians_ms, block_throughputs_per_s: one for each round, in the order of the rounds.
        throughput_per_s: median of the blocks'. throughput_ci95: its bootstrap over blocks.
        peak_memory_bytes, device_memory_bytes: of the process, in host memory at most since the buffers were bound, and on the GPU at the end.
        invalid: why the figures should not be used, None if they may.
        contract: how they were taken.
    """

    key: str
    batch: int
    provider: str
    threads: int
    host: dict[str, Any]
    device: dict[str, Any] | None
    block_medians_ms: list[float]
    device_block_medians_ms: list[float] | None
    block_throughputs_per_s: list[float]
    throughput_per_s: float
    throughput_ci95: list[float]
    peak_memory_bytes: int | None
    device_memory_bytes: int | None
    invalid: str | None
    contract: dict[str, Any]


@dataclass
class _Run:
    """One subject in the making."""

    subject: Subject
    worker: Worker
    opened: Opened
    inputs: dict[str, Any]
    first_inference_ms: float
    warm_up: WarmUp
    iterations: int
    lead_in: int
    gpu: int | None
    meter: host.GpuMeter
    blocks: list[Block] = field(default_factory=list)
    load: Load = field(default_factory=Load)
    runs: int = 0
    seconds: float = 0.0

    @property
    def device(self) -> str:
        """What executes: "cpu" where the session says so, whatever was asked for; the first GPU where one computes and none was asked for."""
        if self.opened.provider.startswith("CPU"):
            return "cpu"
        asked = self.subject.options.device
        on_gpu = self.opened.provider in onnxruntime_gpu.PROVIDERS or any(b.device_ms is not None for b in self.blocks)
        return "cuda:0" if asked == "cpu" and on_gpu else asked

    def time_block(self) -> None:
        before = Counters.now(self.meter, self.gpu)
        block = self.worker.block(self.iterations, self.runs, self.lead_in)
        after = Counters.now(self.meter, self.gpu)
        self.blocks.append(block)
        self.load.add(before, after, block.process_cpu_s, block.core_clock_mhz)
        self.runs += self.iterations
        self.seconds += block.wall_s

    def wants_more(self, settings: Settings) -> bool:
        if self.seconds >= settings.longest_s:
            return False
        if len(self.blocks) < settings.blocks:
            return True
        return self.seconds < settings.min_seconds and (settings.block_s is not None or self.runs < HEADLINE_RUNS)


def _builds_on_opening(opener: str) -> bool:
    """As `backends.Backend` says. Whoever named a backend's opener has imported its module here; others' need not be."""
    return bool(getattr(sys.modules.get(opener.partition(":")[0]), "builds_on_opening", False))


class Group:
    """Children of everything compared, alive together. A context manager.

    Attributes:
        opened: what each child that lives said of its session.
        failures: subjects whose session could not be opened or whose child died, and why.
    """

    def __init__(self, subjects: Sequence[Subject], settings: Settings, progress: Progress) -> None:
        keys = [s.key for s in subjects]
        if len(set(keys)) != len(keys):
            raise ValueError(f"subjects need different keys, found {keys}")
        self._subjects = {s.key: s for s in subjects}
        self._settings = settings
        self._progress = progress
        self._workers: dict[str, Worker] = {}
        self._stack = ExitStack()
        self.opened: dict[str, Opened] = {}
        self.failures: dict[str, Failure] = {}

    def __enter__(self) -> Group:
        """Open the sessions, at most one a core at a time: imports and compilation take memory and cores. Those that build an engine come last and alone."""
        try:
            self._meter = self._stack.enter_context(host.GpuMeter())
            workers = {}
            for key, s in self._subjects.items():
                workers[key] = self._stack.enter_context(Worker(s.opener, s.path, s.options, self._settings.timeout_s))
                workers[key].spawn()
            with self._progress.track("open sessions", len(workers)) as bar, ThreadPoolExecutor(host.usable_cores()) as pool:
                try:
                    alone = [key for key, s in self._subjects.items() if _builds_on_opening(s.opener)]
                    for keys in ([key for key in workers if key not in alone], *([key] for key in alone)):
                        opening = {pool.submit(workers[key].start): key for key in keys}
                        for future in as_completed(opening):
                            self._opened(opening[future], workers[opening[future]], future)
                            bar.advance(1, opening[future])
                except BaseException:  # the pool's threads wait for answers, and it for them
                    pool.shutdown(wait=False, cancel_futures=True)
                    for worker in workers.values():
                        worker.kill()
                    raise
        except BaseException as exc:
            self._stack.__exit__(type(exc), exc, exc.__traceback__)
            raise
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)

    def infer(self, key: str, images: Images) -> NDArray[Any]:
        """First output of a live subject for images uint8 [n, H, W, C]. Raises what `Worker.infer` does."""
        outputs = self._workers[key].infer(images)
        return outputs[self.opened[key].outputs[0].name]

    def checked(self, result: Measured, images: Images) -> Measured | Failure:
        """What was measured, unless any floating output is not finite for a batch of these images; a session that died since is believed."""
        if result.key not in self._workers:
            return result
        (batch,) = make_buffers(images, 1, result.batch, self._settings.seed)
        try:
            outputs = self._workers[result.key].infer(batch).values()
        except DeployoptError as exc:
            return self._fail(result.key, exc)
        finite = all(np.isfinite(values).all() for values in outputs if np.issubdtype(values.dtype, np.floating))
        return result if finite else Failure(f"its outputs are NaN or infinite for batches of {result.batch}")

    def profile(self, key: str, images: Images, batch: int, runs: int) -> list[LayerTime] | Failure | None:
        """Each layer's time in a live subject, or why it could not be taken; None where the subject is gone or its runtime does not tell.

        It takes memory and may take the child's life: profile when everything has been measured and scored.
        """
        if key not in self._workers or not self.opened[key].profiles:
            return None
        buffers = make_buffers(images, self._settings.buffers, batch, self._settings.seed)
        try:
            return self._workers[key].profile(buffers, runs)
        except DeployoptError as exc:
            return self._fail(key, exc)

    def measure(self, images: Mapping[str, Images], batch: int, source: str) -> dict[str, Measured | Failure]:
        """Time live subjects at one batch size.

        Args:
            images: for each subject to be timed, uint8 [n, H, W, C]; batches are made of them in random order.
            source: of the images, for the contract.

        Returns:
            For each subject that is timed, or that failed before, in their order.
        """
        settings, rng = self._settings, np.random.default_rng([self._settings.seed, batch])
        results: dict[str, Measured | Failure] = {}
        runs: dict[str, _Run] = {}
        started = utc_now()
        with self._progress.track(f"warm up, batch {batch}", len(images)) as bar:
            for key in [k for k in self._subjects if k in self._workers and k in images]:
                buffers = make_buffers(images[key], settings.buffers, batch, settings.seed)
                types = [spec.dtype for spec in self.opened[key].inputs]
                inputs = {"buffers": len(buffers), "shape": list(buffers.shape[1:]), "types": types, "images": len(images[key]), "source": source}
                try:
                    runs[key] = self._prepare(key, buffers, inputs)
                except DeployoptError as exc:
                    results[key] = self._fail(key, exc)
                bar.advance(1, key)
        pause_s = PAUSE_S if any(run.subject.threads > 1 for run in runs.values()) else 0.0
        before = Condition.now()  # after the warm-up: an idle machine's clocks say nothing
        with self._progress.track(f"measure, batch {batch}", self._expected_rounds(runs) * len(runs)) as bar:
            results.update(self._rounds(runs, pause_s, rng, bar))
        after = Condition.now()
        for key, run in runs.items():
            if key not in results:
                results[key] = self._finish(run, batch, pause_s, started, (before, after), sorted(runs.keys() - {key}))
        return {key: found for key in self._subjects if (found := results.get(key) or self.failures.get(key)) is not None}

    def _opened(self, key: str, worker: Worker, opening: Future[Opened]) -> None:
        try:
            self.opened[key] = opening.result()
        except DeployoptError as exc:
            worker.kill()
            self.failures[key] = self._explain(self._subjects[key], exc)
        else:
            self._workers[key] = worker

    def _explain(self, subject: Subject, error: DeployoptError) -> Failure:
        """The whole story goes to the log; a row gets what it has room for."""
        self._progress.log(f"{subject.key}: {error}")
        return Failure(reason_of(error, subject.path.parent), isinstance(error, LackingEnvironment))

    def _fail(self, key: str, error: DeployoptError) -> Failure:
        failure = self._explain(self._subjects[key], error)
        if isinstance(error, WorkerDied):
            del self._workers[key], self.opened[key]
            self.failures[key] = failure
        return failure

    def _prepare(self, key: str, buffers: Images, inputs: dict[str, Any]) -> _Run:
        worker, settings = self._workers[key], self._settings
        first_ms = worker.load(buffers)
        warm_up = worker.warm_up()
        streams = self.opened[key].streams
        fewest = RUNS_OF_A_STREAM * streams if streams > 1 else 1
        iterations = max(fewest, math.ceil(settings.wanted_block_s * 1e3 / warm_up.estimate_ms))
        lead_in = min(LEAD_IN_RUNS, max(1, math.ceil(LEAD_IN_MS / warm_up.estimate_ms)))
        gpu = None if self.opened[key].provider.startswith("CPU") else host.nvml_index(device_index(self._subjects[key].options.device))
        return _Run(self._subjects[key], worker, self.opened[key], inputs, first_ms, warm_up, iterations, lead_in, gpu, self._meter)

    def _expected_rounds(self, runs: Mapping[str, _Run]) -> int:
        enough = (math.ceil(self._settings.min_seconds * 1e3 / (run.iterations * run.warm_up.estimate_ms)) for run in runs.values())
        return max([self._settings.blocks, *enough])

    def _rounds(self, runs: Mapping[str, _Run], pause_s: float, rng: np.random.Generator, bar: Bar) -> dict[str, Failure]:
        """Time blocks until every subject has enough; who failed on the way, and why."""
        failed: dict[str, Failure] = {}
        active = list(runs)
        for _ in range(2 * self._expected_rounds(runs)):  # the warm-up's estimate may be off, not without bound
            for key in rng.permutation(active).tolist():
                time.sleep(pause_s)
                try:
                    runs[key].time_block()
                except DeployoptError as exc:
                    failed[key] = self._fail(key, exc)
                bar.advance(1, key)
            alive = [k for k in active if k not in failed]
            # one that is done goes on while others are not, so that all rounds stay complete; one that is over its time leaves
            active = [k for k in alive if runs[k].seconds < self._settings.longest_s]
            if not any(runs[k].wants_more(self._settings) for k in active):
                break
        return failed

    def _finish(self, run: _Run, batch: int, pause_s: float, started: str, conditions: tuple[Condition, Condition], others: list[str]) -> Measured:
        settings = self._settings
        samples_ns = np.concatenate([b.host_ns for b in run.blocks])
        host_summary, medians = _summarize([b.host_ns for b in run.blocks], settings.seed)
        device_blocks = [b.device_ms * 1e6 for b in run.blocks if b.device_ms is not None]
        device_summary, device_medians = _summarize(device_blocks, settings.seed) if device_blocks else (None, None)
        spread = median_absolute_deviation(samples_ns) / float(np.median(samples_ns))
        outliers = float(np.mean(samples_ns > OUTLYING * np.median(samples_ns)))
        throughputs = [round(batch * len(b.host_ns) / b.wall_s, 3) for b in run.blocks]
        seen = Observed(medians, spread, run.load, run.subject.threads, run.device, *conditions, run.gpu)
        cores = host.usable_cores()
        try:
            memory, execution = run.worker.memory(), run.worker.execution()
        except DeployoptError as exc:  # its figures are whole; only later ones are lost
            self._fail(run.subject.key, exc)
            memory, execution = Memory(None, None), {}
        contract = {
            "clock": "host" if device_summary is None else "host, device",
            "copies": "included by the host clock" + ("" if device_summary is None else ", excluded by the device clock"),
            "warm_up": {"seconds": round(run.warm_up.seconds, 3), "runs": run.warm_up.runs, "settled": run.warm_up.settled},
            "load_ms": round(run.opened.load_ms, 3),
            "first_inference_ms": round(run.first_inference_ms, 3),
            "blocks": len(run.blocks),
            "iterations": run.iterations,
            "lead_in": run.lead_in,
            "duration_s": round(run.seconds, 3),
            "p50_and_throughput": "medians of the blocks' own",
            "interleaved_with": others,
            "shuffled": True,
            "pause_ms": 1e3 * pause_s,
            "inputs": run.inputs,
            "seed": settings.seed,
            "scenario": run.subject.scenario,
            "threads": run.subject.threads,
            "streams": run.opened.streams,
            "device": run.device,
            **execution,
            "spread": {"mad_over_median": round(spread, 4), "limit": settings.limits.max_spread},
            "outliers": {"percent": round(100 * outliers, 3), "above": f"{OUTLYING:g} medians"},
            "load": disturbance.contract(seen, cores),
            "flags": [*_flags(run, settings, outliers), *disturbance.flags(seen, settings.limits, cores)],
            "started": started,
        }
        return Measured(
            key=run.subject.key,
            batch=batch,
            provider=run.opened.provider,
            threads=run.subject.threads,
            host=host_summary,
            device=device_summary,
            block_medians_ms=medians,
            device_block_medians_ms=device_medians,
            block_throughputs_per_s=throughputs,
            throughput_per_s=float(np.median(throughputs)),
            throughput_ci95=list(bootstrap_median(throughputs, seed=settings.seed)),
            peak_memory_bytes=memory.peak_bytes,
            device_memory_bytes=memory.device_bytes,
            invalid="; ".join(disturbance.faults(seen, settings.limits, cores)) or None,
            contract=contract,
        )


def measure(
    subjects: Sequence[Subject], images: Images, settings: Settings, progress: Progress, *, batch: int = 1, source: str = "caller"
) -> dict[str, Measured | Failure]:
    """Open, time and close everything at one batch size; every subject sees the same images uint8 [n, H, W, C]."""
    with Group(subjects, settings, progress) as group:
        return group.measure(dict.fromkeys((s.key for s in subjects), images), batch, source)


def make_buffers(images: Images, buffers: int, batch: int, seed: int) -> Images:
    """uint8 [buffers, batch, H, W, C] of images [n, H, W, C] in random order; images repeat only when all have been used.

    Raises:
        ValueError: no images.
    """
    if len(images) == 0:
        raise ValueError("wanted images to time with, found none")
    order = np.random.default_rng(seed).permutation(len(images))
    chosen = np.resize(order, buffers * batch)
    return images[chosen].reshape(buffers, batch, *images.shape[1:])


def speedup(baseline: Measured, subject: Measured, seed: int = 0) -> tuple[float, list[float] | None]:
    """How many times faster than the baseline, from the rounds they share, and its 95 % interval (None below 20 rounds: it would under-cover).

    Of latencies; in the offline scenario of throughputs.

    Raises:
        ValueError: they were not interleaved.
    """
    if subject.key != baseline.key and subject.key not in baseline.contract["interleaved_with"]:
        raise ValueError(f"'{subject.key}' and '{baseline.key}' were not timed in the same rounds")
    rounds = min(len(baseline.block_medians_ms), len(subject.block_medians_ms))
    if subject.contract["scenario"] == "offline":
        slow, fast = subject.block_throughputs_per_s, baseline.block_throughputs_per_s
    else:
        slow, fast = baseline.block_medians_ms, subject.block_medians_ms
    ratio = bootstrap_ratio(slow[:rounds], fast[:rounds], paired=True, seed=seed)
    return ratio.value, [ratio.low, ratio.high] if rounds >= MINIMUM_BLOCKS else None


def with_figures(row: Row, result: Measured | Failure) -> Row:
    """The row with what was measured, or with why nothing was."""
    if isinstance(result, Failure):
        return replace(row, status="unavailable" if result.unavailable else "failed", reason=result.reason)
    return replace(
        row,
        status="ok" if result.invalid is None else "invalid",
        reason=result.invalid,
        provider=result.provider,
        threads=result.threads,
        latency_ms={"host": result.host, "device": result.device},
        throughput_per_s=result.throughput_per_s,
        throughput_ci95=result.throughput_ci95,
        notes=[*row.notes, *_one_stream(result)],
        peak_memory_bytes=result.peak_memory_bytes,
        device_memory_bytes=result.device_memory_bytes,
        contract=result.contract,
    )


def _one_stream(result: Measured) -> list[str]:
    alone = result.contract["scenario"] == "offline" and result.contract["streams"] == 1 < result.threads
    return [f"its sessions have one stream only: offline it ran one inference at a time on {result.threads} threads"] if alone else []


def write_samples(measured: Measured, row: Row, folder: Path) -> Path:
    """Write the raw block medians of a row, for `compare`; returns the file."""
    path = folder / f"{row.key.replace('/', '-')}.json"
    content = {
        "row": row.key,
        "unit": "ms",
        "iterations": measured.contract["iterations"],
        "host_block_medians": measured.block_medians_ms,
        "device_block_medians": measured.device_block_medians_ms,
        "block_throughputs_per_s": measured.block_throughputs_per_s,
    }
    atomic_write_json(path, content)
    return path


def _summarize(blocks_ns: Sequence[NDArray[Any]], seed: int) -> tuple[dict[str, Any], list[float]]:
    medians = [round(float(np.median(b)) * 1e-6, 6) for b in blocks_ns]
    figures = summary(np.concatenate(blocks_ns))
    figures |= {"p50": float(np.median(medians)), "p50_ci95": list(bootstrap_median(medians, seed=seed))}
    figures["reasons"].pop("p50", None)  # of blocks, not of single samples
    return figures, medians


def _flags(run: _Run, settings: Settings, outliers: float) -> list[str]:
    """What a reader should know and what does not make the row invalid by itself."""
    flags = []
    if not run.warm_up.settled:
        flags.append("the warm-up did not settle")
    if outliers > MANY_OUTLIERS:
        flags.append(f"more than {100 * MANY_OUTLIERS:g} % of the runs took over {OUTLYING:g} medians")
    if len(run.blocks) < settings.blocks:
        flags.append(f"{len(run.blocks)} of {settings.blocks} blocks within {settings.longest_s:g} s")
    if run.seconds < max(settings.min_seconds, HEADLINE_SECONDS) and run.runs < HEADLINE_RUNS:
        flags.append(f"too short for a headline: {run.seconds:.2g} s of {max(settings.min_seconds, HEADLINE_SECONDS):g} s, {run.runs} of {HEADLINE_RUNS} runs")
    return flags
