# ruff: noqa: N802 -- a stand-in for NVML is called as the library is
import json
import os
import socket
import time
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import pytest

from deployopt.runtime import host

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="reads Linux's /proc")


@contextmanager
def pinned_to(core):
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


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


def test_the_clock_is_of_the_core_that_this_thread_runs_on(monkeypatch):
    """Where the kernel tells none, as in most virtual machines, there is none, though /proc/cpuinfo has a figure."""
    core, read = min(os.sched_getaffinity(0)), host._read
    told = {}
    monkeypatch.setattr(host, "_read", lambda path: told.get(path) if path.startswith("/sys/") else read(path))
    with pinned_to(core):
        assert host.core_clock_mhz() is None
        told[f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq"] = "3412000"
        told[f"/sys/devices/system/cpu/cpu{core + 1}/cpufreq/scaling_cur_freq"] = "800000"
        assert host.core_clock_mhz() == 3412.0
        told[f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq"] = "<unknown>"
        assert host.core_clock_mhz() is None


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


class Nvml:
    """NVML of one GPU, as a driver's library answers through ctypes; it has no sensor for power."""

    values: ClassVar = {("nvmlDeviceGetClockInfo", 1): 1410, ("nvmlDeviceGetClockInfo", 2): 2619, ("nvmlDeviceGetTemperature", 0): 54}
    closed = 0

    def __getattr__(self, name):
        def getter(device, *arguments):
            *which, pointer = arguments
            value = self.values.get((name, *(argument.value for argument in which)))
            if value is None:
                return 3  # NVML_ERROR_NOT_SUPPORTED
            pointer._obj.value = value
            return 0

        return getter

    def nvmlDeviceGetHandleByIndex_v2(self, index, device):
        device._obj.value = 100 + index.value
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 1
        return 0

    def nvmlSystemGetDriverVersion(self, text, size):
        text.value = b"580.1"

    def nvmlDeviceGetName(self, device, text, size):
        assert device.value == 100
        text.value = b"GPU"

    def nvmlDeviceGetMemoryInfo(self, device, memory):
        memory._obj.total = 2**34
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device, millijoules):
        millijoules._obj.value = 5500
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, device, reasons):
        reasons._obj.value = 0x01 | 0x04 | 0x40
        return 0

    def nvmlShutdown(self):
        self.closed += 1


def test_gpus_are_read_through_nvml(monkeypatch):
    library, throttled = Nvml(), ["software power cap", "hardware thermal slowdown"]
    monkeypatch.setattr(host, "_nvml", lambda: library)
    facts = {"name": "GPU", "driver": "580.1", "memory_bytes": 2**34, "sm_clock_mhz": 1410, "memory_clock_mhz": 2619, "temperature_c": 54, "power_w": None}
    assert host.gpus() == [{**facts, "throttled": throttled}]
    with host.GpuMeter() as meter:
        assert meter.read(None) is None
        assert meter.read(0) == host.GpuReading(5.5, 1410, 54, throttled)
    assert library.closed == 2


def test_without_a_driver_there_are_no_gpus(monkeypatch):
    monkeypatch.setattr(host, "_nvml", lambda: None)
    with host.GpuMeter() as meter:
        assert (host.gpus(), meter.read(0), host.device_memory_bytes()) == ([], None, None)


def test_facts_are_json_without_this_machines_names():
    facts = json.dumps([host.cpu(), host.memory(), host.gpus(), host.container(), host.operating_system(), host.frequency_mhz(), host.load_average()])
    assert f'"{socket.gethostname()}"' not in facts
    assert os.path.expanduser("~") not in facts or os.path.expanduser("~") == "/"
