"""Sensitivity and mixed precision on a tiny trained network: tables, choices by real sessions, and mixed files on every runtime here."""

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from pydantic import ValidationError

from deployopt import plugins
from deployopt.artifact import Availability
from deployopt.backends import BuildRequest
from deployopt.errors import BackendUnavailable, StageFailed, UsageError
from deployopt.nn import checkpoint, evaluate, layer_sensitivity
from deployopt.nn.export import canonical, deployed
from deployopt.nn.prepared import Prepared, Scheme
from deployopt.nn.quantizer import fake_quantized, quantization, recorded_scales
from deployopt.runtime.progress import SilentProgress
from deployopt.stages import Planning, Point, StepOutput, _mixed_precision, _timing, build, export, finetune, init, ptq, qat
from deployopt.stages._quantize import MixedPrecision, Sensitivity
from deployopt.tasks import classification

TRAIN = {"batch_size": 32, "warmup_epochs": 0.0}
KEPT = ("body.conv1", "body.layer1.0.conv1", "body.layer2.0.conv2", "body.fc")  # stem, before and at an Add, head
LAYERS = 10


@pytest.fixture(scope="module")
def floating(run_stages, tmp_path_factory: pytest.TempPathFactory) -> list[StepOutput]:  # type: ignore[no-untyped-def]
    return run_stages(tmp_path_factory.mktemp("float"), [(init, init.Config(fan_out=False)), (finetune, finetune.Config(epochs=2, **TRAIN))])


@pytest.fixture(scope="module")
def mixed(run_stages, floating: list[StepOutput], tmp_path_factory: pytest.TempPathFactory) -> list[StepOutput]:  # type: ignore[no-untyped-def]
    config = ptq.Config(calibration_images=64, mixed_precision=KEPT, sensitivity=True)
    return run_stages(tmp_path_factory.mktemp("mixed"), [(ptq, config), (export, export.Config(precisions=("int8",)))], floating)


def test_layers_kept_in_float_live_in_the_lineage_and_replay(mixed: list[StepOutput]) -> None:
    loaded = checkpoint.load(mixed[-2].folder)
    entry = quantization(loaded)
    assert entry is not None
    assert entry["scheme"]["float_layers"] == sorted(KEPT)
    assert len(entry["sites"]) == LAYERS - len(KEPT)
    graph_module = fake_quantized(loaded)
    assert {name: hasattr(graph_module.get_submodule(name), "weight_scale") for name in (*KEPT, "body.layer1.0.conv2")} == {
        **dict.fromkeys(KEPT, False),
        "body.layer1.0.conv2": True,
    }


def test_every_int8_layer_has_its_sensitivity(mixed: list[StepOutput]) -> None:
    table = mixed[-2].record["quantization"]["sensitivity"]
    assert table["images"] == 57
    assert len(table["layers"]) == LAYERS - len(KEPT)
    assert not {row["layer"] for row in table["layers"]} & set(KEPT)
    assert table["float"]["distance"] < 1e-6 < table["int8"]["distance"]
    assert all(0 <= row["alone"]["distance"] < 10 * table["int8"]["distance"] for row in table["layers"])
    json.dumps(mixed[-2].record)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "tensorrt_rtx"])
