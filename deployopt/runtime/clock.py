"""The host clock: the only place that reads it. Monotonic, in nanoseconds; nothing here converts to wall-clock time."""

import time
from typing import Callable

now_ns: Callable[[], int] = time.perf_counter_ns
cpu_ns: Callable[[], int] = time.process_time_ns


def seconds_since(start_ns: int) -> float:
    return (now_ns() - start_ns) * 1e-9
