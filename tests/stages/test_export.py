from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from pydantic import ValidationError

from deployopt.errors import OptionRefused
from deployopt.stages import Planning, Point, export
from deployopt.stages._parity import BATCHES, limit_of, onnx_outputs

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


def test_few_images_are_repeated_so_that_every_batch_size_is_run(tmp_path: Path) -> None:
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *rest]) for name, rest in (("x", [3, 8, 8]), ("y", [192]))]
    graph = helper.make_graph([helper.make_node("Flatten", ["x"], ["y"])], "flat", tensors[:1], tensors[1:])
    path, images = tmp_path / "flat.onnx", FiveImages()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    outputs = onnx_outputs(path, images, threads=1)
    assert [len(asked) for asked in images.asked] == list(BATCHES)
    np.testing.assert_array_equal(outputs, np.resize(outputs[:5], outputs.shape))
    assert len(np.unique(outputs[:, 0])) == 5


@pytest.mark.parametrize("layers", [20, 54])
def test_limits_widen_with_the_rounding_and_with_depth(layers: int) -> None:
    limits = [limit_of(p, layers) for p in ("fp32", "fp16", "int8", "int8_fp16")]
    assert [limit.relative for limit in limits] == sorted(limit.relative for limit in limits)
    assert limits[0].relative < 3e-4
    assert limits[2].relative < 0.06
    assert all(narrow.relative < limit_of(p, 2 * layers).relative for narrow, p in zip(limits, ("fp32", "fp16", "int8", "int8_fp16"), strict=True))


def test_a_variant_that_no_precision_fits_makes_nothing() -> None:
    assert [s.label for s in export.expand(export.Config(precisions=("int8",)), Planning([FLOAT, INT8], "export"))] == ["qat"]


def test_precisions_that_fit_no_variant_are_refused() -> None:
    with pytest.raises(OptionRefused, match=r"int8 fits no variant \(variants: finetune \(float\)\)"):
        export.expand(export.Config(precisions=("int8",)), Planning([FLOAT], "export"))


@pytest.mark.parametrize("config", [{"opset": 18}, {"opset": 24}, {"precisions": ()}, {"precisions": ("fp32", "fp32")}, {"precisions": ("int4",)}])
def test_impossible_options_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        export.Config(**config)
