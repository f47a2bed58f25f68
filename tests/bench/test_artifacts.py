import json

import numpy as np
import onnx
import pytest
import residual_onnx
import stored_runs
import tiny_onnx

from deployopt import backends
from deployopt.bench import artifacts as bench_files
from deployopt.bench.artifacts import bench_artifacts
from deployopt.bench.images import SYNTHETIC
from deployopt.bench.targets import precision_of, resolve
from deployopt.errors import ArtifactCorrupt, ArtifactMismatch, BuildFailed, UsageError
from deployopt.graph.canonical import canonicalize
from deployopt.runtime.hashing import sha256_file
from deployopt.runtime.progress import SilentProgress


@pytest.fixture
def onnxruntime_opener(monkeypatch):
    """Opens with the tests' own session, so that this room's tests do not depend on a backend's."""
    monkeypatch.setattr(bench_files, "opener", lambda backend: "worker_openers:OnnxRuntimeSession")


@pytest.fixture
def no_vendor(monkeypatch):
    monkeypatch.setattr(bench_files, "opener", lambda backend: "worker_openers:missing")


def bench(*paths, **options):
    return bench_artifacts(paths, progress=SilentProgress(), seconds=0.1, **options)


def assert_as_fast(row):
    """As the first row, whatever runs beside the tests: a wrong unit or pairing is further off than that."""
    low, high = row.speedup_ci95
    assert low <= row.speedup <= high
    assert 1 / 3 < row.speedup < 3


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
    assert {"cpu", "gpus", "os", "versions"} <= rows[3].contract["environment"].keys()
    assert any(rows[3].contract["environment"]["versions"][name] for name in ("onnxruntime", "onnxruntime-gpu"))


@pytest.mark.usefixtures("onnxruntime_opener")
def test_the_same_file_twice_is_an_a_a_comparison(model):
    rows = bench(model, model)
    assert [r.variant for r in rows] == ["tiny#1", "tiny#2"]
    assert_as_fast(rows[1])


@pytest.mark.usefixtures("onnxruntime_opener")
def test_a_row_of_a_run_is_found_and_verified(tmp_path, model):
    artifact = {"path": "tiny.onnx", "sha256": sha256_file(model), "bytes": model.stat().st_size}
    row = {"variant": "qat", "backend": "onnxruntime", "precision": "int8", "batch": 1, "status": "ok", "artifact": artifact}
    (tmp_path / "report.json").write_text(json.dumps({"schema": 1, "variants": [], "rows": [row]}))
    (found,) = bench(f"{tmp_path}:qat/onnxruntime/int8/b1")
    assert (found.variant, found.backend, found.precision) == ("qat/onnxruntime/int8", "onnxruntime", "int8")
    with pytest.raises(UsageError, match="did you mean 'qat/onnxruntime/int8/b1'"):
        bench(f"{tmp_path}:qat/onnxruntme/int8/b1")
    model.write_bytes(model.read_bytes() + b"x")
    with pytest.raises(ArtifactCorrupt):
        bench(f"{tmp_path}:qat/onnxruntime/int8/b1")


def test_weights_beside_an_onnx_file_belong_to_it(tmp_path, model):
    """Of a file and of a row, whose bytes the report vouches for; also where the runtime is asked what it executes."""
    typed = onnx.load(quantizing_its_input_alone(model, tmp_path / "typed.onnx"))
    split, weights = tmp_path / "split.onnx", tmp_path / "split.data"
    onnx.save(typed, str(split), save_as_external_data=True, location=weights.name, size_threshold=100)
    (found,) = bench(split)
    assert found.artifact["bytes"] == split.stat().st_size + weights.stat().st_size
    assert found.verified["executed"] == {"fp32": 3}
    row = {"variant": "v", "backend": "onnxruntime", "precision": "int8", "batch": 1, "status": "ok", "artifact": found.artifact}
    (tmp_path / "report.json").write_text(json.dumps({"schema": 1, "variants": [], "rows": [row]}))
    address = f"{tmp_path}:v/onnxruntime/int8/b1"
    assert resolve(address).path == split
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(ArtifactCorrupt, match="wanted sha256"):
        resolve(address)
    weights.unlink()
    with pytest.raises(ArtifactCorrupt, match=r"split\.onnx: it keeps weights in split\.data, missing"):
        bench(split)


@pytest.fixture
def swept_run(tmp_path, model):
    artifact = {"path": "tiny.onnx", "sha256": sha256_file(model), "bytes": model.stat().st_size}
    row = {"variant": "qat", "backend": "onnxruntime", "precision": "int8", "status": "ok", "artifact": artifact, "threads": 2}
    offline = {**row, "batch": 2, "scenario": "offline", "sweep": "offline-t1", "threads": 1}
    rows = [{**row, "batch": 1}, {**row, "batch": 2}, offline]
    (tmp_path / "report.json").write_text(json.dumps({"schema": 1, "variants": [], "rows": rows}))
    return f"{tmp_path}:qat/onnxruntime/int8"


