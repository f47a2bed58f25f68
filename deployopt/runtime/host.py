"""What machine this is and what else it is doing. No host, user or path names and no environment variables ever come out of here.

Linux is read through /proc and /sys, NVIDIA GPUs through NVML. Elsewhere, or where a file is not readable, a fact is None or absent.
"""

import ctypes
import os
import platform
from pathlib import Path
from typing import Any, Dict, FrozenSet, List, NamedTuple, Optional

ISA_OF_INTEREST = (
    ("avx2", "avx2"),
    ("f16c", "f16c"),
    ("avx_vnni", "avx_vnni"),
    ("avx512f", "avx512f"),
    ("avx512_vnni", "avx512_vnni"),
    ("avx512_bf16", "avx512_bf16"),
    ("avx512_fp16", "avx512_fp16"),
    ("amx_int8", "amx_int8"),
    ("amx_bf16", "amx_bf16"),
    ("asimd", "neon"),  # Linux's name on 64-bit Arm
    ("neon", "neon"),
    ("asimddp", "asimddp"),
    ("asimdhp", "asimdhp"),
    ("i8mm", "i8mm"),
    ("bf16", "bf16"),
)


def _read(path: str) -> Optional[str]:
    """A small text file, None if it is not there or not readable."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return None


def _cpuinfo(*keys: str) -> Optional[str]:
    """The first of the keys that /proc/cpuinfo has."""
    lines = (_read("/proc/cpuinfo") or "").splitlines()
    pairs = [line.partition(":") for line in lines if ":" in line]
    for key in keys:
        for name, _, value in pairs:
            if name.strip() == key:
                return value.strip()
    return None


def cores() -> FrozenSet[int]:
    """Logical CPUs that this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cpu_quota() -> Optional[float]:
    """CPUs' worth of time that the control group grants, None if it sets no limit."""
    unified = _read("/sys/fs/cgroup/cpu.max")
    if unified is not None:
        quota, _, period = unified.partition(" ")
        return None if quota == "max" else int(quota) / int(period)
    quota_v1, period_v1 = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota_v1 is None or period_v1 is None or int(quota_v1) <= 0:
        return None
    return int(quota_v1) / int(period_v1)


def usable_cores() -> int:
    """Cores that may be used at once: affinity and the control group's quota; at least 1."""
    quota = cpu_quota()
    return len(cores()) if quota is None else max(1, min(len(cores()), int(quota)))


def cpu() -> Dict[str, Any]:
    """{"model", "architecture", "cores" (usable), "isa" [flags that matter to inference]}."""
    flags = set((_cpuinfo("flags", "Features") or "").split())
    return {
        "model": _cpuinfo("model name", "Model", "Hardware") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "isa": list(dict.fromkeys(name for flag, name in ISA_OF_INTEREST if flag in flags)),
    }


