"""What can be told of ONNX Runtime's GPU providers with or without a GPU: what is missing, who computes, and the loop that copies feeds in."""

import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from residual_onnx import images, residual

from deployopt.errors import BackendUnavailable, DeployoptError, ProviderFallback, UsageError
from deployopt.graph.canonical import canonicalize
from deployopt.runtime import onnxruntime_gpu as gpu
from deployopt.runtime.onnxruntime_session import PROVIDER, create, load_vendor, open_session
from deployopt.runtime.session import SessionOptions

CPU = "CPUExecutionProvider"


@pytest.fixture
def path(tmp_path):
    onnx.save(canonicalize(residual()), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def lacks(provider):
    try:
        gpu.require(provider)
    except DeployoptError as exc:
        return exc
    return None


@pytest.mark.parametrize("provider", gpu.PROVIDERS)
def test_what_is_missing_is_said_with_what_to_install(path, provider):
    ort, missing = load_vendor(), lacks(provider)
    if missing is None:
        pytest.skip(f"{provider} works here")
    if provider in ort.get_available_providers():
        assert re.match(rf"no NVIDIA driver|the NVIDIA driver|{provider} of onnxruntime-gpu .* does not load", missing.message)
    else:
        assert f"onnxruntime {ort.__version__} is built without {provider} (it has: " in missing.message
        assert f"pip install 'onnxruntime-gpu[cuda,cudnn]=={ort.__version__}'" in missing.remedy
        assert ("tensorrt>=10,<11" in missing.remedy) == (provider == gpu.TENSORRT)
    with pytest.raises(BackendUnavailable, match=re.escape(missing.message)):
        gpu.open_session(path, provider, SessionOptions())


def test_tensorrt_is_to_be_of_the_cuda_that_onnx_runtime_is_built_for():
    built = SimpleNamespace(__version__="1.31.1", cuda_version="12.8")
    assert "pip install 'tensorrt-cu12>=10,<11'" in gpu._install(built, gpu.TENSORRT)
    assert "tensorrt" not in gpu._install(built, gpu.CUDA)


@pytest.mark.parametrize("provider", gpu.PROVIDERS)
def test_a_session_that_onnx_runtime_moved_to_the_cpu_is_refused(path, provider, monkeypatch):
    if lacks(provider) is None:
        pytest.skip(f"{provider} works here")
    monkeypatch.setattr(gpu, "require", lambda provider, device: None)  # as where everything is there and the provider fails all the same
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")
    with pytest.raises(ProviderFallback, match=f"model.onnx: {provider} did not start, and ONNX Runtime went on with "):
        gpu.create(path, provider, SessionOptions())


@pytest.mark.parametrize(
    ("registered", "assigned", "reason"),
    [
        ([gpu.CUDA, CPU], [(gpu.CUDA, "Conv 'a'"), (gpu.CUDA, "Relu 'b'")], None),
        ([CPU], [(CPU, "Conv 'a'")], f"{gpu.CUDA} did not start, and ONNX Runtime went on with {CPU}"),
        ([], [], f"{gpu.CUDA} did not start, and ONNX Runtime went on with nothing"),
        ([gpu.CUDA, CPU], [(gpu.CUDA, "Conv 'a'"), (CPU, "Cast 'b'")], f"{gpu.CUDA} takes 1 of 2 nodes, {CPU} the others: Cast 'b'"),
        ([gpu.CUDA, CPU], [(CPU, f"Cast '{i}'") for i in range(4)], f"{gpu.CUDA} takes 0 of 4 nodes, {CPU} the others: Cast '0', Cast '1', Cast '2', …"),
    ],
)
def test_who_computes_decides(registered, assigned, reason):
    assert gpu.fallback(gpu.CUDA, registered, assigned) == reason


def test_nodes_are_told_by_provider(path):
    session = create(path, 1, {gpu._RECORD: "1"})
    nodes = gpu.assignment(session)
    assert {provider for provider, _ in nodes} == {CPU}
    assert any(node.startswith("Conv '") for _, node in nodes)
    assert gpu.fallback(CPU, session.get_providers(), nodes) is None


@pytest.mark.parametrize("precision", ["bf16", "int8", "int8_fp16"])
def test_cuda_is_not_opened_in_what_it_has_no_kernels_for(path, precision):
    with pytest.raises(BackendUnavailable, match="CUDA provider has no"):
        gpu.open_session(path, gpu.CUDA, SessionOptions(precision=precision))


def test_fp32_is_not_tf32_and_tensorrt_is_allowed_what_the_graph_says():
    assert gpu.provider_options(gpu.CUDA, "fp32", 1, {}) == {"device_id": "1", "use_tf32": "0"}
    assert gpu.provider_options(gpu.TENSORRT, "fp32", 0, {}) == {"device_id": "0"}
    assert gpu.provider_options(gpu.TENSORRT, "int8_fp16", 0, {}) == {"device_id": "0", "trt_int8_enable": "1", "trt_fp16_enable": "1"}


PROFILE = {name: {"min": [1, size], "opt": [8, size], "max": [8, size]} for name, size in (("image", 3), ("mask", 1))}


def test_tensorrt_is_asked_for_one_engine_over_all_batch_sizes(path, monkeypatch):
    asked, real = [], gpu.onnxruntime_session.create
    monkeypatch.setattr(gpu, "require", lambda provider, device: None)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")
    monkeypatch.setattr(gpu.onnxruntime_session, "create", lambda *args, providers, **kw: asked.extend(providers) or real(*args, providers=[PROVIDER], **kw))
    with pytest.raises(ProviderFallback):
        gpu.open_session(path, gpu.TENSORRT, SessionOptions(extra={gpu.PROFILE: PROFILE}))
    ((provider, options),) = asked
    assert provider == gpu.TENSORRT
    assert options["trt_profile_min_shapes"] == "image:1x3,mask:1x1"
    assert options["trt_profile_opt_shapes"] == options["trt_profile_max_shapes"] == "image:8x3,mask:8x1"


def test_a_batch_for_which_onnx_runtime_would_build_another_engine_is_refused(path):
    with gpu.OnnxRuntimeGpuSession(partial(create, path, 1), 0, {"image": [4, 3, 16, 16]}) as session:
        assert len(session.infer({"image": images(4, 1)})["logits"]) == 4
        with pytest.raises(UsageError, match="a batch of 5; the engine is for up to 4"):
            session.infer({"image": images(5, 1)})


def test_a_session_is_made_by_what_it_is_given_and_again_to_be_profiled(path):
    """All of it but `load`, which needs page-locked memory; the CPU's provider takes the place of the GPU's."""
    made = partial(create, path, 1, {gpu._RECORD: "1"})
    with gpu.OnnxRuntimeGpuSession(made, 0) as session, open_session(path, SessionOptions()) as reference:
        feed = {"image": images(2, 1)}
        assert (session.provider, session.streams) == (CPU, 1)
        np.testing.assert_array_equal(session.infer(feed)["logits"], reference.infer(feed)["logits"])
        assert any(layer.kind in {"Conv", "FusedConv"} and layer.time_us > 0 for layer in session.profile([feed], 3))


def test_a_session_of_its_provider_can_be_profiled(path, tmp_path, monkeypatch):
    """What `open_session` hands on makes sessions with a profile: here until ONNX Runtime goes on without the provider."""
    if lacks(gpu.CUDA) is None:
        pytest.skip(f"{gpu.CUDA} works here")
    monkeypatch.setattr(gpu, "require", lambda provider, device: None)
    with pytest.raises(ProviderFallback):
        gpu.create(path, gpu.CUDA, SessionOptions(), optimized=tmp_path / "optimized.onnx", profile=tmp_path / "profile")
    with pytest.raises(ProviderFallback):
        gpu.open_session(path, gpu.CUDA, SessionOptions())


def test_each_run_copies_its_feed_in_and_its_results_out(path):
    with open_session(path, SessionOptions()) as session:
        feeds = [{"image": images(2, seed)} for seed in (1, 2)]
        kept = [feed["image"].copy() for feed in feeds]
        loaded = gpu.DeviceLoaded(create(path, 1, providers=[PROVIDER]), feeds, session.infer(feeds[0]), ("cpu", 0), np.copy)
        assert len(loaded) == 2
        for index in (1, 0, 3):
            loaded.run(index)
            np.testing.assert_array_equal(loaded.results["logits"], session.infer(feeds[index % 2])["logits"])
        for feed, before in zip(feeds, kept, strict=True):
            np.testing.assert_array_equal(feed["image"], before)
        assert loaded.device_ms() is None


@pytest.mark.gpu
@pytest.mark.parametrize("provider", gpu.PROVIDERS)
def test_on_a_gpu_a_session_computes_the_same_and_its_runs_copy_in_and_out(path, provider, monkeypatch):
    if missing := lacks(provider):
        pytest.skip(f"{provider} does not work here: {missing.message}")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")  # put back afterwards
    shape = images(1, 0).shape[1:]
    profile = {"image": {"min": [1, *shape], "opt": [4, *shape], "max": [4, *shape]}}
    feeds = [{"image": images(4, seed)} for seed in (1, 2)]
    with (
        open_session(path, SessionOptions()) as reference,
        gpu.open_session(path, provider, SessionOptions(device="cuda", extra={gpu.PROFILE: profile})) as session,
    ):
        assert session.provider == provider
        for feed in (*feeds, {"image": images(1, 3)}):
            np.testing.assert_allclose(session.infer(feed)["logits"], reference.infer(feed)["logits"], atol=1e-4)
        loaded = session.load(feeds)
        for index in (1, 0, 3):
            loaded.run(index)
            np.testing.assert_allclose(loaded.results["logits"], reference.infer(feeds[index % 2])["logits"], atol=1e-4)
        with pytest.raises(UsageError, match="up to 4"):
            session.infer({"image": images(5, 1)})
