"""What TensorRT fused, and what it added, in the engines of a report. Pure functions over the report's rows."""

from __future__ import annotations

from collections.abc import Sequence

from deployopt.report import summary
from deployopt.report.summary import JsonRow

TITLE = "What the engines fused"
LEAD = (
    "Read from each engine after its build. Unfused: INT8 layers whose result is written as a float that a kernel of its own quantises again. "
    "Reformats change a tensor's layout or type and compute nothing."
)
HEADERS = ("engine", "INT8 layers", "layers by precision", "Adds fused", "unfused", "reformats")


def table(rows: Sequence[JsonRow]) -> tuple[Sequence[str], list[list[str]]] | None:
    """(headers, a line for each engine whose layers are known); None without one."""
    engines = {f"{row['variant']}/{row['backend']}/{row['precision']}": row for row in rows if row.get("fusion") and row.get("verified")}
    return (HEADERS, [[name, *_cells(row)] for name, row in engines.items()]) if engines else None


def _cells(row: JsonRow) -> list[str]:
    verified, fusion = row["verified"], row["fusion"]
    executed = ", ".join(f"{count} {precision}" for precision, count in sorted(verified["executed"].items()))
    return [
        summary.quantized_cell(row),
        executed,
        f"{fusion['fused_adds']}/{fusion['adds']}",
        str(fusion["int8_to_float"]),
        str(fusion["reformats"]),
    ]
