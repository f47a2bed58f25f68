from typing import Any

from deployopt.report import fusion, render

FUSION = {"adds": 8, "fused_adds": 6, "int8_to_float": 2, "reformats": 3, "layers": {"int8": 24, "fp32": 3}}


def engine(report: dict[str, Any]) -> dict[str, Any]:
    """The report, with what TensorRT-RTX fused in its INT8 engine told in each of its rows."""
    for row in report["rows"]:
        if row["backend"] == "tensorrt_rtx" and row["precision"] == "int8":
            row["fusion"] = dict(FUSION)
    return report


def test_each_engine_has_one_line_whatever_its_batch_sizes(report: dict[str, Any]) -> None:
    assert fusion.table(report["rows"]) is None
    told = fusion.table(engine(report)["rows"])
    assert told is not None
    headers, lines = told
    names = [f"{variant}/tensorrt_rtx/int8" for variant in dict.fromkeys(r["variant"] for r in report["rows"] if r.get("fusion"))]
    assert [line[0] for line in lines] == names
    assert dict(zip(headers, lines[0], strict=True)) | {
        "Adds fused": "6/8",
        "unfused": "2",
        "reformats": "3",
        "all layers by precision": "3 fp32, 24 int8",
    } == dict(zip(headers, lines[0], strict=True))


def test_markdown_and_the_page_tell_it_and_the_terminal_does_not(report: dict[str, Any]) -> None:
    told = engine(report)
    for kind in ("markdown", "html"):
        text = render(told, kind)
        assert fusion.TITLE in text
        assert "6/8" in text
    assert fusion.TITLE not in render(told, "terminal")
    assert fusion.TITLE not in render({**told, "rows": [{**row, "fusion": None} for row in told["rows"]]}, "markdown")
