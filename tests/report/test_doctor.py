"""What `deployopt doctor` shows, at the widths of usual terminals."""

import io

import pytest
from rich.console import Console

from deployopt.report import doctor

INSTALL = "pip uninstall onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]==1.31.1', which brings the CUDA and cuDNN it was built for"
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
