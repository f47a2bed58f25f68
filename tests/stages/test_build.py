from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from pydantic import BaseModel, ConfigDict, ValidationError
from residual_onnx import LAYERS, quantized, residual

from deployopt import backends, plugins
from deployopt.artifact import Artifact, Availability
from deployopt.bench import targets
from deployopt.data import ArraySet
from deployopt.errors import BuildFailed
from deployopt.graph.canonical import canonicalize
from deployopt.graph.casts import cast
from deployopt.runtime import host
from deployopt.runtime.preprocessing import Preprocessing
from deployopt.runtime.progress import SilentProgress
from deployopt.stages import Planning, Point, StepOutput, build
from deployopt.tasks import classification


class FakeOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    level: int = 3


class Fake:
    """A third party's backend that misbehaves on demand; its engines are ONNX files, run by ONNX Runtime."""

    opener = "worker_openers:OnnxRuntimeSession"

    distributions, build_depends_on_machine = ("numpy", "not-installed"), True
    Options = FakeOptions
    fp16 = "no FP16 unit"

    def __init__(self):
        self.probes, self.fault, self.verified, self.runs, self.requests, self.engine = 0, None, None, True, [], None
        self.told = {}

    def probe(self):
        self.probes += 1
        reason = None if self.runs else "no driver"
        return Availability(self.runs, True, "1.2", "Fake 3000", reason, {"fp32": None, "fp16": self.fp16, "int8": None})

    def prepare(self, canonical, precision, out):
        out.write_bytes(canonical.read_bytes())
        return out

    def build(self, prepared, out, request, progress):
        self.requests.append(request)
        (out / "model.engine").write_bytes(self.engine or prepared.read_bytes())
        if self.fault:
            raise self.fault
        return Artifact.of(
            "engine", out / "model.engine", metadata={"verified": self.verified, "verified_reason": "not told", "options": {"level": 3}, **self.told}
        )


@pytest.fixture
def fake(monkeypatch):
    backend = Fake()
    monkeypatch.setattr(targets, "opener", lambda name: backend.opener)
    entry = SimpleNamespace(name="fake", load=lambda: backend)
    theirs = plugins._theirs
    monkeypatch.setattr(plugins, "_theirs", lambda kind: {"fake": entry} if kind == "backends" else theirs(kind))
    return backend


def planning(*precisions):
    trunk = Point("torch", "qat", "int8", step="00")
    exported = [Point("onnx", "qat", "int8" if p == "int8" else "float", f"model_{p}", precision=p, step="01") for p in precisions]
    return Planning([trunk, *exported], "build")


def ran(tmp_path, config, expansion, model, float_layers=()):
    source, folder, logged = tmp_path / "export", tmp_path / "build", []
    source.mkdir()
    folder.mkdir()
    onnx.save(model, source / "canonical.onnx")
    artifact = Artifact.of("onnx", source / "canonical.onnx", metadata={"float_layers": list(float_layers)})
    (point,) = expansion.inputs
    given = StepOutput("01", "export", (point,), {}, {point.artifact: artifact}, source, False, 0.0)
    progress = SilentProgress()
    progress.log = logged.append
    images = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8)
    dataset = SimpleNamespace(validation=ArraySet(images, np.arange(24) % 10, Preprocessing(16)))
    context = SimpleNamespace(folder=folder, threads=1, device="cpu", progress=progress, dataset=lambda: dataset, task=classification)
    return build.run(context, config, expansion, [given]), folder, logged


def canonical():
    model, scales = quantized()
    return canonicalize(model, scales=scales)


