"""`deployopt doctor` on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def render(facts: Mapping[str, Any], console: Console) -> None:
    """The machine, the packages, and each backend with what it can do here or what it lacks."""
    where = facts["environment"]
    cpu = where["cpu"]
    console.print(f"deployopt {facts['deployopt']}, Python {where['python']}, {where['os']}")
    console.print(f"CPU: {cpu['model']}, {cpu['cores']} cores, {' '.join(cpu['isa']) or 'no ISA flags of interest'}")
    gpus = where["gpus"]
    console.print("GPU: " + ("; ".join(f"{g['name']} (driver {g['driver']})" for g in gpus) if gpus else "none with a working NVIDIA driver"))
    console.print("packages: " + ", ".join(f"{name} {version}" for name, version in where["versions"].items()), soft_wrap=True)
    for extra, packages in facts["missing"].items():
        console.print(f"missing for '{extra}': {', '.join(packages)}  → pip install 'deployopt[{extra}]'", markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("backend", "version", "builds", "runs", "precisions"):
        table.add_column(name, no_wrap=name != "precisions")
    for name, backend in facts["backends"].items():
        offered = [p for p, reason in backend["precisions"].items() if reason is None]
        table.add_row(name, backend["version"] or "–", _yes(backend["builds"]), _yes(backend["runs"]), " ".join(offered) or "–")
    console.print(table)
    for name, backend in facts["backends"].items():
        if backend["reason"]:
            console.print(f"{name}: {backend['reason']}", markup=False, soft_wrap=True)
        for precision, reason in backend["precisions"].items():
            if reason:
                console.print(f"{name} {precision}: {reason}", markup=False, soft_wrap=True)


def _yes(value: bool) -> str:
    return "[green]yes[/]" if value else "[yellow]no[/]"
