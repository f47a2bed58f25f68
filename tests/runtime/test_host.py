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


def test_gpus_are_listed_or_none():
    for gpu in host.gpus():
        assert {"name", "driver", "sm_clock_mhz", "temperature_c", "power_w", "throttled"} <= gpu.keys()


def test_facts_are_json_without_this_machines_names():
    facts = json.dumps([host.cpu(), host.memory(), host.gpus(), host.container(), host.operating_system(), host.frequency_mhz(), host.load_average()])
    assert f'"{socket.gethostname()}"' not in facts
    assert os.path.expanduser("~") not in facts or os.path.expanduser("~") == "/"
