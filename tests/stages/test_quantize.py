"""qat, ptq and export on a tiny trained network: INT8 keeps the accuracy, repeats bit for bit, and is written as the torch parent computes."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from deployopt.data import Dataset
from deployopt.errors import ExportFailed
from deployopt.nn import checkpoint
from deployopt.nn.capture import example_input
from deployopt.nn.export import deployed, to_onnx
from deployopt.nn.models import Network, build
from deployopt.nn.prepared import Prepared, Scheme
from deployopt.nn.quantizer import fake_quantized
from deployopt.runtime.preprocessing import Preprocessing, to_feed
from deployopt.stages import StepOutput, export, finetune, init, prune, ptq, qat

TRAIN = {"batch_size": 32, "warmup_epochs": 0.0}
START = [(init, init.Config(fan_out=False)), (finetune, finetune.Config(epochs=2, **TRAIN))]
PRUNE = (prune, prune.Config.model_validate({"target": {"macs_ratio": 0.5}, "round_to": 1, "finetune": {"epochs": 1, **TRAIN}}))
QAT = (qat, qat.Config(epochs=2, calibration_images=64, **TRAIN))


@pytest.fixture(scope="module")
def pruned(run_stages, tmp_path_factory: pytest.TempPathFactory) -> list[StepOutput]:  # type: ignore[no-untyped-def]
    return run_stages(tmp_path_factory.mktemp("float"), [*START, PRUNE])


@pytest.fixture(scope="module")
def trained_int8(run_stages, pruned: list[StepOutput], tmp_path_factory: pytest.TempPathFactory) -> list[StepOutput]:  # type: ignore[no-untyped-def]
    return run_stages(tmp_path_factory.mktemp("int8"), [QAT], pruned)


def test_qat_keeps_the_accuracy_and_records_its_epochs(pruned: list[StepOutput], trained_int8: list[StepOutput]) -> None:
    parent, quantized = pruned[-1].record, trained_int8[-1].record
    assert (quantized["family"], quantized["parent"]) == ("int8", "prune")
    assert quantized["accuracy"]["top1"] >= parent["accuracy"]["top1"] - 0.05
    assert [r["phase"] for r in quantized["curves"]] == ["qat", "qat"]
    assert quantized["kept_epoch"] == 2
    assert quantized["macs"] == parent["macs"]
    assert [e["op"] for e in checkpoint.load(trained_int8[-1].folder).lineage] == ["prune", "quantize"]


def test_batchnorm_frozen_from_the_start_keeps_its_statistics(run_stages, pruned: list[StepOutput], trained_int8: list[StepOutput], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = qat.Config.model_validate({"epochs": 1, "calibration_images": 64, "freeze_batchnorm_after": 0.0, **TRAIN})
    frozen = run_stages(tmp_path, [(qat, config)], pruned)
    given, kept, moved = (checkpoint.load(steps[-1].folder).get_buffer("body.bn1.running_mean") for steps in (pruned, frozen, trained_int8))
    assert torch.equal(kept, given)
    assert not torch.equal(moved, given)  # by default it trains for half of the steps


def test_ranges_and_batchnorm_freeze_each_once() -> None:
    prepared = Prepared(build({"arch": "resnet8", "outputs": 3}, Preprocessing(8)).eval(), Scheme("min_max"))
    config, seen = qat.Config(epochs=3, freeze_batchnorm_after=0.5, freeze_observers_after=0.75), []
    for step in range(20):
        qat._freeze(prepared, config, step / 20)
        seen.append((prepared.batchnorm_frozen, prepared.observers_frozen))
    assert seen == [(step >= 10, step >= 15) for step in range(20)]


def test_qat_twice_writes_the_same_bytes(run_stages, pruned: list[StepOutput], trained_int8: list[StepOutput], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    again, first = run_stages(tmp_path, [QAT], pruned)[-1], trained_int8[-1]
    for name in (checkpoint.WEIGHTS, checkpoint.DESCRIPTION):
        assert (again.folder / name).read_bytes() == (first.folder / name).read_bytes()
    assert again.record == first.record


def test_distillation_learns_from_the_float_parent(run_stages, pruned: list[StepOutput], small_digits: Dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    parent = checkpoint.load(pruned[-1].folder).eval()
    images = torch.from_numpy(to_feed(small_digits.train.images(range(len(small_digits.train)))))

    def distance(name: str, distill: dict[str, float] | None) -> float:
        """KL divergence of the trained network's predictions from the parent's, in nats."""
        step = run_stages(tmp_path / name, [(qat, qat.Config.model_validate({"epochs": 2, "calibration_images": 64, "distill": distill, **TRAIN}))], pruned)[-1]
        assert step.record["accuracy"]["top1"] >= pruned[-1].record["accuracy"]["top1"] - 0.05
        with torch.no_grad():
            ours, theirs = (net(images).log_softmax(1) for net in (fake_quantized(checkpoint.load(step.folder)), parent))
        return float(kl_div(ours, theirs, reduction="batchmean", log_target=True))

    assert distance("distilled", {"weight": 1.0}) < 0.7 * distance("alone", None)


def test_ptq_leaves_the_weights_and_keeps_the_accuracy(run_stages, pruned: list[StepOutput], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    step = run_stages(tmp_path, [(ptq, ptq.Config(calibration_images=64))], pruned)[-1]
    floating, quantized = checkpoint.load(pruned[-1].folder), checkpoint.load(step.folder)
    assert all(torch.equal(value, quantized.state_dict()[name]) for name, value in floating.state_dict().items())
    assert step.record["curves"] == []
    assert step.record["accuracy"]["top1"] >= pruned[-1].record["accuracy"]["top1"] - 0.05


def test_a_pruned_and_quantised_network_is_exported_as_torch_computes_it(run_stages, trained_int8: list[StepOutput], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    step = run_stages(tmp_path, [(export, export.Config(precisions=("int8", "int8_fp16")))], trained_int8)[-1]
    record = step.record["precisions"]["int8"]
    assert record["parity"]["checked"]
    assert record["parity"]["agreement"] >= 0.95
    assert record["macs"] == trained_int8[-1].record["macs"]
    assert record["nodes"]["QuantizeLinear"] >= 10  # one for each layer's input
    model = onnx.load(step.folder / "int8.onnx")
    metadata = {p.key: p.value for p in model.metadata_props}
    assert json.loads(metadata["deployopt.classes"]) == ["0", "1", "2"]
    assert Preprocessing.from_json(json.loads(metadata["deployopt.preprocessing"])).image_size == 8
    assert step.artifacts["int8"].verified().metadata["precision"] == "int8"
    mixed = step.record["precisions"]["int8_fp16"]["parity"]
    assert mixed["checked"]
    assert mixed["max_abs_diff"] <= mixed["max_abs_diff_limit"]
    kinds = {t.data_type for t in onnx.load(step.folder / "int8_fp16.onnx").graph.initializer}
    assert {onnx.TensorProto.INT8, onnx.TensorProto.FLOAT16} <= kinds
    assert onnx.TensorProto.FLOAT not in kinds


def test_a_float_network_is_exported_in_every_float_precision(run_stages, pruned: list[StepOutput], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    step = run_stages(tmp_path, [(export, export.Config())], pruned)[-1]
    assert set(step.artifacts) == {"fp32", "fp16", "bf16"}
    parity = {name: record["parity"] for name, record in step.record["precisions"].items()}
    assert parity["fp32"]["max_abs_diff"] < 1e-3
    assert parity["fp16"]["max_abs_diff"] < parity["fp16"]["max_abs_diff_limit"]
    assert parity["fp32"]["max_abs_diff"] < parity["bf16"]["max_abs_diff"] <= parity["bf16"]["max_abs_diff_limit"]
    assert [p["batches"] for p in parity.values()] == [[1, 2, 7, 64]] * 3
    assert "activations not rounded" in parity["bf16"]["widened"]
    assert parity["fp32"]["widened"] is parity["fp16"]["widened"] is None
    assert step.record["precisions"]["bf16"]["opset"] >= 22
    assert step.artifacts["fp16"].size_bytes < 0.6 * step.artifacts["fp32"].size_bytes


class Bessel(nn.Module):
    """Uses an operation that has no ONNX form."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        means = self.head(x.mean((2, 3)))
        return torch.special.bessel_j0(means)


def test_an_operator_without_onnx_form_is_named() -> None:
    preprocessing = Preprocessing(8)
    module = deployed(Network(Bessel(), {"arch": "bessel", "outputs": 3}, preprocessing))
    with pytest.raises(
        ExportFailed, match=r"(?s)could not be written as ONNX opset 21: .*bessel_j0.* \(at test_quantize\.py:\d+ in forward: `return torch\.special\.bessel_j0"
    ):
        to_onnx(module, example_input(preprocessing), 21)