def test_one_step_for_each_model_and_backend(fake):
    config = build.Config(backends=["fake", "onnxruntime"])
    steps = build.expand(config, planning("fp32", "fp16", "int8"))
    assert [s.label for s in steps] == [f"qat-{b}-{p}" for b in ("fake", "onnxruntime") for p in ("fp32", "fp16", "int8")]
    assert [s.why_not for s in steps[:3]] == [None, "no FP16 unit", None]
    assert "FP32" in steps[4].why_not
    assert steps[2].makes == (Point("engine", "qat", "int8", "model", precision="int8", backend="fake", max_batch=8),)
    assert steps[0].parameters["runtime"] == "1.2"
    assert steps[0].parameters["device"] == "Fake 3000"
    assert steps[0].parameters["distributions"] == {"numpy": version("numpy"), "not-installed": None}
    assert "device" not in steps[3].parameters
    assert fake.probes == 1


def test_each_provider_has_rows_of_its_own():
    config = build.Config(backends=["onnxruntime"], options={"onnxruntime": {"providers": ["cpu", "cuda", "tensorrt"]}})
    steps = build.expand(config, planning("fp32", "int8"))
    labels = [f"qat-{b}-{p}" for b in ("onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt") for p in ("fp32", "int8")]
    assert [s.label for s in steps] == labels
    assert [s.makes[0].backend for s in steps[::2]] == ["onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt"]
    assert steps[0].why_not is None
    for step in steps[2:]:
        if step.why_not and step.parameters["backend"] == "onnxruntime-cuda" and backends.find("onnxruntime-cuda").probe().builds:
            assert "no INT8 convolution" in step.why_not
        elif step.why_not:
            probed = backends.find(step.parameters["backend"]).probe()
            assert step.why_not == f"{probed.reason}: {probed.remedy}"


def test_the_cpu_provider_builds_beside_others(tmp_path):
    config = build.Config(backends=["onnxruntime"], options={"onnxruntime": {"providers": ["cuda", "cpu"]}})
    (step,) = [s for s in build.expand(config, planning("fp32")) if s.parameters["backend"] == "onnxruntime"]
    result, _, _ = ran(tmp_path, config, step, residual())
    assert (result.record["status"], result.record["provider"]) == ("ok", "CPUExecutionProvider")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("isa", "given", "wanted"), [("avx2", None, False), ("avx512_vnni", None, True), ("avx512_vnni", False, False), ("avx2", True, True)])
def test_int8_is_keyed_and_built_for_this_machines_cpu_or_the_one_asked_for(tmp_path, monkeypatch, backend, isa, given, wanted):
    facts = host.cpu()
    monkeypatch.setattr(host, "cpu", lambda: {**facts, "architecture": "x86_64", "isa": ["avx2", isa]})
    config = build.Config(backends=[backend], options={backend: {} if given is None else {"vnni": given}})
    floating, int8 = build.expand(config, planning("fp32", "int8"))
    assert (floating.parameters["options"], int8.parameters["options"]) == ({}, {"vnni": wanted})
    result, folder, _ = ran(tmp_path, config, int8, canonical())
    clips = [n for n in onnx.load(folder / "model.onnx").graph.node if n.op_type == "Clip"]
    assert bool(clips) is not wanted
    assert result.record["notes"] == ([f"its INT8 is for CPUs with VNNI: for x86 CPUs without, set build.options.{backend}.vnni: false"] if wanted else [])
    refused = backend == "openvino" and isa == "avx2" and wanted
    assert result.record["status"] == ("built" if refused else "ok")
    assert (result.record["reason"] is not None) == refused
    assert result.record["verified"]["quantized_layers"] == result.record["verified"]["quantizable_layers"] > 0


def test_the_cpus_options_are_not_those_of_other_providers():
    options = {"providers": ["cpu", "cuda"], "vnni": False}
    config = build.Config(backends=["onnxruntime"], options={"onnxruntime": options})
    cpu, cuda = build.expand(config, planning("int8"))
    assert (cpu.parameters["options"], cuda.parameters["options"]) == ({"vnni": False}, {})
    backends.onnxruntime.Options(**options)
    with pytest.raises(ValidationError, match="vnni concerns the provider cpu"):
        backends.onnxruntime.Options(providers=["cuda"], vnni=False)


