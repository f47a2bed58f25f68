"""Real TensorRT-RTX builds of a small residual network, which need no GPU; `test_tensorrt_gpu.py` runs engines."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from ctypes.util import find_library
from importlib.metadata import version
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typed_onnx import CHANNELS, CLASSES, SIZE, Graph, canonical

from deployopt.artifact import Artifact
from deployopt.backends import BuildRequest, _tensorrt, tensorrt, tensorrt_rtx
from deployopt.bench import targets
from deployopt.errors import ArtifactCorrupt, ArtifactMismatch, BackendUnavailable, BuildFailed, DeployoptError, ExportFailed
from deployopt.graph.casts import cast
from deployopt.graph.tensorrt import check_tensorrt8
from deployopt.runtime import manifest
from deployopt.runtime.cuda import Gpu, find_gpu
from deployopt.runtime.hashing import sha256_bytes, sha256_file
from deployopt.runtime.preprocessing import Preprocessing
from deployopt.runtime.progress import SilentProgress
from deployopt.runtime.session import SessionOptions, TensorSpec
from deployopt.runtime.tensorrt import compute_capabilities
from deployopt.runtime.tensorrt_vendor import load_vendor


@pytest.fixture(scope="module", autouse=True)
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'deployopt[tensorrt-rtx]'")


def make(folder, precision, batch_sizes=(1, 4), **options):
    """Prepare and build into `folder`."""
    prepared = tensorrt_rtx.prepare(canonical(folder, precision), precision, folder / "model.onnx")
    options.setdefault("compute_capabilities", [8.6])
    return tensorrt_rtx.build(prepared, folder, BuildRequest(precision, batch_sizes, options=options), SilentProgress())


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    """One INT8 engine that several tests look at."""
    return make(tmp_path_factory.mktemp("int8"), "int8")


def copied(artifact, folder):
    """The engine and its manifest, to be damaged."""
    for path in (artifact.path, manifest.path_of(artifact.path)):
        shutil.copy(path, folder)
    return folder / artifact.path.name


def has_gpu():
    try:
        find_gpu()
    except DeployoptError:
        return False
    return True


def test_rtx_builds_here_and_runs_only_with_a_gpu_it_serves(rtx):
    found = tensorrt_rtx.probe()
    assert (found.builds, found.version) == (True, rtx.__version__)
    assert set(found.precisions) == {"fp32", "fp16", "bf16", "int8", "int8_fp16"}
    assert found.runs == (found.reason is None)
    if not has_gpu():
        assert found.reason.startswith("no NVIDIA driver (libcuda.so.1 not found)")


def test_a_gpu_that_rtx_does_not_serve_is_named(rtx):
    hopper, ada = Gpu("NVIDIA H100", "9.0", "13.0"), Gpu("NVIDIA GeForce RTX 4090", "8.9", "13.0")
    reason = tensorrt_rtx._unserved(rtx, [hopper, hopper])
    assert "does not run on NVIDIA H100 (compute capability 9.0); it serves 7.5, 8.0, 8.6, 8.9, 12.0" in reason
    assert tensorrt_rtx._unserved(rtx, [hopper, ada]) is None


def test_tensorrt_says_why_it_is_unavailable():
    found = tensorrt.probe()
    assert found.runs == found.builds == (found.reason is None)
    if found.version is None:
        assert "pip install 'deployopt[tensorrt]'" in found.remedy


def test_canonical_graph_is_taken_as_it_is(tmp_path):
    source = canonical(tmp_path, "int8")
    out = tensorrt_rtx.prepare(source, "int8", tmp_path / "prepared.onnx")
    assert sha256_file(out) == sha256_file(source)


def unsigned(model):
    for tensor in model.graph.initializer:
        if tensor.name == "flat_zero":
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(np.uint8(0)), tensor.name))


def asymmetric(model):
    for tensor in model.graph.initializer:
        if tensor.name == "flat_zero":
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(np.int8(5)), tensor.name))


def unsigned_by_default(model):
    for node in model.graph.node:
        if node.output[0] == "flat_q":
            del node.input[2]


def quantized_bias(model):
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(CLASSES, np.int32), "bias32"))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["bias32", "flat_scale"], ["bias"], name="flat_bias_dq"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unsigned, r"node 'flat_q_QuantizeLinear' \(QuantizeLinear\): quantised to UINT8"),
        (unsigned_by_default, "'flat_q_QuantizeLinear'.*quantised to UINT8"),
        (asymmetric, "zero point 'flat_zero' is not 0"),
        (quantized_bias, "node 'flat_bias_dq'.*'bias32' is INT32"),
    ],
)
def test_quantization_that_tensorrt_misreads_is_refused(tmp_path, damage, message):
    model = Graph("int8").model()
    damage(model)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportFailed, match=message):
        tensorrt_rtx.prepare(tmp_path / "model.onnx", "int8", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(("data", "message"), [(b"", "holds no graph"), (b"\xff not an onnx", "is not an ONNX model")])
def test_files_that_are_no_onnx(tmp_path, data, message):
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(ExportFailed, match=message):
        tensorrt_rtx.prepare(tmp_path / "model.onnx", "fp32", tmp_path / "out.onnx")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_float_engines_run_as_asked_and_fuse_their_add(tmp_path, precision):
    built = make(tmp_path, precision)
    assert built.metadata["verified"] == {"quantized_layers": 0, "quantizable_layers": 4, "executed": {precision: 4}}
    layers = built.metadata["fusion"]["layers"]  # with what casts and pools beside the four products
    assert built.metadata["fusion"] == {"adds": 1, "fused_adds": 1, "int8_to_float": 0, "reformats": 0, "layers": layers}
    assert layers[precision] >= 4
    assert set(layers) <= {precision, "fp32", "?"}
    assert built.metadata["build_seconds"] > 0


def test_tf32_is_off_unless_asked_for_and_then_said(tmp_path):
    plain, allowed = make(tmp_path_of(tmp_path, "fp32"), "fp32"), make(tmp_path_of(tmp_path, "tf32"), "fp32", tf32=True)
    assert (plain.metadata["options"]["tf32"], plain.metadata["notes"]) == (False, [])
    assert allowed.metadata["options"]["tf32"]
    assert allowed.metadata["notes"] == [_tensorrt.TF32]
    assert manifest.read(allowed.path).options["tf32"]
    assert plain.metadata["verified"] == allowed.metadata["verified"]  # TensorRT-RTX lists a TF32 layer as Float


def test_int8_engine_is_verified_and_its_float_results_are_said(int8):
    assert int8.metadata["verified"] == {"quantized_layers": 4, "quantizable_layers": 4, "executed": {"int8": 4}}
    told = {name: count for name, count in int8.metadata["fusion"].items() if name != "layers"}
    assert told == {"adds": 1, "fused_adds": 0, "int8_to_float": 2, "reformats": 0}  # not the one before pooling, nor the head
    (note,) = int8.metadata["notes"]
    assert note.startswith("2 of 4 INT8 layers write floating point that a kernel of its own quantises again")


def test_int8_with_fp16_around_it_is_built_and_its_layers_still_run_in_int8(tmp_path, int8):
    model = cast(onnx.load(int8.path.with_name("int8.onnx")), "fp16")
    onnx.save(model, tmp_path / "canonical.onnx")
    prepared = tensorrt_rtx.prepare(tmp_path / "canonical.onnx", "int8_fp16", tmp_path / "model.onnx")
    built = tensorrt_rtx.build(prepared, tmp_path, BuildRequest("int8_fp16", options={"compute_capabilities": [8.6]}), SilentProgress())
    assert built.metadata["verified"] == int8.metadata["verified"]
    assert manifest.read(built.path).precision == "int8_fp16"
    assert {spec.dtype for spec in (*built.inputs, *built.outputs)} == {"float32"}


def test_a_compressed_engine_is_the_same_to_the_byte_and_a_fraction_of_the_size(tmp_path, int8):
    request = BuildRequest("int8", (1, 4), options={"compute_capabilities": [8.6], "compress": True})
    built = tensorrt_rtx.build(int8.path.with_name("model.onnx"), tmp_path, request, SilentProgress())
    assert built.path == tmp_path / "model.engine.xz"
    described, plan = manifest.read_engine(built.path)
    assert (described.sha256, described.size_bytes) == (sha256_bytes(plan), len(plan))
    assert built.size_bytes == built.path.stat().st_size < 0.2 * len(plan)
    assert len(plan) == pytest.approx(int8.size_bytes, rel=0.01)
    assert built.metadata["verified"] == int8.metadata["verified"]
    assert targets.resolve(built.path).precision == "int8"


def test_tensorrt_8_gets_its_dialect(tmp_path, monkeypatch):
    old = ModuleType("tensorrt")
    old.Builder, old.__version__ = object, "8.6.1"
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    prepared = tensorrt.prepare(canonical(tmp_path, "int8"), "int8", tmp_path / "prepared.onnx")
    check_tensorrt8(onnx.load(prepared))
    assert "BF16" in tensorrt.probe().precisions["bf16"]
    monkeypatch.delitem(sys.modules, "tensorrt")
    if not tensorrt.probe().builds:  # without TensorRT, the dialect of 10 and later
        assert sha256_file(tensorrt.prepare(canonical(tmp_path, "int8"), "int8", tmp_path / "later.onnx")) == sha256_file(tmp_path / "int8.onnx")


def test_artifact_and_manifest_describe_the_engine(int8):
    described, plan = manifest.read_engine(int8.path)
    assert (described.sha256, described.size_bytes) == (int8.sha256, len(plan)) == (sha256_file(int8.path), int8.size_bytes)
    assert int8.inputs == described.inputs == (TensorSpec("input", ("batch", 3, SIZE, SIZE), "float32"),)
    assert int8.outputs == described.outputs == (TensorSpec("logits", ("batch", CLASSES), "float32"),)
    assert described.onnx_sha256 == sha256_file(int8.path.with_name("model.onnx"))
    assert (described.vendor, described.compute_capabilities, described.precision) == ("tensorrt_rtx", ("8.6",), "int8")
    if find_library("cudart") is None:  # then it is that of the package that comes with the extra
        assert described.cuda == ".".join(version("nvidia-cuda-runtime").split(".")[:2])
    assert (described.gpu is None) == (not has_gpu())
    assert described.options == int8.metadata["options"] == {"batch_sizes": [1, 4], "compute_capabilities": ["8.6"], "tf32": False}
    assert described.profiles[0]["input"] == {"min": (1, 3, SIZE, SIZE), "opt": (4, 3, SIZE, SIZE), "max": (4, 3, SIZE, SIZE)}
    folder = int8.path.parent
    assert Artifact.from_json(int8.to_json(folder), folder) == int8


def test_preprocessing_in_the_onnx_reaches_the_manifest(tmp_path):
    model = Graph("fp32").model()
    onnx.helper.set_model_props(model, {"deployopt.preprocessing": '{"image_size": 8, "channels": 3, "resize": null, "mean": [0.5], "std": [0.2]}'})
    onnx.save(model, tmp_path / "model.onnx")
    built = tensorrt_rtx.build(tmp_path / "model.onnx", tmp_path, BuildRequest("fp32", options={"compute_capabilities": [8.6]}), SilentProgress())
    assert manifest.read(built.path).preprocessing == Preprocessing(8, mean=(0.5,), std=(0.2,))


def test_default_targets_are_this_gpu_or_the_common_ones(tmp_path):
    prepared = tensorrt_rtx.prepare(canonical(tmp_path, "fp16"), "fp16", tmp_path / "model.onnx")
    built = tensorrt_rtx.build(prepared, tmp_path, BuildRequest("fp16"), SilentProgress())
    served = has_gpu() and find_gpu().compute_capability in compute_capabilities(load_vendor("tensorrt_rtx"))
    assert manifest.read(built.path).compute_capabilities == ((find_gpu().compute_capability,) if served else ("8.6", "8.9", "12.0"))


@pytest.mark.parametrize(
    ("precision", "options", "message"),
    [
        ("fp32", {"workspace": 3}, r"workspace: Extra inputs are not permitted \(available: tf32, compress, compute_capabilities\)"),
        ("fp32", {"compute_capabilities": ["8.6"]}, "Input should be a valid number"),
        ("fp32", {"compute_capabilities": []}, "at least 1 item"),
        ("fp32", {"compute_capabilities": [8.6, 8.6]}, "each compute capability once"),
        ("fp32", {"compute_capabilities": [9.0]}, r"does not build for compute capability 9\.0 \(it builds for 7\.5"),
        ("int8", {"compute_capabilities": [7.5, 8.6]}, r"INT8 for compute capabilities 7\.5, 8\.6: one engine for 7\.5 and others"),
    ],
)
def test_options_that_cannot_be_meant(tmp_path, precision, options, message):
    with pytest.raises(BuildFailed, match=message):
        make(tmp_path, precision, **options)
    assert not (tmp_path / "model.engine").exists()


@pytest.mark.parametrize(("options", "message"), [({"workspace_mib": 0}, "greater than or equal to 1"), ({"optimization_level": 6}, "less than or equal to 5")])
def test_tensorrt_options_are_bounded(tmp_path, options, message):
    with pytest.raises(BuildFailed, match=message):
        tensorrt.build(tmp_path / "model.onnx", tmp_path, BuildRequest("fp32", options=options), SilentProgress())


def test_int8_on_turing_alone_is_told_to_run_in_fp16(tmp_path):
    """FP32 matrix products are not built for Turing, so a convolution alone: INT8 is asked for, FP16 runs, and `verified` says so."""
    graph = Graph("int8")
    graph.conv(graph.quantized("input"), "logits", 3)
    tensors = (("input", ["batch", 3, SIZE, SIZE]), ("logits", ["batch", CHANNELS, SIZE, SIZE]))
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name, shape in tensors)
    made = helper.make_model(
        helper.make_graph(graph.nodes, "conv", inputs, outputs, graph.constants), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    onnx.save(made, tmp_path / "model.onnx")
    built = tensorrt_rtx.build(tmp_path / "model.onnx", tmp_path, BuildRequest("int8", options={"compute_capabilities": [7.5]}), SilentProgress())
    assert built.metadata["verified"]["quantized_layers"] == 0
    assert built.metadata["verified"]["quantizable_layers"] == 1


def test_batch_size_below_one(tmp_path):
    with pytest.raises(BuildFailed, match=r"batch sizes \[0, 4\]: each must be 1 or more"):
        make(tmp_path, "fp32", (0, 4))


@pytest.mark.parametrize(("here", "misfit"), [("8.6", None), ("8.9", r"built for compute capability 8\.6; here is NVIDIA RTX with compute capability 8\.9")])
def test_an_engine_for_other_gpus_than_this_machines_says_so(int8, monkeypatch, here, misfit):
    asked = []
    monkeypatch.setattr(_tensorrt, "find_gpu", lambda index: asked.append(index) or Gpu("NVIDIA RTX", here, "13.0"))
    said = _tensorrt._misfit(int8.path, "cuda:1")
    assert said is None if misfit is None else re.search(misfit, said)
    assert asked == [1]


def test_without_a_gpu_no_engine_is_called_a_misfit(int8):
    if has_gpu():
        pytest.skip("this machine has a GPU")
    assert int8.metadata["misfit"] is None


def test_a_full_disk_is_said_of_the_prepared_onnx_as_of_the_engine(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_tensorrt, "atomic_write", full)
    with pytest.raises(BuildFailed, match=r"no disk space for prepared\.onnx: wanted 0\.0 MB"):
        tensorrt_rtx.prepare(canonical(tmp_path, "fp32"), "fp32", tmp_path / "prepared.onnx")


def test_cancelled_build_leaves_nothing(tmp_path):
    class Cancelling(SilentProgress):
        def track(self, description, total):
            raise KeyboardInterrupt

    prepared = tensorrt_rtx.prepare(canonical(tmp_path, "fp32"), "fp32", tmp_path / "model.onnx")
    with pytest.raises(KeyboardInterrupt):
        tensorrt_rtx.build(prepared, tmp_path, BuildRequest("fp32", options={"compute_capabilities": [8.6]}), Cancelling())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fp32.onnx", "model.onnx"]


def deep(layers=600):
    """A network whose build takes some seconds."""
    graph = Graph("fp32")
    x = graph.conv("input", "c0", 3)
    for i in range(1, layers):
        x = graph.node("Relu", [graph.conv(x, f"c{i}", CHANNELS)], f"r{i}")
    tensors = (("input", ["batch", 3, 64, 64]), (x, ["batch", CHANNELS, 64, 64]))
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name, shape in tensors)
    made = helper.make_graph(graph.nodes, "deep", inputs, outputs, graph.constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


BUILDING = """
import signal, sys
from pathlib import Path
from deployopt.backends import BuildRequest, tensorrt_rtx
from deployopt.runtime.progress import SilentProgress