def test_runtimes_build_a_mixed_model_and_run_all_but_the_kept_layers_in_int8(run_stages, mixed: list[StepOutput], backend: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    probed = plugins.find("backends", backend).probe()
    if not probed.builds:
        pytest.skip(probed.reason)
    config = build.Config(backends=(backend,), batch_sizes=(1,), on_unverified="fail")
    record = run_stages(tmp_path, [(build, config)], mixed)[-1].record
    assert record["status"] in ("ok", "built"), record["reason"]
    verified = record["verified"]
    if verified is not None:
        assert (verified["quantized_layers"], verified["quantizable_layers"], verified["kept_in_float"]) == (LAYERS - len(KEPT), LAYERS, len(KEPT))


INT8_LAYERS = (
    "body.conv1",
    *(f"body.layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2)),
    "body.layer2.0.downsample.0",
    "body.layer3.0.downsample.0",
    "body.fc",
)


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("layers", [*((name,) for name in INT8_LAYERS), ("body.layer3.0.conv1", "body.layer3.0.downsample.0")], ids="+".join)
def test_whichever_layers_are_kept_run_in_float_on_onnxruntime_and_nothing_else_does(  # type: ignore[no-untyped-def]
    floating: list[StepOutput], small_digits, layers: tuple[str, ...], vnni: bool, tmp_path: Path
) -> None:
    """ONNX Runtime quantises float weights behind a DequantizeLinear by itself, per tensor, unless the dialect prevents it."""
    network = checkpoint.load(floating[-1].folder)
    prepared = Prepared(network, Scheme(float_layers=layers))
    prepared.calibrate(evaluate.calibration_batches(small_digits.train, 32, 0))
    prepared.write_back(network)
    onnx.save(canonical(deployed(network), network, recorded_scales(network)), tmp_path / "canonical.onnx")
    request = BuildRequest("int8", options={"vnni": vnni})
    verified = build.build_prepared("onnxruntime", tmp_path / "canonical.onnx", tmp_path, request, SilentProgress()).metadata["verified"]
    assert verified["executed"] == {"int8": LAYERS - len(layers), "fp32": len(layers)}


class Kept:
    """Choices that are remembered, as the store's are."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def get_or_make(self, name: str, make: Any) -> Any:
        if name not in self.values:
            self.values[name] = make()
        return self.values[name]


@pytest.fixture
def choosing(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the choice is given, and what the first layer costs; the choice itself is as ever.

    Sessions are real, and their rounds are then made to say that any layer in float takes half as long again.
    """
    given: dict[str, Any] = {}
    choose, measure = layer_sensitivity.keep_few, _timing.Candidates.measure

    def slower(candidates: Any, artifacts: Any, *options: Any) -> dict[str, Any]:
        given["layers"] = {key: quantize_nodes(artifact.path) for key, artifact in artifacts.items()}
        results = measure(candidates, artifacts, *options)
        whole = results[_mixed_precision.WHOLE].block_medians_ms
        return {key: replace(found, block_medians_ms=[ms * (1.0 if key == _mixed_precision.WHOLE else 1.5) for ms in whole]) for key, found in results.items()}

    def keep_few(study: Any, table: Any, whole: float, accepted: Any, cost: Any, **words: Any) -> dict[str, Any]:
        given.update(whole=whole, first=table[0].layer, costs=cost([table[0].layer]), timed=given["layers"])
        return choose(study, table, whole, accepted, cost, **words)

    monkeypatch.setattr(layer_sensitivity, "keep_few", keep_few)
    monkeypatch.setattr(_timing.Candidates, "measure", slower)
    return given


def quantize_nodes(path: Path) -> int:
    return sum(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node)


def test_auto_meets_the_accuracy_and_repeats_its_choice(  # type: ignore[no-untyped-def]
    run_stages, floating: list[StepOutput], tmp_path: Path, choosing: dict[str, Any]
) -> None:
    choices = Kept()
    automatic = MixedPrecision(max_accuracy_drop_pp=0.0)
    config = ptq.Config(calibration_images=64, observer="min_max", sensitivity=Sensitivity(images=20), mixed_precision=automatic)
    first = run_stages(tmp_path / "a", [(ptq, config)], floating, choices=choices)[-1]
    decision, table = (first.record["quantization"][part] for part in ("mixed_precision", "sensitivity"))
    assert choices.values["mixed_precision"] == decision
    assert table["images"] == 20
    assert choosing["whole"] == table["int8"]["distance"] != decision["trace"][0]["distance"]  # gains are from 20 images, what is accepted from all 57
    assert choosing["costs"] == {choosing["first"]: pytest.approx(0.5)}
    assert choosing["timed"][choosing["first"]] < choosing["timed"][_mixed_precision.WHOLE]
    assert decision["trace"][0]["layer"] is None
    assert first.record["validation"]["top1"] >= decision["parent"]
    kept = [step["layer"] for step in decision["trace"][1:] if step["kept"]]
    assert set(decision["float_layers"]) <= set(kept)
    second = run_stages(tmp_path / "b", [(ptq, config)], floating, choices=choices)[-1]
    assert quantization(checkpoint.load(second.folder)) == quantization(checkpoint.load(first.folder))


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    from deployopt.backends import openvino

    monkeypatch.setattr(openvino, "probe", lambda: Availability(False, False, None, None, "the package openvino is not installed"))


@pytest.mark.usefixtures("without_openvino")
@pytest.mark.parametrize("stage", [ptq, qat])
def test_a_backend_that_cannot_time_is_refused_at_once(run_stages, floating: list[StepOutput], tmp_path: Path, stage: Any) -> None:  # type: ignore[no-untyped-def]
    config = stage.Config(mixed_precision=MixedPrecision(backend="openvino"))
    with pytest.raises(BackendUnavailable, match=r"(ptq|qat)\.mixed_precision\.backend wants latency on openvino.*is not installed"):
        run_stages(tmp_path, [(stage, config)], floating)


@pytest.mark.parametrize(("given", "wanted"), [(["body.fc", "body.conv1", "body.fc"], r"more than once: body\.fc"), ([], "at least 1")])
def test_a_layer_is_named_once_and_some_are(given: list[str], wanted: str) -> None:
    with pytest.raises(ValidationError, match=wanted):
        qat.Config.model_validate({"mixed_precision": given})


def test_a_quantised_network_that_gives_no_numbers_is_told(floating: list[StepOutput], small_digits, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    network = checkpoint.load(floating[-1].folder)
    prepared = Prepared(network, Scheme())
    prepared.calibrate(evaluate.calibration_batches(small_digits.train, 32, 0))
    prepared.write_back(network)
    with torch.no_grad():
        network.state_dict()["body.fc.bias"].fill_(float("inf"))
    images = small_digits.validation
    study = layer_sensitivity.Study(network, np.zeros((len(images), 3), np.float32), images, classification, "cpu")
    with pytest.raises(StageFailed, match=r"in INT8 beside body\.conv1 in float the network's outputs on \d+ of \d+ validation images are NaN or infinite"):
        study.score(["body.conv1"])


def test_unknown_layers_are_refused_with_the_nearest_name(run_stages, floating: list[StepOutput], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=r"unknown layer 'body\.conv'; did you mean 'body\.conv1'"):
        run_stages(tmp_path, [(ptq, ptq.Config(mixed_precision=("body.conv",)))], floating)


def test_no_layer_left_is_refused(run_stages, floating: list[StepOutput], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    network = checkpoint.load(floating[-1].folder)
    everything = tuple(n.removesuffix(".weight") for n, p in network.named_parameters() if p.ndim > 1)
    with pytest.raises(StageFailed, match="beside those that mixed_precision keeps in float"):
        run_stages(tmp_path, [(ptq, ptq.Config(mixed_precision=everything))], floating)


def test_learned_scales_train_and_stay_positive(run_stages, floating: list[StepOutput], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = {"epochs": 2, "calibration_images": 64, **TRAIN}
    learned, observed = (
        run_stages(tmp_path / name, [(qat, qat.Config.model_validate({**config, "learn_scales": learn}))], floating)[-1]
        for name, learn in (("learned", True), ("observed", False))
    )
    assert learned.record["accuracy"]["top1"] >= observed.record["accuracy"]["top1"] - 0.05
    sites = [quantization(checkpoint.load(step.folder))["sites"]["body.conv1"]["weight"] for step in (learned, observed)]  # type: ignore[index]
    assert min(sites[0]) > 0
    assert sites[0] != sites[1]


@pytest.mark.parametrize("stage", [ptq, qat])
def test_the_key_names_what_builds_candidates_where_timing_decides(stage: Any) -> None:
    planning = Planning([Point("torch", "init", "float")], stage.__name__)
    (given,) = stage.expand(stage.Config(mixed_precision=("body.conv1",)), planning)
    assert given.parameters == {}
    (timed,) = stage.expand(stage.Config(mixed_precision="auto"), planning)
    found = timed.parameters["distributions"]
    assert found.items() >= {name: version(name) for name in ("onnx", "onnxscript")}.items()
    assert found["onnxruntime"] or found["onnxruntime-gpu"]
