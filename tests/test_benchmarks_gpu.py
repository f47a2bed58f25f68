"""benchmarks/gpu.py as far as it goes without a GPU: the files it carries, groups timed and resumed (on ONNX Runtime), summaries, refusals."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from deployopt.errors import ArtifactCorrupt, UsageError
from deployopt.runtime.child import run_in_child
from deployopt.runtime.cuda import Gpu
from deployopt.runtime.hashing import sha256_file
from deployopt.runtime.session import SessionOptions

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
FAULTY = Path(__file__).parent / "runtime" / "faulty"
sys.path.append(str(BENCHMARKS))

import _gpu_measure  # noqa: E402
import _gpu_models  # noqa: E402
import _gpu_rows  # noqa: E402
import gpu  # noqa: E402
from _gpu_rows import Results, Samples  # noqa: E402

OPENER = "deployopt.runtime.onnxruntime_session:open_session"


@pytest.fixture
def network(tmp_path: Path) -> onnx.ModelProto:
    """Convolution, ReLU and pooling of [N, 3, 8, 8] with INT8 Q/DQ as in a canonical file: activations and weights, each with a scale of its own."""
    rng = np.random.default_rng(0)
    h, n = onnx.helper, onnx.numpy_helper.from_array
    constants = {
        "w": rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
        "w.scale": rng.uniform(0.01, 0.02, 4).astype(np.float32),
        "w.zero_point": np.zeros(4, np.int8),
        "x.scale": np.array(1 / 127, np.float32),
        "x.zero_point": np.array(0, np.int8),
    }
    nodes = [
        h.make_node("QuantizeLinear", ["input", "x.scale", "x.zero_point"], ["xq"], "q"),
        h.make_node("DequantizeLinear", ["xq", "x.scale", "x.zero_point"], ["xd"], "dq"),
        h.make_node("DequantizeLinear", ["w", "w.scale", "w.zero_point"], ["wd"], "wdq", axis=0),
        h.make_node("Conv", ["xd", "wd"], ["y"], "conv", pads=[1] * 4),
        h.make_node("Relu", ["y"], ["z"], "relu"),
        h.make_node("GlobalAveragePool", ["z"], ["p"], "pool"),
        h.make_node("Flatten", ["p"], ["output"], "flatten"),
    ]
    value = h.make_tensor_value_info
    graph = h.make_graph(
        nodes,
        "g",
        [value("input", 1, ["batch", 3, 8, 8])],
        [value("output", 1, ["batch", 4])],
        [n(array, name) for name, array in constants.items()],
    )
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)


@pytest.fixture
def carried(tmp_path: Path, network: onnx.ModelProto) -> Path:
    """A models folder with one network, its description and samples."""
    path = tmp_path / "resnet18-dense.onnx"
    path.write_bytes(network.SerializeToString())
    (tmp_path / _gpu_models.DESCRIPTION).write_text(json.dumps({"networks": {"resnet18-dense": {"sha256": sha256_file(path)}}}))
    images = np.random.default_rng(1).integers(0, 256, (16, 8, 8, 1), np.uint8).repeat(3, axis=-1)
    _gpu_rows.write_samples(tmp_path / _gpu_rows.SAMPLES, Samples(images, np.arange(16) % 4, {}))
    return tmp_path


def outputs(path: Path, images: np.ndarray) -> np.ndarray:
    subject = _gpu_measure.Subject("one", OPENER, path, SessionOptions())
    failures: dict[str, str] = {}
    with _gpu_measure.sessions([subject], failures) as live:
        return live["one"].outputs(images, batch=8)


def test_one_carried_file_becomes_every_precision(carried: Path) -> None:
    made = {path.stem: path for path in _gpu_models.unpack(carried, "tensorrt8")}
    assert list(made) == [f"resnet18-dense-{precision}" for precision in _gpu_rows.PRECISIONS]
    operators = {stem: {node.op_type for node in onnx.load(path).graph.node} for stem, path in made.items()}
    assert "QuantizeLinear" in operators["resnet18-dense-int8"]
    assert not {"QuantizeLinear", "DequantizeLinear"} & operators["resnet18-dense-fp32"]
    images = _gpu_rows.read_samples(carried / _gpu_rows.SAMPLES).images
    fp32, int8, source = (outputs(path, images) for path in (made["resnet18-dense-fp32"], made["resnet18-dense-int8"], carried / "resnet18-dense.onnx"))
    np.testing.assert_allclose(int8, source, rtol=1e-5, atol=1e-6)
    assert np.abs(fp32 - int8).max() < 0.02 * fp32.std() + 0.02
    assert np.abs(fp32 - int8).max() > 0  # the activations are not quantised


def test_a_file_that_is_not_the_described_one_is_refused(carried: Path, network: onnx.ModelProto) -> None:
    network.producer_name = "another"
    (carried / "resnet18-dense.onnx").write_bytes(network.SerializeToString())
    with pytest.raises(ArtifactCorrupt, match=r"resnet18-dense\.onnx is not the file that models\.json describes"):
        _gpu_models.unpack(carried, "canonical")


def test_groups_are_timed_stored_and_gone_on_with(carried: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu_measure, "RUNS", 40)
    monkeypatch.setattr(gpu, "BATCH_SIZES", (1, 4))
    good, bad = _gpu_models.unpack(carried, "canonical")[0], carried / "resnet18-gone.onnx"
    samples = _gpu_rows.read_samples(carried / _gpu_rows.SAMPLES)
    samples = samples._replace(references={"resnet18-dense-fp32": outputs(good, samples.images)})
    subjects = [_gpu_measure.Subject(path.stem, OPENER, path, SessionOptions()) for path in (good, bad)]

    def rows(minutes: float) -> gpu.Rows:
        return gpu.Rows(Results(carried / "out", "test", "A GPU (80 GB)", "runtime 1"), samples, _gpu_measure.Clock(minutes))

    assert not rows(0).take("resnet18", subjects, good.stem)
    first = rows(10)
    assert first.take("resnet18", subjects, good.stem)
    assert first.results.path == carried / "out" / "a-gpu-80-gb" / "test.json"
    entry = first.results["row:resnet18-dense-fp32:b4"]
    assert entry["host_ms"]["n"] == 40
    assert len(entry["block_medians_ms"]) == 20
    assert entry["speedup"][0] == 1
    assert entry["outputs"]["top1_agreement"] == 1
    assert entry["made_of"] == {"onnx_sha256": sha256_file(good)}
    assert "gone.onnx" in first.results["row:resnet18-gone:b1"]["failed"]
    again = rows(10)
    assert again.missing("resnet18") == []
    assert again.missing("resnet50") == [1, 4]
    again.results.write_summary(again.tables())
    header, _, line, failed = again.short().splitlines()
    assert [cell.strip() for cell in header.split("|")[1:-1]] == ["p50 ms, speed-up", "batch 1", "batch 4"]
    assert re.fullmatch(r"\| resnet18-dense-fp32 \| +\d+\.\d{3} 1\.00x +\| +\d+\.\d{3} 1\.00x +\|", line)
    assert failed.startswith("failed: row:resnet18-gone:b1 and 1 more: ")
    again.results.forget_failures()
    assert again.missing("resnet18") == [1, 4]
    assert again.results.failures() == {}
    summary = again.results.path.with_suffix(".md").read_text()
    assert "| resnet18-dense-fp32 | 4     |" in summary
    assert "Bodies have random weights" in summary
    assert f"NumPy {np.__version__}" in summary
    assert "- row:resnet18-gone:b1: " in summary


def test_builds_that_fail_are_stored_not_tried_again_and_taken_up_by_retry(carried: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu_models.unpack(carried, "canonical")
    spec = importlib.util.spec_from_file_location("tensorrt_rtx", FAULTY / "tensorrt_rtx.py")
    assert spec is not None
    assert spec.loader is not None
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", faulty)
    monkeypatch.syspath_prepend(str(FAULTY))  # for the children
    monkeypatch.setenv("FAULT", "no_engine")
    monkeypatch.setattr(gpu, "find_gpu", lambda: Gpu("A GPU", "8.6", "13.0"))
    monkeypatch.setattr(gpu, "VARIANTS", ("dense",))
    monkeypatch.setattr(gpu, "PRECISIONS", ("fp32", "int8"))
    built: list[str] = []
    monkeypatch.setattr(gpu, "run_in_child", lambda target, given, *rest: built.append(Path(given["onnx"]).stem) or run_in_child(target, given, *rest))
    arguments = argparse.Namespace(models=carried, out=carried / "out", archs=["resnet18"])

    def run(minutes: float = 10.0, retry: bool = False) -> tuple[bool, gpu.Engines]:
        engines = gpu.Engines("tensorrt_rtx", arguments, _gpu_measure.Clock(minutes))
        if retry:
            engines.results.forget_failures()
        return engines.run(), engines

    names = ["resnet18-dense-fp32", "resnet18-dense-int8"]
    whole, _ = run(minutes=0)
    assert (whole, built) == (False, [])
    whole, engines = run()
    assert (whole, built) == (True, names)
    failures = engines.results.failures()
    assert list(failures) == [f"build:{name}" for name in names]
    assert "no kernel image fits" in failures["build:resnet18-dense-fp32"]
    assert run()[0]
    assert built == names  # not tried again
    whole, engines = run(retry=True)
    assert (whole, built) == (True, names * 2)
    assert len(engines.short()) < 1000
    assert "failed: build:resnet18-dense-fp32 and 1 more: " in engines.short()


def test_results_of_another_runtime_are_refused(tmp_path: Path) -> None:
    Results(tmp_path, "trt86", "H100", "tensorrt 8.6.0").keep("build:x", {"failed": "why"})
    assert Results(tmp_path, "trt86", "H100", "tensorrt 8.6.0").failures() == {"build:x": "why"}
    with pytest.raises(UsageError, match=r"holds figures of tensorrt 8\.6\.0; here is tensorrt 10\.0"):
        Results(tmp_path, "trt86", "H100", "tensorrt 10.0")


@pytest.mark.parametrize("subcommand", ["trt86", "rtx", "torch", "ort"])
def test_without_what_it_needs_a_subcommand_says_so(subcommand: str, tmp_path: Path) -> None:
    root = BENCHMARKS.parent
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), subcommand, "--models", str(tmp_path), "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 3, done.stderr
    assert f"{subcommand}: " in done.stderr
    assert "→" in done.stderr