def test_a_third_partys_backend_may_settle_its_options_and_prepare_by_them(fake, tmp_path):
    def prepare(canonical, precision, out, options):
        assert options == {"level": 5, "here": "int8"}
        out.write_bytes(canonical.read_bytes())
        return out

    fake.settle, fake.prepare = lambda options, precision: {**options, "here": precision}, prepare
    config = build.Config(backends=["fake"], options={"fake": {"level": 5}})
    (step,) = build.expand(config, planning("int8"))
    assert step.parameters["options"] == {"level": 5, "here": "int8"}
    result, _, _ = ran(tmp_path, config, step, canonical())
    assert result.record["status"] == "ok"
    assert fake.requests[0].options == {"level": 5, "here": "int8"}


def test_away_from_the_machine_that_will_build_nothing_is_asked_of_it(fake):
    config, here = build.Config(backends=["fake", "openvino"]), planning("fp16", "int8")
    steps, away = build.expand(config, here), build.expand(config, replace(here, here=False))
    assert fake.probes == 1
    assert [(s.inputs, s.makes, s.label) for s in away] == [(s.inputs, s.makes, s.label) for s in steps]
    assert {s.why_not for s in away} == {None}
    assert away[0].parameters == {"backend": "fake", "options": {}}


def test_an_artifact_depends_on_its_own_backend_only(fake):
    def parameters(**options):
        config = build.Config(**options)
        assert config.keyed() == {"batch_sizes": [1, 8]}
        return {step.label: step.parameters for step in build.expand(config, planning("fp32", "int8")) if "-fake-" in step.label}

    alone = parameters(backends=["fake"])
    assert parameters(backends=["openvino", "fake"], options={"openvino": {}}, timeout_minutes=5) == alone
    assert parameters(backends=["fake"], options={"fake": {"level": 2}})["qat-fake-fp32"]["options"] == {"level": 2}
    strict = parameters(backends=["fake"], on_unverified="fail")
    assert all(strict[label] != alone[label] for label in alone)
    compared = parameters(backends=["fake"], on_mismatch="fail")
    assert all(compared[label] != alone[label] for label in alone)


def test_what_becomes_of_a_mismatch_is_in_the_key_of_engines_only():
    def parameters(policy):
        config = build.Config(backends=["onnxruntime", "openvino", "tensorrt_rtx"], on_mismatch=policy)
        return {step.label: step.parameters for step in build.expand(config, planning("fp32"))}

    warned, failed = parameters("warn"), parameters("fail")
    assert [label for label in warned if failed[label] != warned[label]] == ["qat-tensorrt_rtx-fp32"]


def test_a_precision_the_backend_does_not_know_is_said(fake):
    (step,) = build.expand(build.Config(backends=["fake"]), planning("bf16"))
    assert step.why_not == "fake does not know the precision bf16 (it has: fp32, fp16, int8)"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_int8_is_built_and_verified(tmp_path, backend):
    config = build.Config(backends=[backend], on_unverified="fail", options={backend: {"vnni": False}})
    (step,) = build.expand(config, planning("int8"))
    result, folder, logged = ran(tmp_path, config, step, canonical())
    assert (result.record["status"], result.record["reason"], result.record["notes"], logged) == ("ok", None, [], [])
    assert result.record["verified"]["quantized_layers"] == LAYERS
    assert result.record["build_seconds"] > 0
    assert result.artifacts["model"].inputs == (("image", ("batch", 3, 16, 16), "float32"),)
    assert result.record["max_batch"] is None
    assert [p.name for p in folder.iterdir()] == ["model.onnx"]


def test_an_int8_graph_without_scales_fails_its_row_only(tmp_path):
    config = build.Config(backends=["onnxruntime"])
    (step,) = build.expand(config, planning("int8"))
    result, folder, _ = ran(tmp_path, config, step, canonicalize(quantized()[0]))
    assert result.record["status"] == "failed"
    assert "layer1.0.conv2" in result.record["reason"]
    assert result.artifacts == {}
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(BuildFailed("no kernel for 'c'", "use fp16"), "no kernel for 'c'\n  → use fp16"), (RuntimeError("bang"), "RuntimeError: bang")],
)
def test_a_backends_fault_becomes_the_reason(tmp_path, fake, fault, reason):
    fake.fault = fault
    config = build.Config(backends=["fake"])
    (step,) = build.expand(config, planning("fp32"))
    result, folder, logged = ran(tmp_path, config, step, residual())
    assert result.record == {"status": "failed", "reason": reason}
    assert result.artifacts == {}
    assert list(folder.iterdir()) == []
    assert any("bang" in line or "no kernel" in line for line in logged)


