"""The host clock: the only place that reads it. Monotonic, in nanoseconds; nothing here converts to wall-clock time."""

import time
from typing import Callable

now_ns: Callable[[], int] = time.perf_counter_ns
cpu_ns: Callable[[], int] = time.process_time_ns


def resolution_ns(reads: int = 1000) -> int:
    """Smallest step that two reads of the clock can show on this machine, found by reading it."""
    smallest = 1 << 62
    for _ in range(reads):
        before = now_ns()
        after = now_ns()
        while after == before:
            after = now_ns()
        smallest = min(smallest, after - before)
    return smallest


def seconds_since(start_ns: int) -> float:
    return (now_ns() - start_ns) * 1e-9
