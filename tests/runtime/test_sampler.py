import gc
import time
from threading import get_ident

import numpy as np
import pytest

from deployopt.runtime import host
from deployopt.runtime.sampler import time_block, time_once, time_streams, warm_up, warm_up_streams


class Steps:
    """A `Loaded` whose runs take the given seconds, the last one for ever; remembers the indices it was asked for."""

    def __init__(self, *seconds, device_ms=None):
        self.seconds, self._device_ms, self.indices, self.collecting = list(seconds) or [0.0], device_ms, [], []

    def __len__(self):
        return 4

    def run(self, index):
        self.indices.append(index)
        self.collecting.append(gc.isenabled())
        wait = self.seconds[0] if len(self.seconds) == 1 else self.seconds.pop(0)
        if wait:
            time.sleep(wait)

    def device_ms(self):
        return self._device_ms


class Nothing:
    def __len__(self):
        return 1

    def run(self, index):
        pass

    def device_ms(self):
        return None


def test_overhead_is_below_a_microsecond_a_call():
    blocks = [time_block(Nothing(), 20_000) for _ in range(5)]
    assert min(np.median(b.host_ns) for b in blocks) < 1000
    assert min(b.wall_s for b in blocks) / 20_000 < 1e-6


def test_block_times_each_run_over_rotated_feeds():
    loaded = Steps(0.002)
    block = time_block(loaded, 5, first_index=10, lead_in=2)
    assert loaded.indices == [8, 9, 10, 11, 12, 13, 14]
    assert block.host_ns.dtype == np.int64
    assert (block.host_ns >= 2_000_000).all()
    assert block.host_ns.sum() * 1e-9 <= block.wall_s
    assert block.process_cpu_s < block.wall_s
    assert block.device_ms is None


def test_block_reads_the_device_clock_where_there_is_one():
    assert time_block(Steps(device_ms=0.25), 3).device_ms.tolist() == [0.25, 0.25, 0.25]


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_off_while_timing_and_restored(enabled):
    loaded = Steps()
    (gc.enable if enabled else gc.disable)()
    try:
        time_block(loaded, 3)
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
    assert loaded.collecting == [False] * 3


def test_warm_up_lasts_until_runs_are_stable():
    found = warm_up(Steps(*np.linspace(0.03, 0.005, 12), 0.004), min_seconds=0.01, min_runs=10)
    assert found.settled
    assert found.runs > 10
    assert found.estimate_ms == pytest.approx(4, rel=0.3)


def test_warm_up_keeps_its_minima():
    found = warm_up(Steps(0.001), min_seconds=0.1, min_runs=10)
    assert found.seconds >= 0.1
    assert found.runs >= 10


def test_warm_up_is_bounded():
    found = warm_up(Steps(*np.linspace(0.001, 0.05, 1000)), max_seconds=0.3)
    assert not found.settled
    assert found.seconds < 0.5


def test_time_once_is_in_milliseconds():
    assert 5 <= time_once(lambda: Steps(0.005).run(0)) < 50


def test_streams_run_at_once_and_share_the_runs():
    streams = [Steps(0.01), Steps(0.01)]
    block = time_streams(streams, 20, first_index=4, lead_in=1)
    timed = [stream.indices[1:] for stream in streams]
    assert [stream.indices[0] for stream in streams] == [3, 3]
    assert sorted(timed[0] + timed[1]) == list(range(4, 24))
    assert min(map(len, timed)) >= 5
    assert len(block.host_ns) == 20
    assert (block.host_ns >= 10_000_000).all()
    assert block.wall_s < 0.9 * block.host_ns.sum() * 1e-9
    assert not any(streams[0].collecting)


@pytest.mark.parametrize("count", [1, 2])
def test_a_block_tells_the_clock_of_the_core_that_timed_it(monkeypatch, count):
    """It is read on the thread that runs inferences, after its last one; what only some cores tell counts."""
    loaded = [Steps(0.001) for _ in range(count)]
    clocks, readers, ran = iter([3000.0, None]), [], []
    monkeypatch.setattr(host, "core_clock_mhz", lambda: (readers.append(get_ident()), ran.append(sum(len(s.indices) for s in loaded)), next(clocks))[-1])
    block = time_streams(loaded, 10)
    assert block.core_clock_mhz == 3000.0
    assert len(readers) == count
    assert (get_ident() in readers) == (count == 1)
    assert ran[-1] == 10


def test_one_stream_is_a_block():
    loaded = Steps(device_ms=0.25)
    block = time_streams([loaded], 3)
    assert loaded.indices == [0, 1, 2]
    assert block.device_ms.tolist() == [0.25, 0.25, 0.25]


def test_a_stream_that_fails_ends_the_block():
    class Failing(Nothing):
        def run(self, index):
            raise RuntimeError("out of memory")

    for lead_in in (0, 1):
        with pytest.raises(RuntimeError, match="out of memory"):
            time_streams([Nothing(), Failing()], 10, first_index=5, lead_in=lead_in)


def test_streams_are_warmed_up_together():
    found = warm_up_streams([Steps(0.004), Steps(0.004)], min_seconds=0.05)
    assert found.runs >= 20
    assert 2.0 <= found.estimate_ms < 4.0
    assert warm_up_streams([Steps(0.002)], min_seconds=0.05).estimate_ms >= 2.0
