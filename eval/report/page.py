"""What the report's template shows: the table of all cells, and the data of the page's script."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lookahead_jax.eval.grid.rows import GridCell
from lookahead_jax.eval.report.cells import Report, model_name
from lookahead_jax.eval.report.stats import measures, spread

LONGEST = 240  # characters of a prediction that the page shows
NAMES = ("model", "task", "tokens", "question", "policy", "kept", "drafter", "strategy")
NUMBERS = (
    "score", "95 %", "other measures", "n", "ms to first token", "95 %", "added to full",
    "cache MB", "peak MB",
)  # fmt: skip


class TableRow(NamedTuple):
    """A cell of the grid in the table of all cells."""

    names: Sequence[str]  # one per NAMES
    numbers: Sequence[Sequence[str]]  # lines of text, one list per NUMBERS
    href: str


def table_rows(report: Report) -> list[TableRow]:
    """One row per cell of the grid."""
    return [
        TableRow(_names(cell), _numbers(report, cell), report.href([cell])) for cell in report.cells
    ]


def _names(cell: GridCell) -> list[str]:
    fields = (
        model_name(cell.model), cell.task, cell.length, cell.protocol, cell.policy,
        cell.budget or "all", cell.drafter, cell.strategy,
    )  # fmt: skip
    return [str(field) for field in fields]


def _numbers(report: Report, cell: GridCell) -> list[list[str]]:
    rows = report.cells[cell]
    stat, ttft = report.stats.get(cell), report.first_token(cell)
    added = spread(report.overheads(cell))
    peaks = [row["peak_bytes"] for row in rows if row["peak_bytes"] is not None]
    bound = "≤ " if any(row["peak_is_bound"] for row in rows) else ""
    return [
        ["–" if stat is None else f"{stat.mean:.3f}"],
        ["" if stat is None else f"{stat.low:.2f}–{stat.high:.2f}"],
        [
            f"{name} {value.mean:.3f} ({value.low:.2f}–{value.high:.2f})"
            for name, value in measures(rows).items()
        ],
        [str(len(rows))],
        ["–" if ttft is None else f"{1000 * ttft.mean:.1f}"],
        ["" if ttft is None or ttft.n < 2 else f"{1000 * ttft.low:.1f}–{1000 * ttft.high:.1f}"],
        [] if added is None else [
            f"{added.mean:+.1%}"
            + (f" ({added.low:+.1%} to {added.high:+.1%})" if added.n > 1 else "")
        ],
        [_megabytes(rows[0]["cache_bytes"])],
        [bound + _megabytes(max(peaks)) if peaks else "–"],
    ]  # fmt: skip


def data(report: Report, most: int) -> Mapping[str, Any]:
    """What the page's script shows on demand: at most `most` rows per cell, and the views."""
    return {
        "cells": [
            {
                "name": _described(cell), "file": rows[0]["file"], "total": len(rows),
                "rows": [_shown(row) for row in rows[:most]],
            }
            for cell, rows in report.cells.items()
        ],
        "views": [_view(view) for view in report.views],
    }  # fmt: skip


def _described(cell: GridCell) -> str:
    name = f"{cell.task}, {cell.length} tokens, question {cell.protocol}, {cell.policy}"
    kept = f", {cell.budget} kept" if cell.budget else ""
    drafter = "" if cell.drafter == "none" else f", drafter {cell.drafter}"
    strategy = "" if cell.strategy == "none" else f", strategy {cell.strategy}"
    return f"{name}{kept}{drafter}{strategy}"


def _shown(row: Mapping[str, Any]) -> list[Any]:
    return [
        row["id"], row["score"], _cut(row["predicted_answer"]), _cut(" | ".join(row["answer"])),
        _cut(row["question"]), row["prompt_tokens"], row["new_tokens"],
        None if row["ttft_s"] is None else round(row["ttft_s"], 4),
        row["line"], row.get("depth"), row.get("measures", {}),
    ]  # fmt: skip


def _view(view: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "group": f"{view['task']}, {view['length']} tokens, question {view['protocol']}, "
        f"example {view['id']}",
        "name": f"{view['policy']}, {view['budget']} kept",
        "pieces": view["pieces"],
        "kept": view["kept"],
        "answer": " | ".join(view["answer"]),
        "predicted": _cut(view["predicted_answer"]),
    }


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