def lost_to_an_interrupt():
    """As PyTorch fails when Ctrl-C hits it between two steps that belong together."""
    fault = RuntimeError("trying to pop from empty mode stack")
    fault.__context__ = KeyboardInterrupt()
    return fault


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), lost_to_an_interrupt()], ids=["itself", "another"])
def test_an_interrupt_is_no_fault(tmp_path, fake, fault):
    fake.fault = fault
    config = build.Config(backends=["fake"])
    (step,) = build.expand(config, planning("fp32"))
    with pytest.raises(KeyboardInterrupt):
        ran(tmp_path, config, step, residual())


def test_less_int8_than_asked_warns_or_fails(tmp_path, fake):
    fake.verified = {"quantized_layers": 5, "quantizable_layers": 7, "executed": {"int8": 5, "fp32": 2}}
    for policy, status in (("warn", "ok"), ("fail", "failed")):
        config = build.Config(backends=["fake"], on_unverified=policy)
        (step,) = build.expand(config, planning("int8"))
        (tmp_path / policy).mkdir()
        result, _, logged = ran(tmp_path / policy, config, step, canonical())
        assert result.record["status"] == status
        said = "only 5 of 7 layers run in INT8 (2 in fp32, 5 in int8)"
        assert any(said in line for line in logged)
        assert policy == "fail" or result.record["notes"] == [said]


def test_more_int8_than_asked_warns_or_fails(tmp_path, fake):
    """A layer that mixed precision keeps in float, and the runtime quantises after all."""
    fake.verified = {"quantized_layers": 7, "quantizable_layers": 7, "executed": {"int8": 7}}
    model = canonical()
    for policy, status in (("warn", "ok"), ("fail", "failed")):
        config = build.Config(backends=["fake"], on_unverified=policy)
        (step,) = build.expand(config, planning("int8"))
        (tmp_path / policy).mkdir()
        result, _, logged = ran(tmp_path / policy, config, step, model, float_layers=["conv1"])
        assert result.record["status"] == status
        assert any("7 of 7 layers run in INT8 (7 in int8), more than should; mixed_precision keeps 1 in float" in line for line in logged)


@pytest.mark.parametrize(
    ("verified", "verifiable", "said"),
    [
        ({"quantized_layers": 0, "quantizable_layers": 7, "executed": {"fp32": 6, "fp16": 1}}, False, "only 1 of 7 layers run in FP16 (1 in fp16, 6 in fp32)"),
        ({"quantized_layers": 0, "quantizable_layers": 7, "executed": {"fp16": 7}}, False, None),
        ({"quantized_layers": 0, "quantizable_layers": 7, "executed": {}}, False, None),  # a third party's, that counts INT8 layers alone
        (None, True, "FP16 is not verified: not told"),
        (None, False, None),
    ],
)
def test_less_fp16_than_asked_warns_or_fails(tmp_path, fake, verified, verifiable, said):
    fake.fp16, fake.verified, fake.told = None, verified, {"verifiable": verifiable}
    for policy in ("warn", "fail"):
        config = build.Config(backends=["fake"], on_unverified=policy)
        (step,) = build.expand(config, planning("fp16"))
        (tmp_path / policy).mkdir()
        result, _, _ = ran(tmp_path / policy, config, step, cast(canonicalize(residual()), "fp16"))
        if said and policy == "fail":
            assert (result.record["status"], result.record["reason"]) == ("failed", f"{said}\n  → set build.on_unverified: warn to keep it")
        else:
            assert (result.record["status"], result.record["notes"]) == ("ok", [said] if said else [])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_float_engine_runs_in_the_precision_it_was_typed_in(tmp_path, precision):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'deployopt[tensorrt-rtx]'")
    config = build.Config(backends=["tensorrt_rtx"], options={"tensorrt_rtx": {"compute_capabilities": [8.6]}}, on_unverified="fail")
    (step,) = build.expand(config, planning(precision))
    result, _, _ = ran(tmp_path, config, step, cast(canonicalize(residual()), precision))
    assert result.record["status"] in {"built", "ok"}, result.record["reason"]  # ok where there is such a GPU
    assert result.record["verified"]["executed"] == {precision: LAYERS}
    assert sum(result.record["fusion"]["layers"].values()) >= LAYERS


