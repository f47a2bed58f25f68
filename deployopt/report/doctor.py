"""`deployopt doctor` on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def render(facts: Mapping[str, Any], console: Console) -> None:
    """The machine, the packages, each backend and provider with what it can do here, and what to install for what it cannot."""
    where = facts["environment"]
    cpu = where["cpu"]
    console.print(f"deployopt {facts['deployopt']}, Python {where['python']}, {where['os']}")
    console.print(f"CPU: {cpu['model']}, {cpu['cores']} cores, {' '.join(cpu['isa']) or 'no ISA flags of interest'}")
    for line in [_gpu(index, gpu) for index, gpu in enumerate(facts["gpus"])] or [f"GPU: none: {facts['no_gpu']}"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    installed = [f"{name} {version}" for name, version in where["versions"].items() if version]
    console.print("packages: " + (", ".join(installed) or "none of those that deployopt uses"), soft_wrap=True)
    for extra, packages in facts["missing"].items():
        console.print(f"missing for '{extra}': {', '.join(packages)}  → pip install 'deployopt[{extra}]'", markup=False)
    console.print(_table(facts["backends"]))
    for name, backend in facts["backends"].items():
        if backend["reason"]:
            console.print(f"\n{name}: {backend['reason']}", markup=False, highlight=False)
        if backend["remedy"]:  # not wrapped: it is to be copied
            console.print(f"  → {backend['remedy']}", markup=False, highlight=False, soft_wrap=True)
    for name, backend in facts["backends"].items():
        if backend["builds"]:
            _not_offered(name, backend["precisions"], console)


def _gpu(index: int, gpu: Mapping[str, Any]) -> str:
    driver = f"driver {gpu['driver']}, which serves CUDA" if gpu["driver"] else "driver for CUDA"
    return f"GPU {index}: {gpu['name']}, compute capability {gpu['compute_capability']}, {driver} {gpu['cuda_driver']}"


def _table(backends: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("backend", "version", "builds", "runs", "precisions"):
        table.add_column(name, no_wrap=name != "precisions")
    for name, backend in backends.items():
        offered = [p for p, reason in backend["precisions"].items() if reason is None] if backend["builds"] else []
        version = (backend["version"] or "–").partition("-")[0]  # OpenVINO's goes on with the commit and the branch
        table.add_row(name, version, _yes(backend["builds"]), _yes(backend["runs"]), " ".join(offered) or "–")
    return table


def _not_offered(name: str, precisions: Mapping[str, str | None], console: Console) -> None:
    """Each reason once, with its precisions."""
    for reason in dict.fromkeys(r for r in precisions.values() if r):
        console.print(f"\n{name} {', '.join(p for p, r in precisions.items() if r == reason)}: {reason}", markup=False, highlight=False)


def _yes(value: bool) -> str:
    return "[green]yes[/]" if value else "[yellow]no[/]"
