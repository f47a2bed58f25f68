"""What `deployopt doctor` shows, at the widths of usual terminals."""

import ast
import io
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

import deployopt
from deployopt import backends
from deployopt.backends import tensorrt
from deployopt.report import doctor
from deployopt.runtime import child, manifest, onnxruntime_gpu, tensorrt_vendor
from deployopt.runtime.cuda import Gpu
from deployopt.runtime.tensorrt import FREE_MEMORY

ORT = SimpleNamespace(__version__="1.31.1", cuda_version="12.8")
INSTALL = f"pip uninstall onnxruntime; {onnxruntime_gpu._install(ORT, onnxruntime_gpu.TENSORRT)}"
PACKAGE = Path(deployopt.__file__).parent
UNAVAILABLE = ("BackendUnavailable", "DeviceUnavailable")  # whose remedies doctor shows
NO_INT8 = "no INT8 convolution"


def backend(works, version="1.31.1", reason=None, remedy=None, **precisions):
    return {"runs": works, "builds": works, "version": version, "device": None, "reason": reason, "remedy": remedy, "precisions": precisions}


FACTS = {
    "deployopt": "0.1.0",
    "environment": {
        "cpu": {"model": "AMD EPYC", "cores": 2, "isa": ["avx2"]},
        "gpus": [{"name": "NVIDIA of NVML", "driver": "1.0"}],  # is not what the backends judge from
        "python": "3.11.7",
        "os": "Debian",
        "versions": {"torch": "2.15.0", "onnxruntime-gpu": None},
    },
    "gpus": [],
    "no_gpu": "no NVIDIA driver (libcuda.so.1 not found)",
    "missing": {"train": ["torchao"]},
    "backends": {
        "onnxruntime": backend(True, fp32=None, int8=None, fp16="computed in FP32"),
        "onnxruntime-cuda": backend(False, reason="built without CUDA", remedy=INSTALL, fp32=None, int8=NO_INT8),
        "openvino": backend(True, "2026.4.1-22982-e213a147257-releases/2026/4", fp32=None),
        "tensorrt": backend(False, None, "not installed", "pip install 'deployopt[tensorrt]'"),
    },
}


def shown(width, **facts):
    console = Console(file=io.StringIO(), width=width)
    doctor.render({**FACTS, **facts}, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100])
def test_each_backend_and_provider_has_a_line_and_its_remedy_can_be_copied(width):
    lines = shown(width).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(("backend", "onnxruntime ", "onnxruntime-cuda ", "tensorrt "))}
    assert rows["backend"] == ["version", "builds", "runs", "precisions"]
    assert rows["onnxruntime-cuda"] == ["1.31.1", "no", "no", "–"]
    assert rows["tensorrt"] == ["–", "no", "no", "–"]
    assert "openvino          2026.4.1  yes     yes   fp32" in [line.rstrip() for line in lines]
    assert ["1.31.1", "yes", "yes", "fp32", "int8"] in [line.split()[1:] for line in lines]
    assert f"  → {INSTALL}" in lines
    assert lines[lines.index("tensorrt: not installed") + 1] == "  → pip install 'deployopt[tensorrt]'"
    assert all(len(line) <= width for line in lines if "→" not in line)


def test_a_gpu_is_told_with_what_decides_which_packages_fit_it():
    hopper = {"name": "NVIDIA H100", "compute_capability": "9.0", "cuda_driver": "12.4", "driver": "550.54"}
    lines = shown(80, gpus=[hopper, {**hopper, "driver": None}], no_gpu=None).splitlines()
    assert "GPU 0: NVIDIA H100, compute capability 9.0, driver 550.54, which serves CUDA 12.4" in lines
    assert "GPU 1: NVIDIA H100, compute capability 9.0, driver for CUDA 12.4" in lines
    assert "GPU: none: no NVIDIA driver (libcuda.so.1 not found)" in shown(80)
    assert "NVML" not in shown(80)


def test_precisions_are_explained_where_the_backend_works():
    text = shown(100)
    assert "onnxruntime fp16: computed in FP32" in text
    assert NO_INT8 not in text


def test_packages_that_are_not_there_are_not_listed():
    assert "packages: torch 2.15.0\n" in shown(80)
    assert "missing for 'train': torchao  → pip install 'deployopt[train]'" in shown(80)


def said(node):
    """A string in the source, with X for what is filled in; None for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def written():
    """Remedies with which runtimes and backends say that something is lacking."""
    for folder in ("runtime", "backends"):
        for path in sorted((PACKAGE / folder).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in UNAVAILABLE and len(node.args) > 1:
                    yield said(node.args[1])


def composed():
    """Those that are put together."""
    for cuda_driver in ("11.4", "12.4", "13.0"):
        yield tensorrt._install([Gpu("NVIDIA L4", "8.9", cuda_driver)], f"pip uninstall {tensorrt._OTHERS}; ")
    for provider in onnxruntime_gpu.PROVIDERS:
        yield onnxruntime_gpu._install(ORT, provider)
    yield from (tensorrt_vendor._JETPACK, INSTALL, FREE_MEMORY, f"{manifest.REBUILD}  # on this machine")
    yield from (child._OVERDUE, child._FOREIGN, child._remedy(-signal.SIGKILL), child._remedy(-signal.SIGSEGV))  # of a trial
    yield from (backends.find(name).probe().remedy for name in backends.names())


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_every_remedy_can_be_pasted_into_a_shell():
    remedies = sorted({remedy for remedy in (*written(), *composed()) if remedy})
    assert len(remedies) > 20
    refused = [remedy for remedy in remedies if subprocess.run(["bash", "-n"], input=remedy, text=True, capture_output=True, check=False).returncode]
    assert refused == []
    assert subprocess.run(["bash", "-n"], input="pip install 'a' (with b)", text=True, capture_output=True, check=False).returncode
