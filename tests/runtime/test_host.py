import json
import os
import socket
import time

import numpy as np
import pytest

from deployopt.runtime import host

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="reads Linux's /proc")


def test_cpu_names_model_cores_and_instructions():
    cpu = host.cpu()
    assert cpu["model"]
    assert 1 <= cpu["cores"] <= os.cpu_count()
    assert set(cpu["isa"]) <= {name for _, name in host.ISA_OF_INTEREST}


def test_own_work_shows_as_busy_time():
    before, start = host.cpu_times(), time.perf_counter()
    while time.perf_counter() - start < 0.3:
        pass
    after = host.cpu_times()
    assert after.busy_s - before.busy_s > 0.2
    assert after.stolen_s >= before.stolen_s


def test_peak_memory_rises_and_can_be_reset():
    size = 200 << 20
    big = np.ones(size, np.uint8)
    with_big = host.peak_memory_bytes()
    del big
    assert with_big > size
    if host.reset_peak_memory():
        assert host.peak_memory_bytes() < with_big - size // 2


def test_memory_is_consistent():
    memory = host.memory()
    assert 0 < memory["available_bytes"] <= memory["total_bytes"]


@pytest.mark.parametrize(
    ("names", "environment", "expected"),
    [
        (["A"], {"CUDA_VISIBLE_DEVICES": "GPU-1234"}, [0, 0]),
        (["A", "A"], {}, [0, 1]),
        (["A", "A"], {"CUDA_VISIBLE_DEVICES": "1"}, [1, None]),
        (["A", "A"], {"CUDA_VISIBLE_DEVICES": "GPU-1234"}, [None, None]),
        (["A", "B"], {}, [None, None]),
        (["A", "B"], {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1,0"}, [1, 0]),
        ([], {}, [None, None]),
    ],
)
def test_cudas_gpus_are_found_among_nvmls(monkeypatch, names, environment, expected):
    monkeypatch.setattr(host, "gpus", lambda: [{"name": name} for name in names])
    for variable in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(variable, raising=False)
        if variable in environment:
            monkeypatch.setenv(variable, environment[variable])
    assert [host.nvml_index(index) for index in (0, 1)] == expected


def test_energy_is_counted_up_or_unknown():
    with host.EnergyMeter() as meter:
        assert meter.joules(None) is None
        readings = [meter.joules(0) for _ in range(2)]
    assert readings == [None, None] or readings[0] <= readings[1]


def test_gpus_are_listed_or_none():
    for gpu in host.gpus():
        assert {"name", "driver", "sm_clock_mhz", "temperature_c", "power_w", "throttled"} <= gpu.keys()


def test_facts_are_json_without_this_machines_names():
    facts = json.dumps([host.cpu(), host.memory(), host.gpus(), host.container(), host.operating_system(), host.frequency_mhz(), host.load_average()])
    assert f'"{socket.gethostname()}"' not in facts
    assert os.path.expanduser("~") not in facts or os.path.expanduser("~") == "/"
