"""What TensorRT fused, and what it added, in the engines of a report. Pure functions over the report's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deployopt.report import summary
from deployopt.report.summary import JsonRow

TITLE = "What the engines fused"
LEAD = (
    "Read from each engine after its build. Unfused: INT8 layers whose result is written as a float that a kernel of its own quantises again. "
    "Reformats change a tensor's layout or type and compute nothing. Products are convolutions and matrix products; "
    "all layers are those and what is left beside them."
)
HEADERS = ("engine", "INT8 products", "products by precision", "all layers by precision", "Adds fused", "unfused", "reformats")


def table(rows: Sequence[JsonRow]) -> tuple[Sequence[str], list[list[str]]] | None:
    """(headers, a line for each engine whose layers are known); None without one."""
    engines = {f"{row['variant']}/{row['backend']}/{row['precision']}": row for row in rows if row.get("fusion") and row.get("verified")}
    return (HEADERS, [[name, *_cells(row)] for name, row in engines.items()]) if engines else None


def _cells(row: JsonRow) -> list[str]:
    verified, fusion = row["verified"], row["fusion"]
    return [
        summary.quantized_cell(row),
        _by_precision(verified["executed"]),
        _by_precision(fusion.get("layers", {})),  # older reports have none
        f"{fusion['fused_adds']}/{fusion['adds']}",
        str(fusion["int8_to_float"]),
        str(fusion["reformats"]),
    ]


def _by_precision(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {precision}" for precision, count in sorted(counts.items()))
