"""The trial of a vendor's library: with TensorRT-RTX as far as it goes without a GPU, and with a module that only fails."""

import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from deployopt.errors import BackendUnavailable, BuildFailed
from deployopt.runtime import tensorrt as rt
from deployopt.runtime import tensorrt_session
from deployopt.runtime.cuda import Cuda, Gpu
from deployopt.runtime.progress import SilentProgress
from deployopt.runtime.tensorrt_trial import RELU, try_out

AMPERE = Gpu("NVIDIA GeForce RTX 3090", "8.6", "13.0")


@pytest.fixture
def ampere(monkeypatch):
    """As if the driver had told of a GPU, which is then not there."""
    try:
        Cuda()
    except BackendUnavailable:
        monkeypatch.setattr(rt, "find_gpu", lambda index: AMPERE)
        monkeypatch.setattr(tensorrt_session, "find_gpu", lambda index: AMPERE)
        monkeypatch.setattr(rt, "Cuda", lambda index: None, raising=False)  # where a build chooses its thread's GPU
    else:
        pytest.skip("this machine has a GPU")


def test_the_network_is_one_relu():
    tensors = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2])] for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], "relu")], "relu", *tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    assert onnx.load_from_string(RELU) == made
    onnx.checker.check_model(made)
    (found,) = ReferenceEvaluator(made).run(None, {"x": np.array([[-1, 2]], np.float32)})
    assert found.tolist() == [[0, 2]]


def test_what_is_built_and_does_not_run_says_why(ampere):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'deployopt[tensorrt-rtx]'")
    fault = try_out(vendor="tensorrt_rtx", device="cuda:0", compute_capabilities=["8.6"], progress=SilentProgress())
    assert fault["type"] == "BackendUnavailable"
    assert fault["message"].startswith("no CUDA runtime library works here")
    assert "nvidia-cuda-runtime" in fault["remedy"]


def test_a_driver_that_is_too_old_is_found(ampere, old, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    monkeypatch.setattr(old, "OLD_DRIVER", True)
    with pytest.raises(BackendUnavailable, match=r"TensorRT 8\.6\.1 cannot start: CUDA initialization failure with error: 35"):
        try_out(vendor="tensorrt", device="cuda:0", compute_capabilities=[], progress=SilentProgress())


def test_a_gpu_that_is_not_served_is_found(ampere, old, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(BuildFailed, match=r"TensorRT 8\.6\.1 built no engine: "):
        try_out(vendor="tensorrt", device="cuda:0", compute_capabilities=[], progress=SilentProgress())
