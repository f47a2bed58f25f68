"""`deployopt cache ls` on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from deployopt.report import units


def render(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One line a step, newest first, and the sum."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("key", no_wrap=True)
    table.add_column("stage")
    table.add_column("label", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    table.add_column("last used", no_wrap=True)
    for row in rows:
        table.add_row(row["key"][:12], row["stage"], row["label"] or "", units.size(row["bytes"]), units.seconds(row["seconds"]), row["used"][:16])
    console.print(table)
    console.print(f"{units.plural(len(rows), 'step')}, {units.size(sum(row['bytes'] for row in rows))}")
