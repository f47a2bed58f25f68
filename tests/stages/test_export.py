from __future__ import annotations

import pytest
from pydantic import ValidationError

from deployopt.errors import UsageError
from deployopt.stages import Planning, Point, export

FLOAT, INT8 = Point("torch", "finetune", "float"), Point("torch", "qat", "int8")


def test_each_variant_is_one_step_with_the_precisions_of_its_family() -> None:
    steps = export.expand(export.Config(precisions=("fp16", "int8")), Planning([FLOAT, INT8], "export"))
    assert [(s.label, [p.precision for p in s.makes]) for s in steps] == [("finetune", ["fp16"]), ("qat", ["int8"])]


def test_a_variant_that_no_precision_fits_makes_nothing() -> None:
    assert [s.label for s in export.expand(export.Config(precisions=("int8",)), Planning([FLOAT, INT8], "export"))] == ["qat"]


def test_precisions_that_fit_no_variant_are_refused() -> None:
    with pytest.raises(UsageError, match="fits no variant"):
        export.expand(export.Config(precisions=("int8",)), Planning([FLOAT], "export"))


@pytest.mark.parametrize("config", [{"opset": 18}, {"opset": 24}, {"precisions": ()}, {"precisions": ("fp32", "fp32")}, {"precisions": ("int4",)}])
def test_impossible_options_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        export.Config(**config)