def test_an_engine_for_other_gpus_is_built_and_not_opened_though_its_backend_runs(tmp_path, fake):
    fake.opener, fake.told = "worker_openers:segfault", {"misfit": "model.engine was built for 8.9; here is a GPU of 8.6"}
    config = build.Config(backends=["fake"], on_mismatch="fail")
    (step,) = build.expand(config, planning("fp32"))
    result, folder, _ = ran(tmp_path, config, step, residual())
    assert (result.record["status"], result.record["reason"], result.record["parity"]) == ("built", fake.told["misfit"], None)
    assert (folder / "model.engine").exists()


@pytest.mark.parametrize(("kept", "notes"), [(2, []), (1, ["only 5 of 7 layers run in INT8 (2 in fp32, 5 in int8); mixed_precision keeps 1 in float"])])
def test_the_record_says_how_many_layers_are_in_float_on_purpose(tmp_path, fake, kept, notes):
    fake.verified = {"quantized_layers": 5, "quantizable_layers": 7, "executed": {"int8": 5, "fp32": 2}}
    config = build.Config(backends=["fake"])
    (step,) = build.expand(config, planning("int8"))
    result, _, _ = ran(tmp_path, config, step, canonical(), ["body.conv1", "body.fc"][:kept])
    assert result.record["verified"] == {**fake.verified, "kept_in_float": kept}
    assert result.record["notes"] == notes


def wrong_engine():
    """The same network with its first weight turned round."""
    model = residual()
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    return model.SerializeToString()


def test_an_engine_is_held_to_onnx_runtime_on_real_images(tmp_path, fake):
    config = build.Config(backends=["fake"], on_mismatch="fail")
    (step,) = build.expand(config, planning("fp32"))
    result, _, _ = ran(tmp_path, config, step, residual())
    parity = result.record["parity"]
    assert (result.record["status"], result.record["notes"]) == ("ok", [])
    assert (parity["checked"], parity["batches"], parity["n"], parity["agreement"]) == (True, [8, 1], 24, 1.0)
    assert parity["max_abs_diff"] <= parity["max_abs_diff_limit"]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_bf16_engine_is_held_to_its_onnx_widened_to_fp32(tmp_path, fake, damaged):
    fake.engine = wrong_engine() if damaged else residual().SerializeToString()
    config = build.Config(backends=["fake"])
    (step,) = build.expand(config, planning("bf16"))
    result, _, _ = ran(tmp_path, config, step, cast(canonicalize(residual()), "bf16"))
    parity = result.record["parity"]
    assert (result.record["status"], parity["checked"], parity["n"]) == ("ok", True, 24)
    assert "widened to FP32" in parity["widened"]
    assert parity["max_abs_diff"] > 0
    assert (parity["max_abs_diff"] > parity["max_abs_diff_limit"]) == damaged
    assert [note.partition(": largest")[0] for note in result.record["notes"]] == [
        "its outputs on 24 validation images, in batches of 8, are not those of ONNX Runtime"
    ] * damaged


