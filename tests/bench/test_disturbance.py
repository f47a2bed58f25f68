import pytest

from deployopt.bench import disturbance
from deployopt.bench.disturbance import Counters, Limits, Load, Observed
from deployopt.bench.environment import Condition
from deployopt.runtime.host import CpuTimes, GpuReading

STEADY = [1.0] * 21


def condition(clock=1500, *reasons, throttles=0):
    gpu = {"name": "GPU", "sm_clock_mhz": clock, "memory_clock_mhz": 900, "temperature_c": 60, "power_w": 100.0, "throttled": list(reasons)}
    return Condition(3000.0, 0.1, throttles, [gpu])


def load(*, other_s=0.0, stolen_s=0.0, waited_s=0.0, own_s=2.0, wall_s=2.0):
    """Of one block in which the timed process itself used `own_s`."""
    found = Load()
    after = Counters(CpuTimes(100.0 + own_s + other_s, 5.0 + stolen_s), 50.0 + waited_s, int(wall_s * 1e9))
    found.add(Counters(CpuTimes(100.0, 5.0), 50.0, 0), after, own_s)
    return found


def observed(**facts):
    quiet = {"block_medians": STEADY, "spread": 0.01, "load": load(), "threads": 1, "device": "cpu", "before": condition(), "after": condition()}
    return Observed(**{**quiet, **facts})


def faults(**facts):
    return disturbance.faults(observed(**facts), Limits(), cores=2)


def test_a_quiet_machine_has_no_faults():
    assert faults() == []
    assert faults(device="cuda:0") == []
    assert disturbance.flags(observed(), Limits(), cores=2) == []


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"spread": 0.3}, "MAD/median is 0.30 (limit 0.25)"),
        ({"block_medians": [1.0] * 7 + [1.2] * 7 + [1.4] * 7}, "it drifted by +40 % from the first to the last third of its blocks (limit 30 %)"),
        ({"block_medians": [2.0] * 7 + [1.5] * 7 + [1.0] * 7}, "it drifted by -50 % from the first to the last third of its blocks (limit 30 %)"),
        ({"load": load(stolen_s=0.8)}, "the hypervisor took 20 % of the CPU time (limit 10 %)"),
        ({"load": load(other_s=1.2), "threads": 2}, "other processes used 0.6 of 2 cores beside its 2 threads"),
        ({"load": load(waited_s=1.2)}, "processes waited for a CPU 60 % of the time (limit 50 %)"),
        ({"after": condition(throttles=3)}, "the CPU throttled for heat"),
        ({"device": "cuda:0", "after": condition(1200)}, "the SM clock of GPU fell from 1500 to 1200 MHz (limit 10 %)"),
        ({"device": "cuda:0", "before": condition(1500, "software power cap")}, "throttled: GPU: software power cap"),
    ],
)
def test_each_disturbance_is_named(facts, said):
    assert faults(**facts) == [said]


@pytest.mark.parametrize(
    "facts",
    [
        {"block_medians": [1.0, 2.0] * 10},  # unsteady, and not drifting
        {"block_medians": [1.0, 2.0, 3.0]},  # too few for thirds
        {"load": load(other_s=1.0), "threads": 1},  # the second core was free for others
        {"after": condition(1200)},  # a GPU's clock does not concern the CPU
        {"after": condition(1500, "hardware slowdown")},
        {"device": "cuda:0", "after": condition(1500, throttles=3)},
    ],
)
def test_what_does_not_concern_a_row_is_no_fault(facts):
    assert faults(**facts) == []


def test_threads_that_wait_for_each_other_are_no_other_load():
    waiting = {"load": load(waited_s=2.0), "threads": 3}
    assert faults(**waiting) == []
    assert disturbance.flags(observed(**waiting), Limits(), cores=2) == ["its 3 threads share 2 cores, so waiting for a CPU is not counted as other load"]


def test_only_the_rows_own_gpu_concerns_it():
    two = condition()._replace(gpus=[*condition().gpus, *condition(1200, "hardware slowdown").gpus])
    quiet = condition()._replace(gpus=condition().gpus * 2)
    assert faults(device="cuda:0", before=quiet, after=two, gpu=0) == []
    throttled = "throttled: GPU: hardware slowdown"
    assert faults(device="cuda:1", before=quiet, after=two, gpu=1) == [throttled, "the SM clock of GPU fell from 1500 to 1200 MHz (limit 10 %)"]
    assert faults(device="cuda:0", before=quiet, after=two)[0] == throttled  # not known which is its own


def on_gpu(*readings):
    """Of blocks after which the row's GPU was read."""
    found = load()
    for second, reading in enumerate(readings):
        found.add(Counters(None, None, second * 10**9, GpuReading()), Counters(None, None, (second + 1) * 10**9, reading), own_cpu_s=0.0)
    return found


