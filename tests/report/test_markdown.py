import re
from typing import Any

from deployopt.report.markdown import cell, render


def test_every_table_row_has_as_many_cells_as_its_header(report: dict[str, Any]) -> None:
    for block in re.findall(r"(?:^\|.*\n?)+", render(report), flags=re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.strip().splitlines()}
        assert len(widths) == 1


def test_it_says_the_main_things(report: dict[str, Any]) -> None:
    text = render(report)
    assert "7.9x faster than dense FP32" in text
    assert "| qat | openvino | int8 | 1 | ok |" in text
    assert "no NVIDIA driver answers → install the driver" in text
    assert "Recommended: qat/openvino/int8/b1 (`06-build/qat-openvino-int8.onnx`)" in text


def test_hostile_text_stays_text(report: dict[str, Any]) -> None:
    report["rows"][0]["variant"] = "<img src=x onerror=alert(1)>|`"
    assert "<img" not in render(report)
    assert cell("a|b<c>\n*d*") == r"a\|b&lt;c&gt; \*d\*"


def test_budget_misses_come_before_the_summary(report: dict[str, Any]) -> None:
    report["budget"] = {"met": False, "violations": [{"limit": "min_speedup", "sentence": "too slow"}]}
    text = render(report)
    assert text.index("too slow") < text.index("faster than dense")