class Telling(SilentProgress):
    def track(self, description, total):
        print("building", flush=True)
        return super().track(description, total)

signal.signal(signal.SIGINT, signal.default_int_handler)
folder = Path(sys.argv[1])
request = BuildRequest("fp32", (1, 8), options={"compute_capabilities": [8.0, 8.6, 8.9, 12.0]})
tensorrt_rtx.build(folder / "model.onnx", folder, request, Telling())
print("built", flush=True)
"""


def seconds_to_end_a_build(folder, wait_s):
    """From Ctrl-C, sent `wait_s` after the build began, to the process's end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [sys.executable, "-c", BUILDING, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as building:
        assert building.stdout.readline() == "building\n"
        time.sleep(wait_s)
        start = time.monotonic()
        building.send_signal(signal.SIGINT)
        said = building.stdout.read()
        building.wait()
        seconds = time.monotonic() - start
    assert said == ""  # it was not through
    assert building.returncode != 0
    return seconds


@pytest.mark.parametrize("wait_s", [0.0, 0.3])
def test_ctrl_c_ends_a_build_within_a_second(tmp_path, wait_s):
    onnx.save(deep(), tmp_path / "model.onnx")
    assert any(seconds_to_end_a_build(tmp_path, wait_s) < 1.0 for _ in range(3))  # other tests may take both cores for a while
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_flipped_byte_is_found_before_anything_is_loaded(int8, tmp_path):
    engine = copied(int8, tmp_path)
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes(data)
    with pytest.raises(ArtifactCorrupt, match="its manifest wants sha256"):
        tensorrt_rtx.open(engine, SessionOptions())