def test_a_gpu_that_is_known_is_judged_by_its_own_blocks():
    """What it does while rows on the CPU are timed, or before and after all rounds, says nothing."""
    steady = on_gpu(*[GpuReading(None, 1500, 60, [])] * 9)
    idle_after = {"device": "cuda:0", "gpu": 0, "after": condition(300, "hardware slowdown")}
    assert faults(load=steady, **idle_after) == []
    between = on_gpu(*[GpuReading(None, 1500, 60, [])] * 4, GpuReading(None, 1490, 81, ["software power cap"]), *[GpuReading(None, 1500, 70, [])] * 4)
    assert faults(load=between, device="cuda:0", gpu=0) == ["throttled: GPU: software power cap"]
    during = disturbance.contract(observed(load=between, device="cuda:0", gpu=0), cores=2)["own_gpu"]
    assert during == {"sm_clock_mhz": [1500, 1490, 1500], "temperature_c": [60, 81], "throttled": ["software power cap"]}
    falling = on_gpu(*(GpuReading(None, clock, None, None) for clock in (1500, 1500, 1500, 1400, 1400, 1300, 1200, 1200, 900)))
    assert faults(load=falling, device="cuda:0", gpu=0) == ["the SM clock of GPU fell from 1500 to 1200 MHz (limit 10 %)"]


def on_core(*clocks_mhz):
    """Of blocks after which the clock of the core that timed them was read."""
    found = Load()
    for second, clock in enumerate(clocks_mhz):
        found.add(Counters(None, None, second * 10**9), Counters(None, None, (second + 1) * 10**9), 0.0, clock)
    return found


def test_a_cpu_is_judged_by_the_core_that_timed_the_blocks():
    falling = on_core(3400.0, 3400.0, 3300.0, 3000.0, 1200.0, 3000.0, 2800.0, 2900.0, 2900.0)
    assert faults(load=falling) == ["the clock of the CPU core that it was timed on fell from 3400 to 2900 MHz (limit 10 %)"]
    assert disturbance.contract(observed(load=falling), cores=2)["core_clock_mhz"] == [3400.0, 1200.0, 2900.0]
    assert faults(load=falling, device="cuda:0") == []


@pytest.mark.parametrize(
    "clocks_mhz",
    [
        [3400.0] * 4 + [1200.0] + [3400.0] * 4,  # one reading of a core that a governor had just let idle
        [1200.0] * 4 + [3400.0] * 5,  # it rose
        [3400.0, 1200.0, 1200.0],  # too few for thirds
        [3400.0, 3200.0] * 10,
    ],
)
def test_clocks_that_waver_or_rise_are_no_fault(clocks_mhz):
    assert faults(load=on_core(*clocks_mhz)) == []


def test_a_machine_without_clocks_says_that_they_are_unknown():
    assert faults(load=on_core(*[None] * 20)) == []
    assert disturbance.contract(observed(load=on_core(None)), cores=2)["core_clock_mhz"] is None


def test_power_is_the_energy_of_its_blocks_by_their_time():
    found = Load()
    for seconds, joules in (((0, 2), (100.0, 500.0)), ((5, 7), (9000.0, 9600.0))):
        before, after = (Counters(None, None, second * 10**9, GpuReading(energy)) for second, energy in zip(seconds, joules, strict=True))
        found.add(before, after, own_cpu_s=0.0)
    assert disturbance.contract(observed(load=found, device="cuda:0", gpu=0), cores=2)["gpu_power_w"] == 250.0
    assert disturbance.contract(observed(load=found), cores=2)["gpu_power_w"] is None  # a row on the CPU
    assert disturbance.contract(observed(device="cuda:0"), cores=2)["gpu_power_w"] is None


def test_several_disturbances_are_all_named():
    assert len(faults(spread=1.0, load=load(stolen_s=2.0, waited_s=2.0))) == 3


def test_load_leaves_out_the_timed_process():
    found = Load()
    found.add(Counters(CpuTimes(100.0, 5.0), 1.0, 0), Counters(CpuTimes(103.0, 5.5), 1.5, 2 * 10**9), own_cpu_s=2.0)
    found.add(Counters(CpuTimes(110.0, 6.0), 9.0, 7 * 10**9), Counters(CpuTimes(113.0, 6.5), 9.5, 9 * 10**9), own_cpu_s=2.0)
    assert found.other_cores == pytest.approx(0.5)
    assert found.stolen_cores == pytest.approx(0.25)
    assert found.pressure == pytest.approx(0.25)


def test_what_cannot_be_read_is_unknown_and_no_fault():
    found = Load()
    found.add(Counters(None, None, 0), Counters(None, None, 10**9), own_cpu_s=1.0)
    assert (found.other_cores, found.stolen_cores, found.pressure) == (None, None, None)
    assert faults(load=found) == []
    assert disturbance.flags(observed(load=found), Limits(), cores=2) == ["other load unknown"]
    contract = disturbance.contract(observed(load=found), cores=2)
    assert (contract["steal_percent"], contract["pressure_percent"], contract["drift_percent"]) == (None, None, 0.0)


def test_the_contract_holds_the_gpu_before_and_after():
    found = disturbance.contract(observed(after=condition(1400, "hardware slowdown")), cores=2)
    assert found["gpus"][0]["before"]["sm_clock_mhz"] == 1500
    assert found["gpus"][0]["after"] == {
        "sm_clock_mhz": 1400,
        "memory_clock_mhz": 900,
        "temperature_c": 60,
        "power_w": 100.0,
        "throttled": ["hardware slowdown"],
    }
