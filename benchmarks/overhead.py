"""What does the harness cost an inference? `sampler.time_block` around 50 µs of fixed work against a bare loop over the same, interleaved.

    python benchmarks/overhead.py                    # about 20 seconds

The work is SHA-256 over as many bytes as take 50 µs here. In each round the bare loop and the harness run the same calls, in random order. Reported per
call: what the harness adds to the wall time, and by how much the mean that it reports exceeds the bare loop's time. Writes
benchmarks/results/overhead.json; exits with 1 where the upper end of the interval of what it adds is 1 µs or more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import sys
from pathlib import Path

import numpy as np

from deployopt.bench.environment import environment
from deployopt.runtime.clock import now_ns
from deployopt.runtime.sampler import time_block
from deployopt.runtime.statistics import bootstrap_median

RESULTS = Path(__file__).resolve().parent / "results"
WORK_US = 50.0
LIMIT_US = 1.0
FEEDS = 8  # rotated, as in a benchmark


class Hashing:
    """A `Loaded` whose runs hash `size` bytes."""

    def __init__(self, size: int) -> None:
        self._feeds = [bytes([i]) * size for i in range(FEEDS)]

    def __len__(self) -> int:
        return len(self._feeds)

    def run(self, index: int) -> None:
        hashlib.sha256(self._feeds[index % len(self._feeds)])

    def device_ms(self) -> float | None:
        return None


def bare_us(loaded: Hashing, calls: int) -> float:
    """Microseconds a call of a loop that does nothing else."""
    run = loaded.run
    start = now_ns()
    for index in range(calls):
        run(index)
    return (now_ns() - start) * 1e-3 / calls


def sized() -> Hashing:
    """Work of about `WORK_US`."""
    probe = 1 << 16
    fastest = min(bare_us(Hashing(probe), 200) for _ in range(20))
    return Hashing(round(probe * WORK_US / fastest))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--calls", type=int, default=100, help="in each round, with and without the harness; few enough to fit into a slice of the scheduler")
    arguments = parser.parse_args()
    loaded, order = sized(), random.Random(0)
    bare: list[float] = []
    added: list[float] = []
    exceeds: list[float] = []
    for _ in range(arguments.rounds):
        first = order.random() < 0.5
        before = bare_us(loaded, arguments.calls) if first else None
        block = time_block(loaded, arguments.calls)
        without = before if before is not None else bare_us(loaded, arguments.calls)
        bare.append(without)
        added.append(block.wall_s * 1e6 / arguments.calls - without)
        exceeds.append(float(np.mean(block.host_ns)) * 1e-3 - without)
    found = {
        "bare_us": statistics.median(bare),
        "added_us": statistics.median(added),
        "added_us_ci95": bootstrap_median(added),
        "reported_mean_exceeds_us": statistics.median(exceeds),
        "reported_mean_exceeds_us_ci95": bootstrap_median(exceeds),
        "rounds": arguments.rounds,
        "calls": arguments.calls,
        "limit_us": LIMIT_US,
        "environment": environment(("numpy",)),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overhead.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k != "environment"}, indent=2))
    return 0 if found["added_us_ci95"][1] < LIMIT_US else 1


if __name__ == "__main__":
    sys.exit(main())
