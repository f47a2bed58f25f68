"""`deployopt plan` on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from deployopt.report import units


def render(facts: Mapping[str, Any], console: Console) -> None:
    """One line a step that runs or is cached; unavailable ones by reason. What is not here is said once, with its remedy."""
    if facts["data_problem"]:
        console.print(f"not here: {facts['data_problem']}", soft_wrap=True, markup=False, style="red")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("step", "left"), ("", "left"), ("time", "right"), ("why", "left")):
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name in ("", "time"))  # type: ignore[arg-type]
    for step in facts["steps"]:
        if step["cached"] or step["runs"]:
            state = "[green]cached[/]" if step["cached"] else "[yellow]run[/]"
            table.add_row(step["id"], state, units.seconds(step["seconds"]), "" if facts["data_problem"] else step["why"] or "")
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for step in facts["steps"]:
        if not step["cached"] and not step["runs"]:
            reasons.setdefault(step["why"], []).append(step["id"])
    for reason, steps in reasons.items():
        console.print(f"not here ({len(steps)} step{'s' if len(steps) > 1 else ''}): {reason}", soft_wrap=True, markup=False, style="dim")
    unknown = "what they need is not here" if facts["data_problem"] else "some steps never ran here"
    total = f"unknown ({unknown})" if facts["seconds"] is None else units.seconds(facts["seconds"])
    processes = f", training in {facts['processes']} processes" if facts["processes"] > 1 else ""
    console.print(f"on {facts['device']}, {facts['threads']} threads{processes}; time for what would run: {total}")