@pytest.mark.usefixtures("onnxruntime_opener")
def test_an_address_names_batch_scenario_and_threads(swept_run, model):
    row, file = bench(f"{swept_run}/b2/offline-t1", model)
    assert {(r.batch, r.scenario, r.threads, r.contract["inputs"]["shape"][0]) for r in (row, file)} == {(2, "offline", 1, 2)}
    (row,) = bench(swept_run, threads=1)
    assert (row.batch, row.scenario) == (1, "single_stream")


@pytest.mark.parametrize(
    ("ends", "options", "said"),
    [
        (["/b2"], {"batch_sizes": (1,)}, "wanted one --batch for all artifacts, found 1 and 2: --batch and the addresses disagree"),
        (["/b2"], {"scenario": "offline"}, "wanted one --scenario for all artifacts, found offline and single_stream"),
        (["/b2/offline-t1"], {"threads": 2}, "wanted one --threads for all artifacts, found 2 and 1"),
        (["/b1", "/b2"], {}, "wanted one --batch for all artifacts, found 1 and 2: the addresses disagree"),
    ],
)
def test_an_address_that_contradicts_an_option_is_refused(swept_run, ends, options, said):
    with pytest.raises(UsageError, match=said):
        bench(*(f"{swept_run}{end}" for end in ends), **options)


@pytest.mark.usefixtures("onnxruntime_opener")
def test_given_images_are_used(model):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    (row,) = bench(model, images=images)
    assert row.contract["inputs"] == {"buffers": 8, "shape": [1, 16, 16, 3], "types": ["float32"], "images": 5, "source": "images that were given"}


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
    with pytest.raises(UsageError, match=r"known: .onnx, .engine, .plan, .engine.xz, model.safetensors"):
        bench(unknown)
    with pytest.raises(UsageError, match="wanted a run folder"):
        bench(f"{tmp_path}:qat/openvino/int8/b1")


def test_precision_is_read_from_the_graph(tmp_path):
    assert precision_of(tiny_onnx.convolution(tmp_path / "a.onnx")) == "fp32"
    assert precision_of(tiny_onnx.convolution(tmp_path / "b.onnx", dtype=np.float16)) == "fp16"
    model = onnx.load(tmp_path / "a.onnx")
    model.graph.node[0].op_type = "QLinearConv"
    onnx.save(model, tmp_path / "c.onnx")
    assert precision_of(tmp_path / "c.onnx") == "int8"
    half = onnx.load(tmp_path / "b.onnx")
    half.graph.node[0].op_type = "QLinearConv"
    onnx.save(half, tmp_path / "e.onnx")
    assert precision_of(tmp_path / "e.onnx") == "int8_fp16"
    constants = onnx.load(tmp_path / "b.onnx")
    for weight in constants.graph.initializer:
        constants.graph.node.insert(0, onnx.helper.make_node("Constant", [], [weight.name], value=weight))
    del constants.graph.initializer[:]
    onnx.save(constants, tmp_path / "f.onnx")
    assert precision_of(tmp_path / "f.onnx") == "fp16"
    (tmp_path / "d.onnx").write_bytes(b"not a model")
    with pytest.raises(ArtifactMismatch, match="not an ONNX model"):
        precision_of(tmp_path / "d.onnx")


def quantizing_its_input_alone(model, path):
    """The model of `tiny_onnx.convolution` behind Q/DQ of its input: typed as INT8, with every weight in float; returns `path`."""
    typed = onnx.load(model)
    operands = [onnx.numpy_helper.from_array(np.float32(1 / 127), "scale"), onnx.numpy_helper.from_array(np.int8(0), "zero")]
    typed.graph.initializer.extend(operands)
    typed.graph.node[0].input[0] = "dequantized"
    typed.graph.node.insert(0, onnx.helper.make_node("QuantizeLinear", ["input", "scale", "zero"], ["quantized"]))
    typed.graph.node.insert(1, onnx.helper.make_node("DequantizeLinear", ["quantized", "scale", "zero"], ["dequantized"]))
    onnx.save(typed, path)
    return path


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_int8_files_tell_what_the_runtime_executes_in_int8(tmp_path, model, backend):
    quantized, scales = residual_onnx.quantized()
    onnx.save(canonicalize(quantized, scales=scales), tmp_path / "canonical.onnx")
    whole = backends.find(backend).prepare(tmp_path / "canonical.onnx", "int8", tmp_path / "whole.onnx")
    typed = quantizing_its_input_alone(model, tmp_path / "typed.onnx")
    rows = bench(whole, typed, model, backend=backend, batch_sizes=(1, 2))
    told = [None if row.verified is None else (row.verified["quantized_layers"], row.verified["quantizable_layers"]) for row in rows]
    assert told == [(residual_onnx.LAYERS,) * 2] * 2 + [(0, 3)] * 2 + [None] * 2
    assert [row.precision for row in rows] == ["int8"] * 4 + ["fp32"] * 2


