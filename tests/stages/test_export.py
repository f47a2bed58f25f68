from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from distributions import install
from numpy.typing import NDArray
from onnx import TensorProto, helper
from pydantic import ValidationError

from deployopt.artifact import Precision
from deployopt.data import Dataset
from deployopt.errors import ExportFailed, OptionRefused
from deployopt.nn import checkpoint, models
from deployopt.stages import Planning, Point, StepOutput, export
from deployopt.stages._parity import BATCHES, limit_of, onnx_outputs

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "bf16", "int8_fp16")  # from the least rounding to the most
FLOAT, INT8 = Point("torch", "finetune", "float"), Point("torch", "qat", "int8")


def test_each_variant_is_one_step_with_the_precisions_of_its_family() -> None:
    steps = export.expand(export.Config(precisions=("fp16", "int8")), Planning([FLOAT, INT8], "export"))
    assert [(s.label, [p.precision for p in s.makes]) for s in steps] == [("finetune", ["fp16"]), ("qat", ["int8"])]


def test_an_int8_variant_is_exported_with_fp32_or_fp16_around_it() -> None:
    (step,) = export.expand(export.Config(precisions=("int8", "int8_fp16")), Planning([INT8], "export"))
    assert [p.precision for p in step.makes] == ["int8", "int8_fp16"]


class FiveImages:
    """Remembers which were asked for at once."""

    targets = np.zeros(5, np.int64)

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return 5

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        self.asked.append([int(i) for i in indices])
        return np.stack([np.full((8, 8, 3), 50 * i, np.uint8) for i in indices])

    def raw(self, index: int) -> NDArray[np.uint8]:
        raise NotImplementedError


@pytest.mark.parametrize(("precision", "kind"), [("fp32", TensorProto.FLOAT), ("bf16", TensorProto.BFLOAT16)])
def test_few_images_are_repeated_so_that_every_batch_size_is_run(tmp_path: Path, precision: Precision, kind: int) -> None:
    """Also where ONNX Runtime has no kernel: it multiplies no BF16 on CPUs."""
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *rest]) for name, rest in (("x", [3, 8, 8]), ("y", [192]))]
    nodes = [
        helper.make_node("Cast", ["x"], ["typed"], to=kind),
        helper.make_node("Mul", ["typed", "half"], ["halves"]),
        helper.make_node("Flatten", ["halves"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(nodes, "flat", tensors[:1], tensors[1:], [helper.make_tensor("half", kind, [1], [0.5])])
    path, images = tmp_path / "flat.onnx", FiveImages()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    outputs = onnx_outputs(path, precision, images, threads=1)
    assert [len(asked) for asked in images.asked] == list(BATCHES)
    np.testing.assert_array_equal(outputs, np.resize(outputs[:5], outputs.shape))
    np.testing.assert_allclose(outputs[:5, 0], np.arange(5) * 25 / 255, rtol=1e-6)


THEIRS = """
import torch
from torch import nn

class Forked(nn.Module):
    def __init__(self, num_outputs, traced_scale):
        super().__init__()
        self.traced_scale = traced_scale
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_outputs))

    def forward(self, x):
        return self.layers(x * self.traced_scale if torch.compiler.is_compiling() else x)
"""


@pytest.fixture
def forked(run_stages: Any, small_digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float, Precision], StepOutput]:
    """Exports a third party's network that computes otherwise while it is traced."""
    install(tmp_path, "theirs", "[deployopt.models]\nforked = theirs.nets:Forked\n", {"nets": THEIRS})
    monkeypatch.syspath_prepend(tmp_path)

    def exported(traced_scale: float, precision: Precision) -> StepOutput:
        torch.manual_seed(0)
        network = models.build({"arch": "forked", "outputs": 3, "options": {"traced_scale": traced_scale}}, small_digits.preprocessing)
        artifact = checkpoint.save(tmp_path / "forked", network.eval())
        variant = StepOutput("00-init", "init", (Point("torch", "init", "float"),), {}, {"model": artifact}, tmp_path / "forked", False, 0.0)
        steps: list[StepOutput] = run_stages(tmp_path, [(export, export.Config(precisions=(precision,)))], [variant])
        return steps[-1]

    return exported


@pytest.mark.parametrize(
    ("precision", "remedy"), [("fp32", "computes otherwise while it is traced"), ("bf16", "leave this precision out of export.precisions")]
)
def test_a_file_that_is_not_what_the_torch_network_computes_is_refused(
    forked: Callable[[float, Precision], StepOutput], precision: Precision, remedy: str
) -> None:
    with pytest.raises(ExportFailed, match=rf"{precision}\.onnx disagrees with its torch parent on 57 validation images: largest difference") as caught:
        forked(2.0, precision)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_that_computes_alike_while_it_is_traced_is_exported(forked: Callable[[float, Precision], StepOutput], precision: Precision) -> None:
    parity = forked(1.0, precision).record["precisions"][precision]["parity"]
    assert (parity["checked"], parity["n"], parity["batches"]) == (True, 57, [1, 2, 7, 64])
    assert parity["max_abs_diff"] <= parity["max_abs_diff_limit"]


@pytest.mark.parametrize("layers", [20, 54])
def test_limits_widen_with_the_rounding_and_with_depth(layers: int) -> None:
    limits = [limit_of(p, layers) for p in PRECISIONS]
    assert [limit.relative for limit in limits] == sorted(limit.relative for limit in limits)
    assert limits[0].relative < 3e-4
    assert limits[2].relative < 0.06
    assert all(narrow.relative < limit_of(p, 2 * layers).relative for narrow, p in zip(limits, PRECISIONS, strict=True))


def test_a_variant_that_no_precision_fits_makes_nothing() -> None:
    assert [s.label for s in export.expand(export.Config(precisions=("int8",)), Planning([FLOAT, INT8], "export"))] == ["qat"]


def test_precisions_that_fit_no_variant_are_refused() -> None:
    with pytest.raises(OptionRefused, match=r"int8 fits no variant \(variants: finetune \(float\)\)"):
        export.expand(export.Config(precisions=("int8",)), Planning([FLOAT], "export"))


@pytest.mark.parametrize("config", [{"opset": 18}, {"opset": 24}, {"precisions": ()}, {"precisions": ("fp32", "fp32")}, {"precisions": ("int4",)}])
def test_impossible_options_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        export.Config(**config)
