import errno
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from deployopt.errors import ArtifactMismatch, BackendUnavailable, BuildFailed, DeviceUnavailable
from deployopt.runtime import cuda
from deployopt.runtime import tensorrt as rt
from deployopt.runtime import tensorrt_vendor as vendor
from deployopt.runtime.child import run_in_child
from deployopt.runtime.cuda import Cuda, device_index, find_gpu, runtime_version
from deployopt.runtime.manifest import Manifest
from deployopt.runtime.progress import SilentProgress
from deployopt.runtime.session import TensorSpec

FAULTY = Path(__file__).parent / "faulty"
AMPERE = rt.BuildOptions((1, 4), ("8.6",))


@pytest.fixture(scope="module")
def trt():
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'deployopt[tensorrt-rtx]'")


def model(nodes, initializers=(), shape=("batch", 3, 8, 8), domain="custom"):
    """ONNX bytes of a graph from float32 "input" to float32 "y"."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        list(initializers),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)], ir_version=10).SerializeToString()


def relu(**changes):
    return model([helper.make_node("Relu", ["input"], ["y"], name="relu")], **changes)


def convolution():
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32), "weight")
    return model([helper.make_node("Conv", ["input", "weight"], ["y"], name="conv")], [weight])


def test_stubs_alone_are_not_the_library(monkeypatch):
    stubs = ModuleType("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", stubs)
    assert not vendor.usable(stubs)
    with pytest.raises(BackendUnavailable, match="only its type stubs") as caught:
        vendor.load_vendor("tensorrt")
    assert caught.value.remedy == "pip install 'deployopt[tensorrt]'"


def test_on_a_jetson_tensorrt_comes_with_jetpack(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    monkeypatch.setattr(vendor, "_JETSON", tmp_path)  # it exists
    with pytest.raises(BackendUnavailable) as caught:
        vendor.load_vendor("tensorrt")
    assert caught.value.remedy.startswith("sudo apt install nvidia-jetpack")
    assert "JetPack 5 and 6 are for Python 3.8 and 3.10, where deployopt.runtime works and these commands, which need 3.11, do not" in caught.value.remedy


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists a process's libraries in /proc")
def test_a_library_of_this_process_is_found_where_it_lies():
    found = cuda._loaded("libc.so")
    assert found
    assert all(Path(path).is_file() for path in found)
    assert cuda._loaded("libnothing.so.") == []


def test_a_tensorrt_without_named_tensors_is_refused(monkeypatch):
    old = ModuleType("tensorrt")
    old.Builder, old.__version__ = object, "8.4.3.1"
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(BackendUnavailable, match=r"TensorRT 8\.4\.3\.1 is not served") as caught:
        vendor.load_vendor("tensorrt")
    assert caught.value.remedy.startswith("install TensorRT 8.5 or later")


def test_a_missing_or_broken_vendor_says_why(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(BackendUnavailable, match=r"cannot be loaded \(OSError: libnvinfer"):
        vendor.load_vendor("tensorrt")
    with pytest.raises(BackendUnavailable, match="package tensorrt_absent is not installed"):
        vendor.load_vendor("tensorrt_absent")


def test_profile_spans_the_batch_sizes():
    spec = TensorSpec("input", ("batch", 3, 8, 8), "float32")
    assert rt.ranges_of([spec], (4, 1)) == {"input": {"min": (1, 3, 8, 8), "opt": (4, 3, 8, 8), "max": (4, 3, 8, 8)}}
    assert rt.ranges_of([TensorSpec("input", (4, 3, 8, 8), "float32")], (4,)) == {}


@pytest.mark.parametrize(
    ("shape", "batch_sizes", "message"),
    [
        (("batch", 3, 8, 8), (0, 4), "each must be 1 or more"),
        (("batch", 3, 8, 8), (), "each must be 1 or more"),
        (("batch", 3, "height", 8), (1,), "only the batch may be dynamic"),
        ((1, 3, 8, 8), (1, 8), r"is static; batch sizes \[1, 8\] were asked for"),
    ],
)
def test_impossible_batch_sizes(shape, batch_sizes, message):
    with pytest.raises(BuildFailed, match=message):
        rt.ranges_of([TensorSpec("input", shape, "float32")], batch_sizes)


def test_build_reports_specs_seconds_and_execution(trt):
    built = rt.build_engine(trt, convolution(), AMPERE)
    assert len(built.plan) > 10_000
    assert built.seconds > 0
    assert built.inputs == (TensorSpec("input", ("batch", 3, 8, 8), "float32"),)
    assert built.outputs == (TensorSpec("y", ("batch", 4, 6, 6), "float32"),)
    assert built.reason is None
    assert built.execution is not None
    assert built.execution.executed == {"fp32": 1}


def test_workspace_and_level_reach_the_builder(trt):
    """TensorRT-RTX takes them too, so they are tried here; deployopt offers them for TensorRT alone."""
    wanted = AMPERE._replace(workspace_mib=64, optimization_level=1)
    logger = vendor.make_logger(trt)
    builder = trt.Builder(logger)
    config = rt._configure(trt, builder, logger, wanted, "fp32")
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 << 20
    assert config.builder_optimization_level == 1
    assert len(rt.build_engine(trt, convolution(), wanted).plan) > 10_000


class Recorder(SilentProgress):
    def __init__(self, stop_at=None):
        self.steps = []
        self.stop_at = stop_at

    @contextmanager
    def track(self, description, total):
        assert total == 1.0
        yield self

    def advance(self, steps=1, note=""):
        self.steps.append((steps, note))
        if len(self.steps) == self.stop_at:
            raise KeyboardInterrupt


def test_progress_rises_to_the_whole(trt):
    progress = Recorder()
    rt.build_engine(trt, convolution(), AMPERE, progress)
    assert all(step >= 0 for step, _ in progress.steps)
    assert sum(step for step, _ in progress.steps) == pytest.approx(1.0)
    assert {note for _, note in progress.steps} >= {"Building engine", "Optimizing graph"}


@pytest.mark.parametrize("stop_at", [1, 5])
def test_interrupt_stops_the_build_at_its_next_step(trt, stop_at):
    progress = Recorder(stop_at)
    with pytest.raises(KeyboardInterrupt):
        rt.build_engine(trt, convolution(), AMPERE, progress)
    assert len(progress.steps) == stop_at


def test_empty_and_junk_onnx(trt):
    with pytest.raises(BuildFailed, match="holds no graph"):
        rt.build_engine(trt, b"", AMPERE)
    with pytest.raises(BuildFailed, match="not a complete ONNX model") as caught:
        rt.build_engine(trt, convolution()[:200], AMPERE)
    assert "export the model again" in caught.value.remedy


@pytest.mark.parametrize(
    ("onnx", "message", "remedy"),
    [
        (
            model([helper.make_node("Frobnicate", ["input"], ["y"], name="frob", domain="custom")]),
            r"node 'frob' \(Frobnicate\): no such operator",
            "replace the operator",
        ),
        (model([helper.make_node("Unique", ["input"], ["y"], name="uniq")]), r"node 'uniq' \(Unique\): the operator is not supported", "replace the operator"),
        (
            model(
                [helper.make_node("DequantizeLinear", ["bias", "scale"], ["y"], name="bias_dq", axis=0)],
                [numpy_helper.from_array(np.zeros(4, np.int32), "bias"), numpy_helper.from_array(np.ones(4, np.float32), "scale")],
            ),
            r"node 'bias_dq' \(DequantizeLinear\): an INT32 tensor cannot be dequantised",
            "leave biases in floating point",
        ),
        (
            model(
                [
                    helper.make_node("Cast", ["input"], ["half"], to=TensorProto.FLOAT16, name="cast"),
                    helper.make_node("Add", ["half", "input"], ["y"], name="mixed"),
                ]
            ),
            r"node 'mixed' \(Add\): its inputs differ in type",
            "cast them to one type",
        ),
    ],
    ids=["unknown", "unsupported", "int32_bias", "mixed_types"],
)
def test_parser_errors_name_the_node_and_what_to_do(trt, onnx, message, remedy):
    with pytest.raises(BuildFailed, match=message) as caught:
        rt.build_engine(trt, onnx, AMPERE)
    assert remedy in caught.value.remedy
    assert "cudaError" not in caught.value.message


def test_builder_errors_are_told_without_driver_noise(trt):
    with pytest.raises(BuildFailed, match="sm75") as caught:
        rt.build_engine(
            trt,
            model(
                [
                    helper.make_node("Cast", ["input"], ["b16"], to=TensorProto.BFLOAT16),
                    helper.make_node("Relu", ["b16"], ["r"]),
                    helper.make_node("Cast", ["r"], ["y"], to=TensorProto.FLOAT),
                ]
            ),
            rt.BuildOptions((1,), ("7.5",)),
        )
    assert "insufficient" not in caught.value.message


def test_unsupported_compute_capability_lists_those_there_are(trt):
    with pytest.raises(BuildFailed, match=r"does not build for compute capability 9\.0 \(it builds for 7\.5, 8\.0, 8\.6, 8\.9, 12\.0"):
        rt.build_engine(trt, relu(), rt.BuildOptions((1,), ("9.0",)))


@pytest.mark.usefixtures("trt")
def test_bytes_that_are_no_engine_are_a_mismatch():
    with pytest.raises(ArtifactMismatch, match=r"cannot load the engine: .*magicTag"):
        run_in_child("child_targets:load_no_engine", {}, SilentProgress(), "loading", timeout_s=60)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("crash", "was ended by SIGSEGV"),
        ("out_of_memory", "was ended by SIGKILL"),
        ("no_engine", "built no engine: no kernel image fits"),
        ("parser", r"node 'conv7' \(Conv\): weights vanished \[INTERNAL_ERROR\]"),
        ("raise", "RuntimeError: the vendor's module broke"),
    ],
)
def test_a_faulty_vendor_fails_the_build_alone(monkeypatch, tmp_path, fault, message):
    arguments = faulty_build(monkeypatch, tmp_path, fault)
    with pytest.raises(BuildFailed, match=message):
        run_in_child("deployopt.runtime.tensorrt:build_file", arguments, SilentProgress(), "building")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_vendor_that_hangs_is_ended_when_its_time_is_up(monkeypatch, tmp_path):
    arguments, start = faulty_build(monkeypatch, tmp_path, "hang"), time.monotonic()
    with pytest.raises(BuildFailed, match=r"building: not done within 0\.05 min") as caught:
        run_in_child("deployopt.runtime.tensorrt:build_file", arguments, SilentProgress(), "building", timeout_s=3.0)
    assert "build.timeout_minutes" in caught.value.remedy
    assert 3 <= time.monotonic() - start < 30  # it would have slept for 60 s
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("writer", [(rt, "atomic_write"), (rt.manifest, "atomic_write_json")])
def test_a_full_disk_fails_the_build_with_what_is_needed_and_free(monkeypatch, tmp_path, writer):
    described = Manifest(*(None,) * len(Manifest._fields))

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*writer, full)
    with pytest.raises(BuildFailed, match=r"no disk space for model\.engine: wanted 2\.0 MB, \d+\.\d MB are free") as caught:
        rt._save(tmp_path / "model.engine", bytes(2_000_000), described)
    assert caught.value.remedy == "free some: deployopt cache prune"
    assert list(tmp_path.iterdir()) == []


REGISTRY = "Error Code 1: Serialization (Cannot deserialize plugin since corresponding IPluginCreator not found in Plugin Registry)"


@pytest.mark.parametrize(
    ("said", "plugin"),
    [
        (("INVALID_ARGUMENT: getPluginCreator could not find plugin Prelu_TRT version 1", REGISTRY), "'Prelu_TRT'"),
        (
            ("IPluginRegistry::getPluginCreator: Error Code 4: API Usage Error (Cannot find plugin: EfficientIdxNMS_TRT, version: 1, namespace:.)", REGISTRY),
            "'EfficientIdxNMS_TRT'",
        ),
        ((REGISTRY,), "that it does not name"),
    ],
)
def test_an_engine_that_wants_a_plugin_says_which(old, said, plugin):
    old.REFUSED = said
    with pytest.raises(ArtifactMismatch, match=f"it wants the plugin {plugin}, which is not loaded here") as caught:
        rt.load_engine(old, b"plan", vendor.make_logger(old))
    assert "standard ONNX" in caught.value.remedy


def test_any_other_refusal_of_an_engine_says_to_build_it_again(old):
    old.REFUSED = ("Error Code 6: The engine plan file is generated on an incompatible device",)
    with pytest.raises(ArtifactMismatch, match="incompatible device") as caught:
        rt.load_engine(old, b"plan", vendor.make_logger(old))
    assert "--until build  # on this machine" in caught.value.remedy


def test_an_engine_without_memory_for_a_context_is_kept_with_the_reason(old):
    old.PLAN = b"a whole engine"
    built = rt.build_engine(old, b"model", rt.BuildOptions((1,)))
    assert (built.plan, built.execution) == (b"a whole engine", None)
    assert built.reason == (
        "the layers of the engine could not be read: no execution context for the engine: Requested amount of GPU memory (1024 bytes) could not be allocated."
    )


@pytest.mark.parametrize(("named", "wanted"), [((), [1]), (("8.6",), [])])
def test_the_gpu_that_is_built_for_is_the_builders(old, monkeypatch, tmp_path, named, wanted):
    """But for an engine for GPU classes, which is of no one GPU."""
    selected, when_built = [], []

    def builder(logger):
        when_built.extend(selected)
        raise BuildFailed("seen enough")

    old.Builder = builder
    monkeypatch.setattr(rt, "load_vendor", lambda name: old)
    monkeypatch.setattr(rt, "find_gpu", lambda index: cuda.Gpu("NVIDIA H100", "9.0", "13.0"))
    monkeypatch.setattr(rt, "Cuda", selected.append)
    (tmp_path / "model.onnx").write_bytes(relu())
    files = {"onnx": str(tmp_path / "model.onnx"), "engine": str(tmp_path / "model.engine")}
    with pytest.raises(BuildFailed, match="seen enough"):
        rt.build_file(
            vendor="tensorrt",
            **files,
            precision="fp32",
            device="cuda:1",
            options={"compute_capabilities": list(named)},
            preprocessing=None,
            progress=SilentProgress(),
        )
    assert when_built == wanted


class CudaLibrary:
    """Of libcudart what choosing a device needs; `flags` is what it says afterwards, `code` what setting them ends with."""

    def __init__(self, flags, code):
        self.calls = []

        def function(name, act):
            def called(*arguments):
                self.calls.append(name)
                return act(*arguments)

            setattr(self, name, called)

        def tell(pointer):
            pointer._obj.value = flags
            return 0

        for name in ("cudaGetDeviceCount", "cudaSetDevice", "cudaGetLastError"):
            function(name, lambda *_: 0)
        function("cudaSetDeviceFlags", lambda chosen: code)
        function("cudaGetDeviceFlags", tell)
        function("cudaGetErrorString", lambda code: b"cannot set while device is active in this process")


@pytest.mark.parametrize(
    ("flags", "code", "waiting"),
    [
        (1 | 8, 0, "spin"),  # 8: cudaDeviceMapHost, always there
        (8, 708, "auto (spin was refused: cudaSetDeviceFlags: CUDA error 708 (cannot set while device is active in this process))"),
        (4, 0, "block (spin was refused)"),
    ],
)
def test_threads_that_wait_spin_or_it_is_said(monkeypatch, flags, code, waiting):
    library = CudaLibrary(flags, code)
    monkeypatch.setattr(cuda, "runtime_libraries", lambda: ["libcudart.so"])
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: library)
    assert Cuda(1).waiting_threads == waiting
    assert library.calls[1:3] == ["cudaSetDevice", "cudaSetDeviceFlags"]  # or the flags would be those of another device


def faulty_build(monkeypatch, tmp_path, fault):
    """Arguments of a build with the vendor module that only fails."""
    monkeypatch.syspath_prepend(str(FAULTY))
    monkeypatch.setenv("FAULT", fault)
    (tmp_path / "model.onnx").write_bytes(relu())
    return {
        "vendor": "tensorrt_rtx",
        "onnx": str(tmp_path / "model.onnx"),
        "engine": str(tmp_path / "model.engine"),
        "precision": "fp32",
        "device": "cpu",
        "options": {"compute_capabilities": ["8.6"]},
        "preprocessing": None,
    }


def has_gpu():
    try:
        find_gpu()
    except BackendUnavailable:
        return False
    return True


def test_devices_are_parsed():
    assert [device_index(d) for d in ("cpu", "cuda", "cuda:3")] == [0, 0, 3]
    with pytest.raises(DeviceUnavailable, match="not one of"):
        device_index("gpu")


def test_a_machine_without_a_gpu_says_so():
    if has_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendUnavailable, match=r"no NVIDIA driver|no usable GPU"):
        find_gpu()
    with pytest.raises(BackendUnavailable, match="no CUDA runtime library works here") as caught:
        Cuda()
    assert caught.value.remedy.startswith("update the NVIDIA driver")
    if version := runtime_version():  # a CUDA runtime without a driver takes it for one that is too old
        assert re.fullmatch(r"1\d\.\d", version)
        assert "is newer than the NVIDIA driver" in caught.value.message


@pytest.mark.gpu
def test_the_gpu_is_described_and_cuda_starts():
    if not has_gpu():
        pytest.skip("no NVIDIA GPU with its driver here")
    assert re.fullmatch(r"\d+\.\d", find_gpu().compute_capability)
    assert find_gpu().driver is None or re.match(r"\d+\.\d+", find_gpu().driver)
    with pytest.raises(DeviceUnavailable, match="this machine has"):
        find_gpu(64)
    Cuda()


def test_the_profiler_keeps_what_is_reported_until_it_is_taken(trt):
    profiler = vendor.make_profiler(trt)
    assert isinstance(profiler, trt.IProfiler)
    profiler.report_layer_time("conv", 0.5)
    profiler.report_layer_time("head", 0.1)
    assert profiler.take() == [("conv", 0.5), ("head", 0.1)]
    assert profiler.take() == []
