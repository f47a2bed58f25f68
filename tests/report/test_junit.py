from typing import Any
from xml.etree import ElementTree

from deployopt.report.junit import render


def test_rows_are_cases_by_status(report: dict[str, Any]) -> None:
    root = ElementTree.fromstring(render(report))
    rows = root.find("testsuite[@name='rows']")
    assert rows is not None
    assert (rows.get("tests"), rows.get("skipped"), rows.get("failures")) == (str(len(report["rows"])), "10", "2")
    failed = rows.find("testcase[@name='prune/onnxruntime/fp16/b1']/failure")
    assert failed is not None
    assert "SIGSEGV" in failed.get("message", "")
    assert root.find("testsuite[@name='budget']/testcase/failure") is None


def test_a_missed_limit_fails(report: dict[str, Any]) -> None:
    report["budget"] = {"met": False, "violations": [{"limit": "min_speedup", "row": "qat/openvino/int8/b1", "sentence": "wanted 9x"}]}
    failure = ElementTree.fromstring(render(report)).find("testsuite[@name='budget']/testcase[@name='budget/min_speedup/qat/openvino/int8/b1']/failure")
    assert failure is not None
    assert failure.get("message") == "wanted 9x"


def test_characters_that_xml_forbids(report: dict[str, Any]) -> None:
    report["rows"][-1]["reason"] = 'died: \x1b[31m\x00 <&"> ]]>'
    message = ElementTree.fromstring(render(report)).findall("testsuite[@name='rows']/testcase/failure")[-1].get("message", "")
    assert '<&"> ]]>' in message