@pytest.mark.parametrize(("policy", "status"), [("warn", "ok"), ("fail", "failed")])
@pytest.mark.parametrize("damage", ["weights", "nan"])
def test_an_engine_with_other_outputs_warns_or_fails(tmp_path, fake, policy, status, damage):
    if damage == "weights":
        fake.engine, said = wrong_engine(), "largest difference"
    else:
        fake.opener, said = "worker_openers:NanSession", "outputs of 24 of 24 images are NaN"
    config = build.Config(backends=["fake"], on_mismatch=policy)
    (step,) = build.expand(config, planning("fp32"))
    result, _, logged = ran(tmp_path, config, step, residual())
    assert result.record["status"] == status
    told = f"its outputs on 24 validation images, in batches of 8, are not those of ONNX Runtime: {said}"
    assert told in (result.record["reason"] if policy == "fail" else result.record["notes"][0])
    assert any(told in line for line in logged)


def test_an_engine_that_is_wrong_at_the_smallest_batch_alone_is_found(tmp_path, fake):
    fake.opener = "worker_openers:WrongAloneSession"
    config = build.Config(backends=["fake"], on_mismatch="fail")
    (step,) = build.expand(config, planning("fp32"))
    result, _, _ = ran(tmp_path, config, step, residual())
    assert result.record["status"] == "failed"
    assert "on 24 validation images, in batches of 1, are not those of ONNX Runtime: largest difference" in result.record["reason"]


def test_what_was_built_and_not_run_for_want_of_a_library_is_built_again_when_that_is_there(fake):
    """The GPU, its driver and all versions may be the same."""

    def parameters(runs):
        fake.runs = runs
        return build.expand(build.Config(backends=["fake"]), planning("fp32"))[0].parameters

    assert parameters(False) == {**parameters(True), "runs": False}
    assert parameters(True)["runs"] is True


def test_an_engine_that_crashes_when_it_runs_has_failed(tmp_path, fake):
    fake.opener = "worker_openers:segfault"
    config = build.Config(backends=["fake"])
    (step,) = build.expand(config, planning("fp32"))
    result, folder, _ = ran(tmp_path, config, step, residual())
    assert result.record["status"] == "failed"
    assert "SIGSEGV" in result.record["reason"]
    assert list(folder.iterdir()) == []


def test_what_cannot_run_here_is_built_with_the_reason(tmp_path, fake):
    fake.runs = False
    config = build.Config(backends=["fake"], options={"fake": {"level": 1}}, batch_sizes=[8, 1, 8], timeout_minutes=1.5)
    (step,) = build.expand(config, planning("int8"))
    result, _, _ = ran(tmp_path, config, step, canonical())
    assert (result.record["status"], result.record["reason"]) == ("built", "no driver")
    assert (result.record["verified"], result.record["notes"], result.record["options"]) == (None, ["INT8 is not verified: not told"], {"level": 3})
    assert result.record["max_batch"] == 8
    assert fake.requests[0].batch_sizes == (1, 8)
    assert fake.requests[0].options == {"level": 1}
    assert fake.requests[0].timeout_s == 90


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"backends": []}, "at least 1"),
        ({"backends": ["onxruntime"]}, "did you mean 'onnxruntime'"),
        ({"backends": ["openvino", "openvino"]}, "named twice"),
        ({"batch_sizes": [0, 1]}, "at least 1, found 0"),
        ({"on_unverified": "ignore"}, "'warn' or 'fail'"),
    ],
)
def test_wrong_options_are_found_at_planning(fake, config, wanted):
    with pytest.raises(ValidationError, match=wanted):
        build.Config(**config)


def test_a_reason_names_files_without_this_machines_folders(tmp_path, fake):
    fake.fault = RuntimeError(f"File \"{pytest.__file__}\", line 3: '/layer1/conv/Conv' of {tmp_path}/export/canonical.onnx")
    config = build.Config(backends=["fake"])
    (step,) = build.expand(config, planning("fp32"))
    result, _, logged = ran(tmp_path, config, step, residual())
    assert result.record["reason"] == "RuntimeError: File \"__init__.py\", line 3: '/layer1/conv/Conv' of canonical.onnx"
    assert any(pytest.__file__ in line for line in logged)
