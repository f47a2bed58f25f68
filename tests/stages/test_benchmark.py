import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_onnx
from pydantic import ValidationError

from deployopt.artifact import Artifact
from deployopt.bench import targets
from deployopt.bench.targets import opener
from deployopt.errors import OptionRefused
from deployopt.report import summary
from deployopt.runtime.progress import SilentProgress
from deployopt.stages import Expansion, Planning, Point, StageContext, StepOutput, benchmark
from deployopt.tasks import classification

DENSE = Point("torch", "dense", "float", step="00-finetune")
QAT = Point("torch", "qat", "int8", step="01-qat")
START = Point("torch", "start", "float", fans_out=False, step="00-start")
CANONICAL = Point("onnx", "dense", "float", precision="fp32", step="02-export")


def built(variant, precision, step, backend="onnxruntime"):
    return Point("engine", variant, "int8" if precision == "int8" else "float", precision=precision, backend=backend, step=step)


class Split:
    def __init__(self, n):
        rng = np.random.default_rng(n)
        self._images = rng.integers(0, 256, (n, 16, 16, 3), np.uint8)
        self.targets = rng.integers(0, 10, n)

    def __len__(self):
        return len(self._images)

    def images(self, indices):
        return self._images[np.asarray(indices)]


@pytest.fixture
def context(tmp_path, monkeypatch):
    """A run whose sessions are the tests' own: NaN outputs for "nan", OpenVINO for "real_openvino", ONNX Runtime for all others, "torch" included."""
    names = {"nan": "worker_openers:NanSession", "tensorrt": "worker_openers:GraphSession", "real_openvino": "deployopt.runtime.openvino_session:open_session"}
    monkeypatch.setattr(targets, "opener", lambda backend: names.get(backend, "worker_openers:OnnxRuntimeSession"))
    (tmp_path / "step").mkdir()
    dataset = SimpleNamespace(test=Split(40), classes=tuple("0123456789"))
    return StageContext(
        folder=tmp_path / "step",
        name="benchmark",
        base={},
        seed=0,
        device="cpu",
        threads=1,
        processes=1,
        task=classification,
        dataset=lambda: dataset,
        progress=SilentProgress(),
        choices=None,
        run_folder=tmp_path,
    )


def output(context, point, record, **model):
    folder = context.run_folder / point.step
    folder.mkdir()
    artifacts = {"model": Artifact.of("onnx", tiny_onnx.convolution(folder / "model.onnx", **model))} if model else {}
    return StepOutput(point.step, "build", (point,), record, artifacts, folder, False, 1.0)


def config(**options):
    quiet = ("max_spread", "max_drift", "max_contention", "max_pressure", "max_steal_percent")  # not what is tested
    return benchmark.Config(min_seconds=0.1, **dict.fromkeys(quiet, 100.0), **options)


def test_expand_reads_variants_and_what_was_built():
    artifact = built("dense", "fp32", "03-build")
    (expansion,) = benchmark.expand(benchmark.Config(), Planning([START, DENSE, CANONICAL, artifact], "benchmark"))
    assert expansion.inputs == (DENSE, artifact)
    assert expansion.makes == ()


def test_batches_larger_than_anything_is_built_for_are_refused():
    points = [START, DENSE, replace(built("dense", "fp32", "03"), max_batch=8), built("dense", "fp16", "04")]
    with pytest.raises(OptionRefused, match=r"wants batches of 16, .* up to 8\n  → add 16 to build\.batch_sizes") as caught:
        benchmark.expand(benchmark.Config(batch_sizes=[1, 16]), Planning(points, "benchmark"))
    assert caught.value.option == "batch_sizes"
    assert len(benchmark.expand(benchmark.Config(batch_sizes=[8]), Planning(points, "benchmark"))) == 1


def test_config_takes_a_list_from_yaml():
    assert benchmark.Config(batch_sizes=[1, 8], min_seconds=3).batch_sizes == (1, 8)


@pytest.mark.parametrize(
    "bad", [{"batch_sizes": []}, {"batch_sizes": [0]}, {"batch_sizes": [1, 8, 1]}, {"batch_sizes": ["1"]}, {"blocks": 19}, {"min_seconds": 0}, {"repeat": 3}]
)
def test_config_is_strict(bad):
    with pytest.raises(ValidationError):
        benchmark.Config(**bad)


def test_latency_is_never_cached():
    assert benchmark.cacheable is False