def test_zero_byte_plan(int8, tmp_path):
    engine = copied(int8, tmp_path)
    engine.write_bytes(b"")
    with pytest.raises(ArtifactCorrupt, match="is empty"):
        tensorrt_rtx.open(engine, SessionOptions())


def test_swapped_manifest(int8, tmp_path):
    engine = copied(int8, tmp_path)
    other = make(tmp_path_of(tmp_path, "other"), "fp32")
    shutil.copy(manifest.path_of(other.path), manifest.path_of(engine))
    with pytest.raises(ArtifactCorrupt, match="or the manifest belongs to another engine"):
        tensorrt_rtx.open(engine, SessionOptions())


def tmp_path_of(folder, name):
    made = folder / name
    made.mkdir()
    return made


def test_engine_of_another_version_is_refused(int8, tmp_path):
    engine = copied(int8, tmp_path)
    manifest.write(engine, manifest.read(engine)._replace(version="1.5.0.42"))
    with pytest.raises(ArtifactMismatch, match=r"was built by tensorrt_rtx 1\.5\.0\.42") as caught:
        tensorrt_rtx.open(engine, SessionOptions())
    assert "pip install 'tensorrt-rtx-cu13==1.5.0.42'" in caught.value.remedy


def test_without_a_driver_opening_says_so(int8):
    if has_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendUnavailable, match=r"needs a GPU of compute capability 8\.6: no NVIDIA driver"):
        tensorrt_rtx.open(int8.path, SessionOptions())