def frequency_mhz() -> Optional[float]:
    """Mean current frequency of the allowed cores."""
    read = [_read(f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq") for core in sorted(cores())]
    scaled = [int(khz) / 1000 for khz in read if khz is not None and khz.isdigit()]
    if scaled:
        return round(sum(scaled) / len(scaled), 1)
    shown = _cpuinfo("cpu MHz")
    return None if shown is None else float(shown)


def core_clock_mhz() -> Optional[float]:
    """Clock of the core that the calling thread runs on: of a core that has been busy until now, whatever a governor does with idle ones.

    Source: Documentation/admin-guide/pm/cpufreq.rst, scaling_cur_freq: on x86 measured by the hardware over the last few milliseconds (APERF/MPERF), elsewhere
    mostly what the governor asked for, which falls with the limits that heat sets. None without cpufreq, as in virtual machines, where /proc/cpuinfo
    repeats a constant.
    """
    own = _read("/proc/thread-self/stat")
    if own is None:
        return None
    core = own.rpartition(")")[2].split()[36]  # proc(5): field 39, "processor"; the name before may hold spaces
    khz = _read(f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq")
    return int(khz) / 1000 if khz is not None and khz.isdigit() else None


def throttle_count() -> Optional[int]:
    """Times that the allowed cores have throttled for heat since boot."""
    read = [_read(f"/sys/devices/system/cpu/cpu{core}/thermal_throttle/core_throttle_count") for core in sorted(cores())]
    counts = [int(count) for count in read if count is not None and count.isdigit()]
    return sum(counts) if counts else None


def load_average() -> Optional[float]:
    """Mean number of runnable processes over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


class CpuTimes(NamedTuple):
    """Seconds since boot, summed over the allowed cores: executing anything, and stolen by the hypervisor for other guests."""

    busy_s: float
    stolen_s: float


def cpu_times() -> Optional[CpuTimes]:
    """Read /proc/stat (resolution: one tick, mostly 10 ms); None where there is none."""
    stat = _read("/proc/stat")
    if stat is None:
        return None
    allowed = {f"cpu{core}" for core in cores()}
    busy = stolen = 0
    for line in stat.splitlines():
        name, *fields = line.split()
        if name in allowed:
            user, nice, system, _idle, _iowait, irq, softirq, steal = (int(f) for f in fields[:8])  # proc(5); user includes guest
            busy += user + nice + system + irq + softirq
            stolen += steal
    tick = 1 / os.sysconf("SC_CLK_TCK")
    return CpuTimes(busy * tick, stolen * tick)


def cpu_pressure_s() -> Optional[float]:
    """Seconds since boot in which a task that could run waited for a CPU: of this control group where it says so, else of the machine.

    Source: "some" of Linux's pressure stall information (Documentation/accounting/psi.rst); None where the kernel keeps none.
    """
    lines = (_read("/sys/fs/cgroup/cpu.pressure") or _read("/proc/pressure/cpu") or "").splitlines()
    totals = [line.rpartition("total=")[2] for line in lines if line.startswith("some ")]
    return int(totals[0]) * 1e-6 if totals else None


def memory() -> Dict[str, Optional[int]]:
    """{"total_bytes", "available_bytes", "limit_bytes" of the control group}."""
    lines = (_read("/proc/meminfo") or "").splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if rest.split()}
    limit = _read("/sys/fs/cgroup/memory.max") or _read("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    total = kib["MemTotal"] * 1024 if "MemTotal" in kib else None
    limited = int(limit) if limit is not None and limit.isdigit() and total is not None and int(limit) < total else None
    return {"total_bytes": total, "available_bytes": kib["MemAvailable"] * 1024 if "MemAvailable" in kib else None, "limit_bytes": limited}


def container() -> Optional[str]:
    """What kind of container this process is in ("docker", "podman", "kubernetes", …), None if in none that shows."""
    named = _read("/run/systemd/container")
    if named:
        return named
    if Path("/run/.containerenv").exists():
        return "podman"
    groups = _read("/proc/1/cgroup") or ""
    for mark, name in (("kubepods", "kubernetes"), ("docker", "docker"), ("containerd", "containerd"), ("lxc", "lxc")):
        if mark in groups:
            return name
    return "docker" if Path("/.dockerenv").exists() else None


def operating_system() -> str:
    """Distribution and kernel release, as "Debian GNU/Linux 13 (trixie), Linux 6.12.1"."""
    kernel = f"{platform.system()} {platform.release().partition('-')[0]}"  # behind the dash stands who built it
    for line in (_read("/etc/os-release") or "").splitlines():
        key, _, value = line.partition("=")
        if key == "PRETTY_NAME":
            return "{}, {}".format(value.strip('"'), kernel)
    return kernel


def peak_memory_bytes() -> Optional[int]:
    """Largest resident set of this process since its start or the last reset."""
    for line in (_read("/proc/self/status") or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def reset_peak_memory() -> bool:
    """Start `peak_memory_bytes` anew from the current resident set. False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)
    except OSError:
        return False
    return True


# NVML: names and values from nvml.h; they have been stable since driver 410.
_NVML_SUCCESS = 0
_NVML_TEMPERATURE_GPU = 0
_NVML_CLOCK_SM, _NVML_CLOCK_MEM = 1, 2
_THROTTLE_REASONS = (
    (0x04, "software power cap"),
    (0x08, "hardware slowdown"),
    (0x20, "software thermal slowdown"),
    (0x40, "hardware thermal slowdown"),
    (0x80, "hardware power brake"),
)  # idle (0x01), application clocks (0x02), sync boost (0x10) and display clocks (0x100) are settings, not throttling


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _Process(ctypes.Structure):  # nvmlProcessInfo_t, as nvmlDeviceGetComputeRunningProcesses_v3 fills it
    _fields_ = [("pid", ctypes.c_uint), ("used", ctypes.c_ulonglong), ("instance", ctypes.c_uint), ("compute_instance", ctypes.c_uint)]


_NOT_AVAILABLE = 0xFFFFFFFFFFFFFFFF  # NVML_VALUE_NOT_AVAILABLE, cast
_MOST_PROCESSES = 256


def device_memory_bytes() -> Optional[int]:
    """What this process holds on GPUs; None without a driver, before it uses a GPU, and where a container hides its process from NVML."""
    library = _nvml()
    if library is None:
        return None
    try:
        count = ctypes.c_uint()
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        found = [used for index in range(count.value) for used in _own_memory(library, index)]
    finally:
        library.nvmlShutdown()
    return sum(found) if found else None


def _own_memory(library: ctypes.CDLL, index: int) -> List[int]:
    """Bytes of each of this process's contexts on one GPU."""
    device, processes, count = ctypes.c_void_p(), (_Process * _MOST_PROCESSES)(), ctypes.c_uint(_MOST_PROCESSES)
    library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device))
    if not hasattr(library, "nvmlDeviceGetComputeRunningProcesses_v3"):  # drivers before 510
        return []
    if library.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(count), processes) != _NVML_SUCCESS:
        return []
    return [p.used for p in processes[: count.value] if p.pid == os.getpid() and p.used != _NOT_AVAILABLE]


def _nvml() -> Optional[ctypes.CDLL]:
    """NVML, initialised; None without an NVIDIA driver. The caller shuts it down."""
    try:
        library = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
    except OSError:
        return None
    return library if library.nvmlInit_v2() == _NVML_SUCCESS else None