@pytest.fixture
def record(context):
    """A whole benchmark: two variants, artifacts that run, one that was only built, one unavailable, one unfinished, one with NaN outputs."""
    fp32, int8 = built("dense", "fp32", "03"), built("qat", "int8", "04")
    rtx, absent, lost = built("dense", "fp16", "05", "tensorrt_rtx"), built("dense", "fp32", "06", "tensorrt"), built("qat", "int8", "07", "openvino")
    nan = built("qat", "int8", "08", "nan")
    points = (DENSE, QAT, fp32, int8, rtx, absent, lost, nan)
    verified = {"quantized_layers": 2, "quantizable_layers": 3}
    outputs = [
        output(context, DENSE, {}, layers=3),
        output(context, QAT, {}, layers=2),
        output(context, fp32, {"status": "ok"}, layers=3, channels=32),
        output(context, int8, {"status": "ok", "verified": verified}, layers=2, channels=8),
        output(context, rtx, {"status": "built", "reason": "no NVIDIA driver"}, layers=2),
        output(context, absent, {"status": "unavailable", "reason": "tensorrt is not installed"}),
        output(context, nan, {"status": "ok"}, layers=2),
    ]
    return benchmark.run(context, config(batch_sizes=(1, 2)), Expansion(inputs=points), outputs).record


@pytest.mark.slow  # twelve children and as many comparisons: about 20 s
def test_rows_are_complete(record, context):
    rows = {f"{r['variant']}/{r['backend']}/{r['precision']}/b{r['batch']}": r for r in record["rows"]}
    assert [r["batch"] for r in record["rows"]] == [1, 2] * 8
    assert {key: r["status"] for key, r in rows.items() if key.endswith("b1")} == {
        "dense/torch/fp32/b1": "ok",
        "qat/torch/fp32/b1": "ok",
        "dense/onnxruntime/fp32/b1": "ok",
        "qat/onnxruntime/int8/b1": "ok",
        "dense/tensorrt_rtx/fp16/b1": "built",
        "dense/tensorrt/fp32/b1": "unavailable",
        "qat/openvino/int8/b1": "failed",
        "qat/nan/int8/b1": "failed",
    }
    assert rows["dense/tensorrt/fp32/b2"]["reason"] == "tensorrt is not installed"
    assert rows["dense/tensorrt_rtx/fp16/b1"]["reason"] == "no NVIDIA driver"
    assert "did not finish" in rows["qat/openvino/int8/b1"]["reason"]
    assert "NaN" in rows["qat/nan/int8/b1"]["reason"]
    int8 = rows["qat/onnxruntime/int8/b1"]
    assert int8["verified"] == {"quantized_layers": 2, "quantizable_layers": 3}
    assert int8["artifact"]["path"] == "04/model.onnx"
    assert int8["speedup"] > 1
    assert int8["speedup_ci95"][0] <= int8["speedup"] <= int8["speedup_ci95"][1]
    assert (int8["speedup_best_float"], int8["speedup_best_float_ci95"]) == (int8["speedup"], int8["speedup_ci95"])
    assert int8["accuracy"]["n"] == 40
    assert {"agreement", "max_abs_diff", "torch_agreement", "torch_max_abs_diff"} <= int8["accuracy"].keys()
    assert rows["dense/onnxruntime/fp32/b2"]["speedup"] == 1.0
    assert rows["qat/torch/fp32/b1"]["options"] == {"fake_quantized": True}
    assert "agreement" in rows["qat/torch/fp32/b1"]["accuracy"]
    assert "agreement" not in rows["dense/torch/fp32/b1"]["accuracy"]
    assert sorted(record["details"]) == ["dense", "qat"]
    samples = json.loads((context.run_folder / int8["samples"]).read_text())
    assert len(samples["host_block_medians"]) == int8["contract"]["blocks"]
    assert str(context.run_folder) not in json.dumps(record)


def test_a_row_says_that_it_answers_otherwise_than_its_torch_network(context):
    context = replace(context, dataset=lambda: SimpleNamespace(test=Split(200), classes=tuple("0123456789")))
    fp32, int8 = built("dense", "fp32", "03"), built("qat", "int8", "04")
    outputs = [
        output(context, DENSE, {}, layers=1),
        output(context, QAT, {}, layers=1),
        output(context, fp32, {"status": "ok"}, layers=1),
        output(context, int8, {"status": "ok", "notes": ["a note"]}, layers=1, seed=1),
    ]
    record = benchmark.run(context, config(batch_sizes=(1, 2), profile=False), Expansion(inputs=(DENSE, QAT, fp32, int8)), outputs).record
    told = {(r["variant"], r["backend"], r["batch"]): r["notes"] for r in record["rows"]}
    share = record["rows"][-1]["accuracy"]["torch_agreement"]
    assert share < 0.99
    note = f"{100 * share:.1f} % of its answers are those of the quantised torch network; wanted 99.5 %"
    assert {key: notes for key, notes in told.items() if notes} == {("qat", "onnxruntime", batch): ["a note", note] for batch in (1, 2)}
    assert summary.notes(record["rows"])[-1] == ("qat onnxruntime int8", note)


