import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from residual_onnx import images, quantized, residual, run

from deployopt.errors import ArtifactMismatch, BackendUnavailable, UsageError
from deployopt.graph.canonical import canonicalize
from deployopt.graph.dialects import to_unsigned
from deployopt.graph.editing import Graph
from deployopt.runtime import host
from deployopt.runtime.onnxruntime_session import QUANTIZING_WEIGHTS, create, create_exact, open_session
from deployopt.runtime.sampler import time_streams
from deployopt.runtime.saturation import SATURATION_KEY, saturates_here
from deployopt.runtime.session import SessionOptions, TensorSpec


@pytest.fixture
def path(tmp_path):
    onnx.save(canonicalize(residual()), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_infer_gives_the_models_outputs_at_any_batch(path):
    with open_session(path, SessionOptions()) as session:
        assert list(session.inputs) == [TensorSpec("image", ("batch", 3, 16, 16), "float32")]
        assert list(session.outputs) == [TensorSpec("logits", ("batch", 10), "float32")]
        assert session.provider == "CPUExecutionProvider"
        for n in (1, 2, 7, 64):
            np.testing.assert_allclose(session.infer({"image": images(n)})["logits"], run(residual(), images(n)), atol=1e-4)


def test_float_weights_behind_integers_stay_so_where_nothing_quantises_them(tmp_path):
    """As in TensorRT's dialect of a model with layers kept in float, which its provider gets after ONNX Runtime's own optimisations."""
    model, scales = quantized()
    mixed = canonicalize(model, scales=scales)
    graph = Graph(mixed.graph)
    (weight,) = [n for n in graph.nodes("DequantizeLinear") if n.input[0] == "layer1.0.conv1.weight"]
    (conv,) = graph.consumers[weight.output[0]]
    floating = np.random.default_rng(0).normal(0, 0.1, graph.constant(weight.input[0]).shape).astype(np.float32)
    graph.redirect(weight.output[0], graph.add_constant("kept.weight", floating), [conv])
    graph.finish()
    onnx.save(mixed, tmp_path / "mixed.onnx")
    stored = {}
    for name, without in (("as it is", ()), ("without", [QUANTIZING_WEIGHTS])):
        create(tmp_path / "mixed.onnx", 1, optimized=tmp_path / "optimized.onnx", without=without)
        optimized = onnx.load(tmp_path / "optimized.onnx").graph
        stored[name] = any(tuple(t.dims) == floating.shape and t.data_type == onnx.TensorProto.FLOAT for t in optimized.initializer)
    assert stored["without"]
    assert not stored["as it is"], "ONNX Runtime no longer quantises such weights: what prevents it here and in graph/dialects.py can go"


def test_outputs_and_feeds_belong_to_the_caller(path):
    with open_session(path, SessionOptions()) as session:
        feeds = [{"image": images(2, seed)} for seed in (1, 2)]
        loaded = session.load(feeds)
        first = session.infer(feeds[0])["logits"]
        kept = first.copy()
        for index in range(len(loaded)):
            loaded.run(index)
        session.infer({"image": images(2, seed=3)})
        np.testing.assert_array_equal(first, kept)
        np.testing.assert_array_equal(feeds[1]["image"], images(2, seed=2))
        assert loaded.device_ms() is None


def test_a_loaded_run_computes_the_feed_asked_for(path):
    with open_session(path, SessionOptions()) as session:
        feeds = [{"image": images(2, seed)} for seed in (1, 2)]
        loaded = session.load(feeds)
        for index in (0, 1, 2):
            loaded.run(index)
            np.testing.assert_array_equal(loaded._results["logits"].numpy(), session.infer(feeds[index % 2])["logits"])


@pytest.mark.parametrize(
    ("feed", "wanted"),
    [
        ({}, "inputs .* were given; the model takes"),
        ({"picture": images(1)}, "picture"),
        ({"image": images(1)[:, :, :8]}, r"takes float32 .*found float32 \[1, 3, 8, 16\]"),
        ({"image": images(1).astype(np.float64)}, "found float64"),
        ({"image": images(1)[:0]}, r"found float32 \[0, 3"),
    ],
)
def test_feeds_that_do_not_fit_are_refused(path, feed, wanted):
    with open_session(path, SessionOptions()) as session, pytest.raises(UsageError, match=wanted):
        session.infer(feed)


def test_feeds_to_be_timed_are_of_one_shape(path):
    with open_session(path, SessionOptions()) as session:
        for feeds in ([], [{"image": images(1)}, {"image": images(2)}]):
            with pytest.raises(UsageError, match="one shape"):
                session.load(feeds)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8_fp16"])
def test_a_precision_that_would_not_be_executed_is_not_opened(path, precision):
    with pytest.raises(BackendUnavailable):
        open_session(path, SessionOptions(precision=precision))


def test_junk_is_a_mismatch_with_the_file_named(tmp_path):
    (tmp_path / "junk.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactMismatch, match=r"cannot run junk\.onnx"):
        open_session(tmp_path / "junk.onnx", SessionOptions())


def test_a_graph_that_might_saturate_is_run_exactly(tmp_path):
    model, scales = quantized(stem_limit=127)
    unsigned = to_unsigned(canonicalize(model, scales=scales))
    onnx.save(unsigned, tmp_path / "model.onnx")
    if not saturates_here():
        pytest.skip("this CPU has VNNI: nothing saturates")
    careless = create(tmp_path / "model.onnx", threads=1).run(None, {"image": images(1000)})[0]
    found = create_exact(tmp_path / "model.onnx", threads=1).run(None, {"image": images(1000)})[0]
    reference = run(unsigned, images(1000))
    assert np.abs(found - reference).max() < 0.1 * reference.std() < np.abs(careless - reference).max()
    assert (found.argmax(1) == reference.argmax(1)).mean() >= 0.99


@pytest.mark.parametrize(("architecture", "isa", "exact"), [("x86_64", ["avx2"], True), ("x86_64", ["avx2", "avx_vnni"], False), ("aarch64", ["neon"], False)])
def test_a_file_for_vnni_is_run_by_kernels_that_cannot_saturate_where_there_is_none(tmp_path, monkeypatch, architecture, isa, exact):
    """Those take u8 weights, of which each product is summed in 32 bits."""
    model, scales = quantized()
    dialect = to_unsigned(canonicalize(model, scales=scales), vnni=True)
    onnx.save(dialect, tmp_path / "model.onnx")
    monkeypatch.setattr(host, "cpu", lambda: {"architecture": architecture, "isa": isa})
    with open_session(tmp_path / "model.onnx", SessionOptions(precision="int8")) as session:
        loaded = session.load([{"image": images(1)}])
        assert ("int8_kernels" in loaded.execution()) == exact
        found = session.infer({"image": images(64)})["logits"]
    assert np.abs(found - run(dialect, images(64))).max() < 0.1 * np.abs(found).max()
    create_exact(tmp_path / "model.onnx", 1, optimized=tmp_path / "optimized.onnx")
    optimized = onnx.load(tmp_path / "optimized.onnx")
    stored = {t.name: t.data_type for t in optimized.graph.initializer}
    weights = {n.input[3]: stored[n.input[3]] for n in optimized.graph.node if n.op_type in ("QLinearConv", "QGemm")}
    (saturating,) = [p.value.split(",") for p in dialect.metadata_props if p.key == SATURATION_KEY]
    assert sum(kind == onnx.TensorProto.UINT8 for kind in weights.values()) >= (len(saturating) if exact else 0)
    assert exact or onnx.TensorProto.UINT8 not in weights.values()


def test_streams_run_one_session_at_once(path):
    with open_session(path, SessionOptions(threads=1, streams=2)) as session:
        assert session.streams == 2
        streams = [session.load([{"image": images(2, seed)}]) for seed in (1, 2)]
        assert len(time_streams(streams, 20).host_ns) == 20
        np.testing.assert_allclose(session.infer({"image": images(2)})["logits"], run(residual(), images(2)), atol=1e-4)


@pytest.mark.parametrize(("threads", "told"), [(1, {}), (2, {"waiting_threads": "spin"})])
def test_how_threads_wait_is_told(path, threads, told):
    with open_session(path, SessionOptions(threads=threads)) as session:
        assert session.load([{"image": images(1, 0)}]).execution() == told


def test_importing_onnx_runtime_reports_nothing(tmp_path):
    """Its import alone writes an identity into the cache folder and reports to its maker, unless that is turned off."""
    code = "from deployopt.runtime.onnxruntime_session import load_vendor; load_vendor().get_available_providers()"
    home = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"} | {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=home, check=True)
    assert [p.name for p in tmp_path.rglob("*")] == []