def test_int8_that_cannot_be_verified_is_noted(tmp_path, model, monkeypatch):
    def verify(*arguments):
        raise BuildFailed("compiling it to see what runs: the child crashed (SIGSEGV)", "report it")

    monkeypatch.setattr(backends.find("onnxruntime"), "verify", verify)
    typed, plain = bench(quantizing_its_input_alone(model, tmp_path / "typed.onnx"), model)
    assert typed.status != "failed"
    assert (typed.verified, len(typed.notes)) == (None, 1)
    assert typed.notes[0].startswith("INT8 is not verified: compiling it to see what runs: the child crashed (SIGSEGV)")
    assert plain.notes == []


def test_each_set_of_options_is_verified_with_those_options_and_layers_kept_in_float_are_taken_over(tmp_path, model, monkeypatch):
    typed, module, opened = quantizing_its_input_alone(model, tmp_path / "typed.onnx"), backends.find("onnxruntime"), []
    verify = module.verify
    monkeypatch.setattr(module, "verify", lambda path, options, *rest: opened.append(options.extra) or verify(path, options, *rest))
    artifact = {"path": typed.name, "sha256": sha256_file(typed), "bytes": typed.stat().st_size}
    row = {"backend": "onnxruntime", "precision": "int8", "batch": 1, "status": "ok", "artifact": artifact}
    kept = {"quantized_layers": 1, "quantizable_layers": 3, "executed": {}, "kept_in_float": 2}
    rows = [
        {**row, "variant": "a", "options": {"x": 1}, "verified": kept},
        {**row, "variant": "b", "options": {"x": 2}},
        {**row, "variant": "c", "options": {"x": 2}},
    ]
    (tmp_path / "report.json").write_text(json.dumps({"schema": 1, "variants": [], "rows": rows}))
    found = bench(*(f"{tmp_path}:{name}/onnxruntime/int8" for name in "abc"))
    assert opened == [{"x": 1}, {"x": 2}]
    assert [r.verified.get("kept_in_float") for r in found] == [2, None, None]
    assert [r.verified["executed"] for r in found] == [{"fp32": 3}] * 3


def test_engines_are_known_by_their_manifest(tmp_path):
    (tmp_path / "model.engine").write_bytes(b"engine")
    with pytest.raises(ArtifactCorrupt, match=r"manifest model\.engine\.json is missing"):
        bench(tmp_path / "model.engine")


@pytest.mark.usefixtures("onnxruntime_opener")
def test_a_run_folder_is_everything_that_it_measured(tmp_path, model):
    run = stored_runs.around(model)
    document = json.loads((run / "report.json").read_text())
    document["rows"][0]["latency_ms"] = {"host": {"p50": 1.0}}
    (run / "report.json").write_text(json.dumps(document))
    assert [r.variant for r in bench(run)] == ["qat/onnxruntime/fp32"]


def test_outputs_that_are_no_numbers_fail_their_row_alone(tmp_path, model):
    good, bad = bench(model, tiny_onnx.computing_nan(model, tmp_path / "nan.onnx"), batch_sizes=(2,))
    assert good.latency_ms is not None
    assert (bad.status, bad.reason) == ("failed", "its outputs are NaN or infinite for batches of 2")
    assert bad.latency_ms is None


def test_every_floating_output_is_checked_and_no_other(tmp_path, model):
    integers = tiny_onnx.with_another_output(model, tmp_path / "integers.onnx", "ArgMax", axis=1)
    document = onnx.load(integers)
    document.graph.output.reverse()  # the integers first
    onnx.save(document, str(integers))
    good, bad = bench(integers, tiny_onnx.with_another_output(model, tmp_path / "nan.onnx", "Sqrt"), batch_sizes=(2,))
    assert good.latency_ms is not None
    assert (bad.status, bad.reason) == ("failed", "its outputs are NaN or infinite for batches of 2")


def test_a_batch_of_more_images_than_were_given_is_made_of_repeated_ones(tmp_path):
    fixed = tiny_onnx.convolution(tmp_path / "fixed.onnx", batch=8)
    (row,) = bench(fixed, batch_sizes=(8,), images=np.full((3, 16, 16, 3), 7, np.uint8))
    assert row.status in {"ok", "invalid"}, row.reason
    assert row.latency_ms["host"]["p50"] > 0


def test_an_empty_file_is_named(tmp_path):
    for name in ("empty.onnx", "empty.engine"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ArtifactMismatch, match=r"empty\.onnx is not an ONNX model: it holds no graph"):
        bench(tmp_path / "empty.onnx")
    with pytest.raises(ArtifactCorrupt, match=r"empty\.engine"):
        bench(tmp_path / "empty.engine")


def test_offline_compares_throughputs(model):
    row, same = bench(model, model, scenario="offline", threads=2)
    assert (row.scenario, row.threads, row.contract["streams"]) == ("offline", 2, 2)
    assert row.throughput_ci95[0] <= row.throughput_ci95[1]
    assert_as_fast(same)


@pytest.mark.usefixtures("no_vendor")
def test_a_runtime_that_is_lacking_makes_its_row_unavailable(model):
    row, other = bench(model, model)
    assert (row.status, other.status) == ("unavailable", "unavailable")
    assert "nosuch" in row.reason