def test_accuracy_can_be_left_out(context):
    point = replace(DENSE)
    record = benchmark.run(context, config(accuracy=False), Expansion(inputs=(point,)), [output(context, point, {}, layers=2)]).record
    assert record["rows"][0]["status"] in {"ok", "invalid"}
    assert record["rows"][0]["accuracy"] is None
    assert record["details"] == {}


def test_an_engine_is_timed_and_scored_only_at_batches_it_was_built_for(context):
    free, engine = built("dense", "fp32", "03"), built("dense", "fp32", "04", "tensorrt")
    outputs = [
        output(context, DENSE, {}, layers=1),
        output(context, free, {"status": "ok"}, layers=1),
        output(context, engine, {"status": "ok", "max_batch": 2, "notes": ["a note"]}, layers=1, batch=2),
    ]
    record = benchmark.run(context, config(batch_sizes=(2, 4)), Expansion(inputs=(DENSE, free, engine)), outputs).record
    rows = {(r["backend"], r["batch"]): r for r in record["rows"]}
    assert {key: r["status"] for key, r in rows.items() if key[0] != "torch"} == {
        ("onnxruntime", 2): "ok",
        ("onnxruntime", 4): "ok",
        ("tensorrt", 2): "ok",
        ("tensorrt", 4): "failed",
    }
    assert rows["tensorrt", 4]["reason"] == "it was built for batches up to 2\n  → add 4 to build.batch_sizes"
    assert rows["tensorrt", 4]["latency_ms"] is None
    assert rows["tensorrt", 2]["accuracy"]["n"] == 40
    assert rows["tensorrt", 2]["notes"] == ["a note"]
    assert rows["onnxruntime", 4]["contract"]["interleaved_with"] == ["dense/torch/fp32"]


@pytest.mark.parametrize("wanted", [False, True])
def test_a_cuda_graph_is_asked_of_tensorrt_alone_and_the_contract_says_what_came_of_it(context, wanted):
    free, engine = built("dense", "fp32", "03"), built("dense", "fp32", "04", "tensorrt")
    outputs = [
        output(context, DENSE, {}, layers=1),
        output(context, free, {"status": "ok"}, layers=1),
        output(context, engine, {"status": "ok", "options": {"tf32": False}}, layers=1),
    ]
    record = benchmark.run(context, config(accuracy=False, cuda_graph=wanted), Expansion(inputs=(DENSE, free, engine)), outputs).record
    _, other, row = record["rows"]
    assert row["options"] == {"tf32": False, **({"cuda_graph": True} if wanted else {})}
    assert row["contract"]["cuda_graph"] == ("on" if wanted else "off")
    assert "cuda_graph" not in {**other["options"], **other["contract"]}


def test_a_a_repeats_are_stored_with_the_row(context):
    record = benchmark.run(context, config(aa_repeats=1, accuracy=False), Expansion(inputs=(DENSE,)), [output(context, DENSE, {}, layers=2)]).record
    (row,) = record["rows"]
    assert [len(values) for values in row["noise"].values()] == [3, 3, 1]
    assert row["noise"]["p50_ms"][0] == row["latency_ms"]["host"]["p50"]


def test_offline_and_other_threads_are_rows_of_their_own(context):
    onnxruntime, openvino = built("dense", "fp32", "03"), built("dense", "fp32", "04", "real_openvino")
    outputs = [
        output(context, DENSE, {}, layers=1),
        output(context, onnxruntime, {"status": "ok"}, layers=1),
        output(context, openvino, {"status": "ok"}, layers=1),
    ]
    settings = config(scenarios=["offline", "single_stream"], threads=[2], accuracy=False)
    record = benchmark.run(context, settings, Expansion(inputs=(DENSE, onnxruntime, openvino)), outputs).record
    rows = {(r["backend"], r["sweep"]): r for r in record["rows"]}
    assert [r["sweep"] for r in record["rows"]] == ["", "offline", "t2", "offline-t2"] * 3
    assert {r["status"] for r in record["rows"]} == {"ok"}
    offline, single = rows["real_openvino", "offline-t2"], rows["real_openvino", "t2"]
    assert (offline["scenario"], offline["threads"], offline["contract"]["streams"]) == ("offline", 2, 2)
    assert (single["scenario"], single["threads"], single["contract"]["streams"]) == ("single_stream", 2, 1)
    assert offline["notes"] == []
    assert offline["throughput_ci95"][0] <= offline["throughput_ci95"][1]
    assert offline["samples"] == "samples/dense-real_openvino-fp32-b1-offline-t2.json"
    assert rows["onnxruntime", "offline-t2"]["contract"]["streams"] == 1
    assert "one stream only" in rows["onnxruntime", "offline-t2"]["notes"][0]
    assert rows["onnxruntime", "offline"]["speedup"] == 1.0


