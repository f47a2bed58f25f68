"""ONNX Runtime's GPU providers as backends: named, probed and prepared anywhere; built where there is a GPU."""

from dataclasses import replace

import onnx
import pytest
from residual_onnx import LAYERS, quantized, residual

from deployopt import backends
from deployopt.backends import BuildRequest, _onnx, _onnxruntime_tensorrt
from deployopt.backends.onnxruntime import layers_by_precision
from deployopt.bench.targets import Target, describe
from deployopt.errors import BackendUnavailable, UsageError
from deployopt.graph.canonical import canonicalize
from deployopt.graph.casts import cast
from deployopt.runtime.hashing import sha256_file
from deployopt.runtime.onnxruntime_gpu import PROFILE
from deployopt.runtime.onnxruntime_session import PROVIDER
from deployopt.runtime.progress import SilentProgress

NAMES = ("onnxruntime-cuda", "onnxruntime-tensorrt")


def typed(precision):
    model = canonicalize(residual())
    return model if precision == "fp32" else cast(model, precision)


def test_providers_are_backends_of_their_own():
    assert {"onnxruntime", "openvino", *NAMES} <= set(backends.names())
    assert [backends.find(name).__name__.rpartition(".")[2] for name in NAMES] == ["_onnxruntime_cuda", "_onnxruntime_tensorrt"]
    assert backends.asked("onnxruntime", {}) == ["onnxruntime"]
    assert backends.asked("onnxruntime", {"providers": ["tensorrt", "cpu"]}) == ["onnxruntime-tensorrt", "onnxruntime"]
    assert [backends.runtime_of(name) for name in ("onnxruntime-cuda", "tensorrt_rtx")] == ["onnxruntime", "tensorrt_rtx"]
    with pytest.raises(UsageError, match="did you mean 'onnxruntime-cuda'"):
        backends.find("onnxruntime-cudo")


@pytest.mark.parametrize(("name", "offered"), [(NAMES[0], {"fp32", "fp16"}), (NAMES[1], {"fp32", "fp16", "bf16", "int8", "int8_fp16"})])
def test_probe_tells_what_would_run_and_what_to_install(name, offered):
    found = backends.find(name).probe()
    assert found.version
    assert {precision for precision, reason in found.precisions.items() if reason is None} == offered
    assert found.runs == found.builds == (found.reason is None) == (found.remedy is None)


@pytest.mark.parametrize("name", NAMES)
def test_both_take_the_canonical_placement(tmp_path, name):
    model, scales = quantized()
    onnx.save(canonicalize(model, scales=scales), tmp_path / "canonical.onnx")
    prepared = backends.find(name).prepare(tmp_path / "canonical.onnx", "int8", tmp_path / "prepared.onnx")
    assert onnx.load(prepared) == onnx.load(tmp_path / "canonical.onnx")
    if name == "onnxruntime-tensorrt":
        assert sha256_file(prepared) == sha256_file(tmp_path / "canonical.onnx")


@pytest.mark.parametrize("name", NAMES)
def test_without_a_gpu_a_build_says_what_is_missing(tmp_path, name):
    backend = backends.find(name)
    if backend.probe().builds:
        pytest.skip(f"{name} works here")
    onnx.save(canonicalize(residual()), tmp_path / "prepared.onnx")
    (tmp_path / "out").mkdir()
    with pytest.raises(BackendUnavailable, match=r"is built without .*ExecutionProvider|NVIDIA driver|does not load") as caught:
        backend.build(tmp_path / "prepared.onnx", tmp_path / "out", BuildRequest("fp32"), SilentProgress())
    assert "pip install" in caught.value.remedy or "driver" in caught.value.remedy


def test_tensorrt_is_given_one_profile_which_every_session_opens_with(tmp_path):
    """All of a build but the provider, whose place the CPU's takes."""
    onnx.save(canonicalize(residual()), tmp_path / "prepared.onnx")
    profile = _onnxruntime_tensorrt.profile_of(tmp_path / "prepared.onnx", (8, 1))
    assert {name: (bounds["min"][0], bounds["opt"][0], bounds["max"][0]) for name, bounds in profile.items()} == {"image": (1, 8, 8)}
    assert profile["image"]["max"][1:] == [d.dim_value for d in residual().graph.input[0].type.tensor_type.shape.dim][1:]
    (tmp_path / "out").mkdir()
    built = _onnx.build(
        tmp_path / "prepared.onnx",
        tmp_path / "out",
        BuildRequest("fp32", (8, 1)),
        SilentProgress(),
        counter="deployopt.backends.onnxruntime:count_layers",
        runtime="onnxruntime-tensorrt",
        provider=PROVIDER,
        options={PROFILE: profile},
    )
    assert built.metadata["options"] == {PROFILE: profile}
    target = Target("model", built.path, "onnxruntime-tensorrt", "fp32", built.metadata["options"])
    assert target.session_options(1, "cuda").extra[PROFILE] == profile
    assert (describe(target).max_batch, describe(replace(target, options={})).max_batch) == (8, None)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_float_layers_are_counted_by_the_type_of_their_weights(tmp_path, precision):
    onnx.save(typed(precision), tmp_path / "optimized.onnx")
    assert layers_by_precision(tmp_path / "optimized.onnx") == {precision: LAYERS}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_layer_runs_on_the_gpu(tmp_path, precision):
    backend = backends.find("onnxruntime-cuda")
    if not backend.probe().builds:
        pytest.skip(f"onnxruntime-cuda does not run here: {backend.probe().reason}")
    onnx.save(typed(precision), tmp_path / "prepared.onnx")
    (tmp_path / "out").mkdir()
    artifact = backend.build(tmp_path / "prepared.onnx", tmp_path / "out", BuildRequest(precision), SilentProgress())
    assert artifact.metadata["verified"]["executed"] == {precision: LAYERS}