def gpus() -> List[Dict[str, Any]]:
    """One dict a GPU: name, driver, memory_bytes, sm_clock_mhz, memory_clock_mhz, temperature_c, power_w, throttled [reasons]. [] without a driver."""
    library = _nvml()
    if library is None:
        return []
    try:
        count = ctypes.c_uint()
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != _NVML_SUCCESS:
            return []
        driver = ctypes.create_string_buffer(96)
        library.nvmlSystemGetDriverVersion(driver, 96)
        return [_gpu(library, index, driver.value.decode()) for index in range(count.value)]
    finally:
        library.nvmlShutdown()


def _gpu(library: ctypes.CDLL, index: int, driver: str) -> Dict[str, Any]:
    device = ctypes.c_void_p()
    library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device))
    name = ctypes.create_string_buffer(96)
    library.nvmlDeviceGetName(device, name, 96)
    memory_info = _Memory()
    has_memory = library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory_info)) == _NVML_SUCCESS
    milliwatts = _unsigned(library, device, "nvmlDeviceGetPowerUsage")
    return {
        "name": name.value.decode(),
        "driver": driver,
        "memory_bytes": memory_info.total if has_memory else None,
        "sm_clock_mhz": _unsigned(library, device, "nvmlDeviceGetClockInfo", _NVML_CLOCK_SM),
        "memory_clock_mhz": _unsigned(library, device, "nvmlDeviceGetClockInfo", _NVML_CLOCK_MEM),
        "temperature_c": _unsigned(library, device, "nvmlDeviceGetTemperature", _NVML_TEMPERATURE_GPU),
        "power_w": None if milliwatts is None else milliwatts / 1000,
        "throttled": _throttled(library, device),
    }


def _unsigned(library: ctypes.CDLL, device: ctypes.c_void_p, function: str, *arguments: int) -> Optional[int]:
    """What one of NVML's getters of an unsigned int answers; None where it does not."""
    value = ctypes.c_uint()
    return value.value if getattr(library, function)(device, *map(ctypes.c_uint, arguments), ctypes.byref(value)) == _NVML_SUCCESS else None


def _throttled(library: ctypes.CDLL, device: ctypes.c_void_p) -> Optional[List[str]]:
    reasons = ctypes.c_ulonglong()
    if library.nvmlDeviceGetCurrentClocksThrottleReasons(device, ctypes.byref(reasons)) != _NVML_SUCCESS:
        return None
    return [text for bit, text in _THROTTLE_REASONS if reasons.value & bit]


def nvml_index(cuda_index: int) -> Optional[int]:
    """The place in `gpus` of the GPU that CUDA calls so in this process's children; None where that cannot be told.

    CUDA leaves out what CUDA_VISIBLE_DEVICES does not name, and orders different GPUs by speed unless CUDA_DEVICE_ORDER says otherwise (CUDA C++
    Programming Guide, "CUDA Environment Variables"); NVML always has all, in the order of the bus.
    """
    found = gpus()
    if len(found) == 1:
        return 0
    if len({gpu["name"] for gpu in found}) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    order = [str(i) for i in range(len(found))] if visible is None else [part.strip() for part in visible.split(",")]
    if cuda_index >= len(order) or not order[cuda_index].isdigit() or int(order[cuda_index]) >= len(found):
        return None
    return int(order[cuda_index])


class GpuReading(NamedTuple):
    """A GPU at one moment, each None where its driver does not tell. `energy_j`: consumed since the driver was loaded; GPUs before Volta do not count it."""

    energy_j: Optional[float] = None
    sm_clock_mhz: Optional[int] = None
    temperature_c: Optional[int] = None
    throttled: Optional[List[str]] = None


class GpuMeter:
    """Reads GPUs by NVML. A context manager: it keeps NVML open, whose start takes milliseconds."""

    def __init__(self) -> None:
        self._library = _nvml()

    def read(self, index: Optional[int]) -> Optional[GpuReading]:
        """The GPU at this place in `gpus`; None for None, and without a driver."""
        library = self._library
        if library is None or index is None:
            return None
        device, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device))
        counted = library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)) == _NVML_SUCCESS
        return GpuReading(
            millijoules.value / 1000 if counted else None,
            _unsigned(library, device, "nvmlDeviceGetClockInfo", _NVML_CLOCK_SM),
            _unsigned(library, device, "nvmlDeviceGetTemperature", _NVML_TEMPERATURE_GPU),
            _throttled(library, device),
        )

    def close(self) -> None:
        if self._library is not None:
            self._library.nvmlShutdown()
            self._library = None

    def __enter__(self) -> "GpuMeter":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


def timing_facts() -> Dict[str, Any]:
    """What a decision made by timing depends on: the CPU with its flags, and each GPU with its driver."""
    found = cpu()
    return {"cpu": found["model"], "isa": list(found["isa"]), "gpus": [{key: gpu.get(key) for key in ("name", "driver")} for gpu in gpus()]}