@pytest.mark.parametrize("bad", [{"scenarios": ["offline"]}, {"scenarios": ["server"]}, {"threads": [0]}, {"threads": [2, 2]}])
def test_sweeps_are_strict(bad):
    with pytest.raises(ValidationError):
        benchmark.Config(**bad)


@pytest.fixture
def profiling(context, monkeypatch):
    """A run's context, in which backends are those of their names."""
    monkeypatch.setattr(targets, "opener", lambda backend: f"deployopt.backends.{backend}:open")
    return context


def test_each_artifact_is_profiled_once_where_its_runtime_tells(profiling):
    points = (built("dense", "fp32", "03"), built("dense", "fp32", "04", "openvino"))
    outputs = [output(profiling, point, {"status": "ok"}, layers=2) for point in points]
    settings = config(batch_sizes=(2, 1), scenarios=["single_stream", "offline"], accuracy=False)
    rows = benchmark.run(profiling, settings, Expansion(inputs=points), outputs).record["rows"]
    found = {(r["backend"], r["batch"], r["sweep"]): r["profile"] for r in rows if r["profile"]}
    assert list(found) == [("onnxruntime", 1, ""), ("openvino", 1, "")]
    for profile in found.values():
        assert {"c0", "c1"} <= {node for layer in profile["layers"] for node in layer["nodes"]}
        assert sum(layer["time_us"] for layer in profile["layers"]) == pytest.approx(profile["total_us"], abs=0.1)


def test_profiles_can_be_left_out(profiling):
    artifact = built("dense", "fp32", "03")
    outputs = [output(profiling, artifact, {"status": "ok"}, layers=1)]
    (row,) = benchmark.run(profiling, config(accuracy=False, profile=False), Expansion(inputs=(artifact,)), outputs).record["rows"]
    assert row["status"] == "ok"
    assert row["profile"] is None


def test_a_profiler_that_crashes_costs_neither_latency_nor_accuracy(context, monkeypatch):
    monkeypatch.setattr(targets, "opener", lambda backend: "worker_openers:CrashingProfile")
    (row,) = benchmark.run(context, config(), Expansion(inputs=(DENSE,)), [output(context, DENSE, {}, layers=1)]).record["rows"]
    assert row["status"] == "ok"
    assert row["accuracy"]["n"] == 40
    assert row["profile"] is None
    assert "its layers could not be timed: profiling" in row["notes"][0]


def test_compiled_rows_stand_beside_the_eager_ones_of_float_variants(context):
    record = {"status": "ok", "provider": "CPUExecutionProvider", "options": {}}
    outputs = [output(context, point, {}, seed=seed) for seed, point in enumerate((DENSE, QAT))]
    engine = built("dense", "fp32", "03-build")
    outputs.append(output(context, engine, record, seed=0))
    result = benchmark.run(context, config(torch_compile=True), Expansion(inputs=(DENSE, QAT, engine)), outputs)
    rows = {(r["variant"], r["backend"]): r for r in result.record["rows"]}
    assert set(rows) == {("dense", "torch"), ("qat", "torch"), ("dense", "torch-compile"), ("dense", "onnxruntime")}
    assert {r["status"] for r in rows.values()} == {"ok"}
    compiled = rows["dense", "torch-compile"]
    assert compiled["speedup"] == 1.0
    assert [note.partition(", which compiles, took ")[0] for note in compiled["notes"]] == ["its first inference at batch 1"]
    assert rows["dense", "torch"]["notes"] == []


def test_without_a_compiler_the_compiled_row_is_unavailable_with_the_remedy(context, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(targets, "opener", opener)
    monkeypatch.setenv("CXX", "no-such-compiler")
    settings = config(torch_compile=True, accuracy=False)
    result = benchmark.run(context, settings, Expansion(inputs=(DENSE,)), [output(context, DENSE, {}, seed=0)])
    (row,) = [r for r in result.record["rows"] if r["backend"] == "torch-compile"]
    assert row["status"] == "unavailable"
    assert row["reason"] == "torch.compile needs a compiler, and 'no-such-compiler' is not found\n  → apt-get install g++, or name another in CXX"
