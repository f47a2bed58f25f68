"""The progress monitor, called as NVIDIA documents it: from several threads, with phases that end before their last step."""

import sys
import threading
import time
from types import SimpleNamespace

import pytest

from deployopt.runtime.tensorrt_vendor import make_monitor

TRT = SimpleNamespace(IProgressMonitor=type("IProgressMonitor", (), {}))


def test_progress_is_told_by_one_thread_at_a_time_and_no_build_is_stopped(monkeypatch):
    before, told, inside = sys.getswitchinterval(), [], []

    def advance(gained, phase):
        inside.append(phase)
        time.sleep(0.0005)  # others come meanwhile
        told.append((gained, len(inside)))
        inside.pop()

    monitor, went_on = make_monitor(TRT, advance), []
    monitor.phase_start("build", None, 1)

    def work(number):
        for index in range(30):
            name = f"{number}.{index}"
            monitor.phase_start(name, "build", 2)
            went_on.extend([monitor.step_complete(name, 0), monitor.step_complete(name, 1)])
            monitor.phase_finish(name)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert monitor.raised is None
    assert went_on == [True] * 240
    assert {together for _, together in told} == {1}
    assert all(gained >= 0 for gained, _ in told)
    assert sum(gained for gained, _ in told) == pytest.approx(monitor.told) == 1.0


def test_a_step_of_a_phase_that_another_thread_has_finished_is_no_fault():
    monitor = make_monitor(TRT, lambda gained, phase: None)
    monitor.phase_start("build", None, 2)
    monitor.phase_start("timing", "build", 2)
    monitor.phase_finish("timing")
    assert monitor.step_complete("timing", 1)
    monitor.phase_finish("build")
    assert monitor.step_complete("build", 1)
    assert monitor.raised is None


def test_what_advance_raises_stops_the_build():
    def advance(gained, phase):
        raise KeyboardInterrupt

    monitor = make_monitor(TRT, advance)
    monitor.phase_start("build", None, 2)
    assert not monitor.step_complete("build", 0)
    assert isinstance(monitor.raised, KeyboardInterrupt)
