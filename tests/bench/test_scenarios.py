from deployopt.bench.scenarios import Scenario, scenarios
from deployopt.runtime.session import SessionOptions


def test_the_runs_own_single_stream_comes_first():
    found = scenarios(["offline", "single_stream"], 2, [1, 2, 4])
    assert found[0] == Scenario("single_stream", 2)
    assert [s.sweep for s in found] == ["", "offline", "t1", "offline-t1", "t4", "offline-t4"]
    assert [s.threads for s in found] == [2, 2, 1, 1, 4, 4]


def test_a_single_stream_has_all_threads_and_offline_one_stream_a_thread():
    base = SessionOptions(threads=2, precision="int8", extra={"a": 1})
    single, offline = (s.options(base) for s in scenarios(["single_stream", "offline"], 4))
    assert (single.threads, single.streams) == (4, 1)
    assert (offline.threads, offline.streams) == (1, 4)
    assert (offline.precision, offline.extra) == ("int8", {"a": 1})
