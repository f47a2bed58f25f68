"""The only loops that time inferences. They run in the process that holds the session, with nothing between the clock and the call."""

import gc
from array import array
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from threading import Barrier
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from deployopt.runtime import host
from deployopt.runtime.clock import cpu_ns, now_ns, seconds_since
from deployopt.runtime.session import Loaded
from deployopt.runtime.statistics import moving_median_settled


class WarmUp(NamedTuple):
    """How a session was warmed up.

    Attributes:
        seconds, runs: it took.
        settled: the moving median stood still; False if `max_seconds` came first.
        estimate_ms: of one run: the median of the last quarter.
    """

    seconds: float
    runs: int
    settled: bool
    estimate_ms: float


class Block(NamedTuple):
    """Consecutive timed runs.

    Attributes:
        host_ns: int64 [n], request in → result in host memory.
        device_ms: float64 [n] without copies, None where the runtime has no such clock.
        wall_s: the timed loop took.
        process_cpu_s: CPU time of this process (all threads) of the whole call, lead-in included.
        core_clock_mhz: as `host.core_clock_mhz`, of the core that timed the last run; the median of all streams'.
    """

    host_ns: np.ndarray
    device_ms: Optional[np.ndarray]
    wall_s: float
    process_cpu_s: float
    core_clock_mhz: Optional[float] = None


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()  # no collect: with a framework loaded it takes longer than a block
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def time_once(call: Callable[[], object]) -> float:
    """Milliseconds of one call, as for the first inference of a session."""
    start = now_ns()
    call()
    return seconds_since(start) * 1e3


def warm_up(loaded: Loaded, min_seconds: float = 0.2, min_runs: int = 10, max_seconds: float = 2.0) -> WarmUp:
    """Run until `min_seconds` and `min_runs` are reached and the moving median has settled, at most about `max_seconds`."""
    run = loaded.run
    durations: List[int] = []
    start = now_ns()
    settled = False
    check_at = min_runs
    with _no_garbage_collection():
        while True:
            before = now_ns()
            run(len(durations))
            durations.append(now_ns() - before)
            elapsed = seconds_since(start)
            if elapsed >= max_seconds:
                settled = moving_median_settled(durations)
                break
            if len(durations) >= check_at and elapsed >= min_seconds:
                settled = moving_median_settled(durations)
                if settled:
                    break
                check_at = len(durations) * 5 // 4 + 1  # the check sorts a window: not after every run
    last = durations[-max(1, len(durations) // 4) :]
    return WarmUp(seconds_since(start), len(durations), settled, float(np.median(last)) * 1e-6)


def time_block(loaded: Loaded, iterations: int, first_index: int = 0, lead_in: int = 0) -> Block:
    """Time `iterations` runs, one by one, over the rotated feeds from `first_index` on.

    `lead_in` untimed runs come first: they bring back the caches that another session's block has just filled. Around each run stand one
    read of the clock on either side and one store into a preallocated array (tests/runtime/test_sampler.py holds it under 1 µs).
    """
    cpu = cpu_ns()
    run, read = loaded.run, now_ns
    for index in range(first_index - lead_in, first_index):
        run(index)
    samples = array("q", bytes(8 * iterations))
    on_device: List[Optional[float]] = []
    with _no_garbage_collection():
        if loaded.device_ms() is None:
            start = read()
            for i in range(iterations):
                before = read()
                run(first_index + i)
                samples[i] = read() - before
            wall = read() - start
        else:
            device_clock, keep = loaded.device_ms, on_device.append
            start = read()
            for i in range(iterations):
                before = read()
                run(first_index + i)
                samples[i] = read() - before
                keep(device_clock())
            wall = read() - start
    clock = host.core_clock_mhz()
    device = np.array(on_device, dtype=np.float64) if on_device else None
    return Block(np.array(samples, dtype=np.int64), device, wall * 1e-9, (cpu_ns() - cpu) * 1e-9, clock)


class _Abreast:
    """Streams as one `Loaded`: a run is one inference on each of them, all at once."""

    def __init__(self, streams: Sequence[Loaded], pool: Executor) -> None:
        self._streams, self._pool = streams, pool

    def __len__(self) -> int:
        return len(self._streams[0])

    def run(self, index: int) -> None:
        for running in [self._pool.submit(stream.run, index) for stream in self._streams]:
            running.result()

    def device_ms(self) -> Optional[float]:
        return None


def warm_up_streams(streams: Sequence[Loaded], min_seconds: float = 0.2, min_runs: int = 10, max_seconds: float = 2.0) -> WarmUp:
    """As `warm_up`, with an inference on each stream at once. `estimate_ms` is the time that one takes of the whole: wall time / inferences."""
    if len(streams) == 1:
        return warm_up(streams[0], min_seconds, min_runs, max_seconds)
    with ThreadPoolExecutor(len(streams)) as pool:
        found = warm_up(_Abreast(streams, pool), min_seconds, min_runs, max_seconds)
    return found._replace(runs=found.runs * len(streams), estimate_ms=found.estimate_ms / len(streams))


def time_streams(streams: Sequence[Loaded], iterations: int, first_index: int = 0, lead_in: int = 0) -> Block:
    """Time `iterations` runs over several streams, each kept busy by a thread of its own that takes the next feed when it is done with one.

    `wall_s` runs from the start of the first to the end of the last: runs / `wall_s` is the throughput. `host_ns` is each run's latency under this
    load, stream by stream. One stream is `time_block`.
    """
    if len(streams) == 1:
        return time_block(streams[0], iterations, first_index, lead_in)
    cpu = cpu_ns()
    indices, ready = count(), Barrier(len(streams))

    def lead(stream: Loaded) -> None:
        for index in range(first_index - lead_in, first_index):
            stream.run(index)

    def keep_busy(stream: Loaded) -> Tuple[int, int, List[int], Optional[float]]:
        run, read = stream.run, now_ns
        durations: List[int] = []
        ready.wait()
        start = end = read()
        for index in indices:  # one counter for all: `next` of it is atomic
            if index >= iterations:
                break
            before = read()
            run(first_index + index)
            end = read()
            durations.append(end - before)
        return start, end, durations, host.core_clock_mhz()

    with _no_garbage_collection(), ThreadPoolExecutor(len(streams)) as pool:
        list(pool.map(lead, streams))  # what fails mostly fails here, and not where others wait for it
        done = [busy.result() for busy in [pool.submit(keep_busy, stream) for stream in streams]]
    wall = max(end for _, end, _, _ in done) - min(start for start, *_ in done)
    host_ns = np.concatenate([np.array(durations, dtype=np.int64) for _, _, durations, _ in done])
    clocks = [clock for *_, clock in done if clock is not None]
    return Block(host_ns, None, wall * 1e-9, (cpu_ns() - cpu) * 1e-9, float(np.median(clocks)) if clocks else None)
