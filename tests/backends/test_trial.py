"""What `deployopt doctor` learns from a trial: here the driver is said to be there, and the library finds that it is not."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from deployopt.backends import _trial, tensorrt, tensorrt_rtx
from deployopt.errors import BackendUnavailable
from deployopt.pipeline import inspection
from deployopt.pipeline.planning import visible_gpus
from deployopt.runtime import cuda
from deployopt.runtime.cuda import Gpu

FAULTY = Path(__file__).parents[1] / "runtime" / "faulty"
NEW = "pip install 'deployopt[tensorrt]'"


def ada(cuda_driver="13.0"):
    return Gpu("NVIDIA GeForce RTX 4090", "8.9", cuda_driver, "550.54")


@pytest.fixture(autouse=True)
def anew():
    _trial.take.cache_clear()
    yield
    _trial.take.cache_clear()


@pytest.fixture
def no_driver():
    try:
        cuda.find_gpus()
    except BackendUnavailable:
        return
    pytest.skip("this machine has a GPU")


@pytest.mark.usefixtures("no_driver")
def test_tensorrt_beside_a_driver_is_not_said_to_work_until_it_does(monkeypatch):
    monkeypatch.syspath_prepend(str(FAULTY))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(tensorrt, "find_gpus", lambda: [ada("12.4")])
    try:
        found = tensorrt.probe()
    finally:
        sys.modules.pop("tensorrt", None)
    assert (found.version, found.device, found.builds, found.runs) == ("8.6.1", "NVIDIA GeForce RTX 4090", False, False)
    assert found.reason.startswith("no NVIDIA driver")  # which the child finds
    assert "tensorrt-cu13-bindings; pip install 'deployopt[tensorrt-cu12]'" in found.remedy


@pytest.mark.usefixtures("no_driver")
def test_rtx_still_builds_for_other_machines(monkeypatch):
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'deployopt[tensorrt-rtx]'")
    monkeypatch.setattr(tensorrt_rtx, "find_gpus", lambda: [ada()._replace(compute_capability="9.0"), ada()])
    found = tensorrt_rtx._offered(trt)
    assert (found.builds, found.runs) == (True, False)
    assert found.reason
    assert _trial.take.cache_info().misses == 1
    assert tensorrt_rtx._offered(trt) == found
    assert _trial.take.cache_info().misses == 1  # once a process


@pytest.mark.parametrize(
    ("fault", "reason", "remedy"),
    [
        ("no_engine", "^no engine can be built for this GPU: .*no kernel image fits", "serves this GPU"),
        ("no_memory", "^no engine can be built for this GPU: .*OutOfMemory", "^free memory of the GPU: `nvidia-smi`"),
        ("crash", "^trying tensorrt_rtx out: the process was ended by SIGSEGV", "^native code crashed"),
        ("hang", "^trying tensorrt_rtx out: not done within", "^allow it more time"),
    ],
)
def test_a_library_that_fails_or_crashes_costs_the_trial_alone(monkeypatch, fault, reason, remedy):
    monkeypatch.syspath_prepend(str(FAULTY))
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setattr(_trial, "LIMIT_S", 5.0 if fault == "hang" else 60.0)
    tried = _trial.take("tensorrt_rtx", 0, ("8.6",), NEW)
    assert (tried.builds, tried.runs) == (False, False)
    assert re.search(reason, tried.reason)
    assert re.search(remedy, tried.remedy)


def test_a_gpu_without_free_memory_is_not_told_to_install_another_library(monkeypatch):
    def full(*arguments):
        raise BackendUnavailable("cudaSetDevice: CUDA error 2 (out of memory)", "see what `nvidia-smi` says of the GPU")

    monkeypatch.setattr(_trial, "run_in_child", full)
    assert _trial.take("tensorrt", 0, (), NEW).remedy == "see what `nvidia-smi` says of the GPU"


@pytest.mark.parametrize(
    ("served", "remedy"),
    [
        ("13.0", NEW),
        ("12.4", "pip install 'deployopt[tensorrt-cu12]'  # the driver serves CUDA 12.4"),
        ("11.4", f"update the NVIDIA driver; {NEW}  # it serves CUDA 11.4, and TensorRT's packages are for 12 and 13"),
    ],
)
def test_what_to_install_fits_the_driver(monkeypatch, served, remedy):
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))  # stubs alone
    monkeypatch.setattr(tensorrt, "find_gpus", lambda: [ada(served)])
    assert tensorrt.probe().remedy == remedy


def test_the_extras_that_remedies_name_are_there(repository):
    import tomllib

    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [extras[extra][0].partition(">")[0] for extra in ("tensorrt", "tensorrt-cu12", "tensorrt-rtx")] == ["tensorrt", "tensorrt-cu12", "tensorrt-rtx-cu13"]
    assert "nvidia-cuda-runtime>=13,<14" in extras["tensorrt-rtx"]


def test_doctor_tells_gpus_as_the_backends_see_them(monkeypatch):
    monkeypatch.setattr(cuda, "find_gpus", lambda: [ada()])
    assert visible_gpus() == ([ada()], None)
    monkeypatch.setattr(inspection.backends, "names", list)  # they would try the GPU out
    found = inspection.diagnose()
    assert (found["gpus"], found["no_gpu"]) == ([ada()._asdict()], None)
