"""The report as JUnit XML, so that any CI system lists the rows. One row is one test case; the budget is one more suite."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree import ElementTree

from deployopt.report import summary
from deployopt.report.summary import JsonRow, Report
from deployopt.report.verdict import headline

# XML 1.0 section 2.2: these may not stand in a document, not even escaped
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


class Case(NamedTuple):
    """A test case; `outcome` is "passed", "skipped", "failure" or "error"."""

    suite: str
    name: str
    seconds: float = 0.0
    outcome: str = "passed"
    message: str = ""
    output: str = ""


def clean(text: str) -> str:
    """Text without the characters XML forbids (terminal escapes in a foreign error message, say)."""
    return FORBIDDEN.sub("�", text)


def document(name: str, suites: dict[str, Sequence[Case]]) -> str:
    """A <testsuites> document of cases by suite."""
    root = ElementTree.Element("testsuites", name=clean(name))
    for suite_name, cases in suites.items():
        counts = {k: str(sum(c.outcome == k for c in cases)) for k in ("failure", "error", "skipped")}
        total = f"{sum(c.seconds for c in cases):.3f}"
        suite = ElementTree.SubElement(
            root, "testsuite", name=suite_name, tests=str(len(cases)), failures=counts["failure"], errors=counts["error"], skipped=counts["skipped"], time=total
        )
        for case in cases:
            element = ElementTree.SubElement(suite, "testcase", classname=clean(case.suite), name=clean(case.name), time=f"{case.seconds:.3f}")
            if case.outcome != "passed":
                ElementTree.SubElement(element, case.outcome, message=clean(case.message)).text = clean(case.message)
            if case.output:
                ElementTree.SubElement(element, "system-out").text = clean(case.output)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(row: JsonRow) -> Case:
    outcome = {"unavailable": "skipped", "failed": "failure", "invalid": "failure"}.get(row["status"], "passed")
    what, remedy = summary.split_remedy(row.get("reason"))
    message = f"{row['status']}: {what}" + (f" → {remedy}" if remedy else "") if outcome != "passed" else ""
    duration = (row.get("contract") or {}).get("duration_s") or 0.0
    host = summary.host(row)
    output = ", ".join(f"{k}={v}" for k, v in host.items() if not isinstance(v, list)) if host else row["status"]
    return Case(f"deployopt.{row['backend']}", summary.row_key(row), float(duration), outcome, message, output)


def render(report: Report) -> str:
    """The report as JUnit XML: unavailable rows are skipped, failed and invalid ones fail, each missed limit is a failure."""
    budget = report.get("budget") or {}
    limits = [Case("deployopt.budget", "budget", outcome="failure", message=v["sentence"]) for v in budget.get("violations") or []]
    limits = [
        c._replace(name=f"budget/{v['limit']}" + (f"/{v['row']}" if v["row"] else "")) for c, v in zip(limits, budget.get("violations") or [], strict=True)
    ]
    suites: dict[str, Sequence[Case]] = {
        "rows": [_case(r) for r in report["rows"]],
        "budget": limits or [Case("deployopt.budget", "budget", output=headline(report))],
    }
    return document(f"deployopt {report.get('run') or ''}".strip(), suites)
