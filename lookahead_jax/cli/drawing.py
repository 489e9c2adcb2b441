"""Tables for terminals that are Markdown too."""

from collections.abc import Sequence


def draw(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first two being the head and its rule, with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    )
