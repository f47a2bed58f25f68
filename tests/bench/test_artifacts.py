import json

import numpy as np
import onnx
import pytest
import tiny_onnx

from deployopt.bench import artifacts as bench_files
from deployopt.bench.artifacts import SYNTHETIC, bench_artifacts, natural_noise, precision_of
from deployopt.errors import ArtifactCorrupt, ArtifactMismatch, UsageError
from deployopt.runtime.hashing import sha256_file
from deployopt.runtime.progress import SilentProgress


@pytest.fixture
def onnxruntime_opener(monkeypatch):
    """Opens with the tests' own session, so that this room's tests do not depend on a backend's."""
    monkeypatch.setattr(bench_files, "opener", lambda backend: "worker_openers:OnnxRuntimeSession")


@pytest.fixture
def model(tmp_path):
    return tiny_onnx.convolution(tmp_path / "tiny.onnx")


def bench(*paths, **options):
    return bench_artifacts(paths, progress=SilentProgress(), seconds=0.1, **options)


@pytest.mark.usefixtures("onnxruntime_opener")
def test_files_are_compared_with_the_first(tmp_path, model):
    big = tiny_onnx.convolution(tmp_path / "big.onnx", channels=32, layers=4, size=32)
    rows = bench(model, big, batch_sizes=(1, 2))
    assert [r.key for r in rows] == [f"{v}/onnxruntime/fp32/b{b}" for v in ("tiny", "big") for b in (1, 2)]
    assert all(r.latency_ms["host"]["p50"] > 0 for r in rows)
    assert rows[0].speedup == 1.0
    assert rows[2].speedup_ci95[1] < 1
    assert rows[0].artifact == {"path": "tiny.onnx", "sha256": sha256_file(model), "bytes": model.stat().st_size}
    assert rows[3].contract["inputs"]["shape"] == [2, 32, 32, 3]
    assert rows[3].contract["inputs"]["source"] == SYNTHETIC


@pytest.mark.usefixtures("onnxruntime_opener")
def test_the_same_file_twice_is_an_a_a_comparison(model):
    rows = bench(model, model)
    assert [r.variant for r in rows] == ["tiny#1", "tiny#2"]
    assert rows[1].speedup == pytest.approx(1, abs=0.2)


@pytest.mark.usefixtures("onnxruntime_opener")
def test_a_row_of_a_run_is_found_and_verified(tmp_path, model):
    artifact = {"path": "tiny.onnx", "sha256": sha256_file(model), "bytes": model.stat().st_size}
    row = {"variant": "qat", "backend": "onnxruntime", "precision": "int8", "batch": 1, "status": "ok", "artifact": artifact}
    (tmp_path / "report.json").write_text(json.dumps({"rows": [row]}))
    (found,) = bench(f"{tmp_path}:qat/onnxruntime/int8/b1")
    assert (found.variant, found.backend, found.precision) == ("qat/onnxruntime/int8", "onnxruntime", "int8")
    with pytest.raises(UsageError, match="did you mean 'qat/onnxruntime/int8/b1'"):
        bench(f"{tmp_path}:qat/onnxruntme/int8/b1")
    model.write_bytes(model.read_bytes() + b"x")
    with pytest.raises(ArtifactCorrupt):
        bench(f"{tmp_path}:qat/onnxruntime/int8/b1")


@pytest.mark.usefixtures("onnxruntime_opener")
def test_given_images_are_used(model):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    (row,) = bench(model, images=images)
    assert row.contract["inputs"] == {"buffers": 8, "shape": [1, 16, 16, 3], "images": 5, "source": "images that were given"}


@pytest.mark.usefixtures("onnxruntime_opener")
def test_a_model_without_batch_axis_fails_its_row_with_the_reason(tmp_path):
    (row,) = bench(tiny_onnx.convolution(tmp_path / "fixed.onnx", batch=1), batch_sizes=(4,))
    assert row.status == "failed"
    assert "takes [1, 3, 16, 16], found images of [4, 3, 16, 16]" in row.reason


def test_what_cannot_be_opened_is_said(tmp_path):
    with pytest.raises(UsageError, match="found nothing"):
        bench(tmp_path / "absent.onnx")
    unknown = tmp_path / "model.tflite"
    unknown.write_bytes(b"")
    with pytest.raises(UsageError, match=r"known suffixes: .onnx, .engine, .plan"):
        bench(unknown)
    with pytest.raises(UsageError, match=r"no report\.json"):
        bench(f"{tmp_path}:qat/openvino/int8/b1")


def test_precision_is_read_from_the_graph(tmp_path):
    assert precision_of(tiny_onnx.convolution(tmp_path / "a.onnx")) == "fp32"
    assert precision_of(tiny_onnx.convolution(tmp_path / "b.onnx", dtype=np.float16)) == "fp16"
    model = onnx.load(tmp_path / "a.onnx")
    model.graph.node[0].op_type = "QLinearConv"
    onnx.save(model, tmp_path / "c.onnx")
    assert precision_of(tmp_path / "c.onnx") == "int8"
    (tmp_path / "d.onnx").write_bytes(b"not a model")
    with pytest.raises(ArtifactMismatch, match="not an ONNX model"):
        precision_of(tmp_path / "d.onnx")


def test_noise_is_seeded_and_smooth():
    noise = natural_noise(3, 64, 48, 3, seed=1)
    assert noise.shape == (3, 64, 48, 3)
    assert noise.dtype == np.uint8
    np.testing.assert_array_equal(noise, natural_noise(3, 64, 48, 3, seed=1))
    assert (noise[0] != noise[1]).any()
    neighbours = np.corrcoef(noise[0, :, :-1, 0].ravel(), noise[0, :, 1:, 0].ravel())[0, 1]
    assert neighbours > 0.5
