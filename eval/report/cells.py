"""The cells of some runs: selections of them, their means, and links to their rows."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lookahead_jax.eval.grid.rows import GridCell
from lookahead_jax.eval.report import charts
from lookahead_jax.eval.report.stats import (
    Stat,
    accuracy,
    average,
    measures,
    overhead,
    read_runs,
    read_views,
    spread,
)


class Report:
    """The cells of some runs, numbered in their order."""

    def __init__(self, runs: Sequence[Path]):
        self.cells = read_runs(runs)
        self.views = read_views(runs)
        self.number = {cell: i for i, cell in enumerate(self.cells)}
        policies = dict.fromkeys(c.policy for c in self.cells if c.policy != "full")
        palette = itertools.cycle(charts.PALETTE)
        self.colors = {name: next(palette) for name in policies} | {"full": charts.REFERENCE}
        self.stats = {c: s for c, rows in self.cells.items() if (s := accuracy(rows))}

    def select(self, **fields: Any) -> list[GridCell]:
        """Cells without a strategy that have these fields.

        Of several drafters one, since they do not change answers.
        """
        fields = {"strategy": "none"} | fields
        cells = [c for c in self.cells if all(getattr(c, k) == v for k, v in fields.items())]
        if "drafter" not in fields and cells:
            drafters = [c.drafter for c in cells]
            one = "none" if "none" in drafters else drafters[0]
            cells = [c for c in cells if c.drafter == one]
        return cells

    def href(self, cells: Sequence[GridCell]) -> str:
        """A link that opens the rows of cells."""
        return "#r=" + ",".join(str(self.number[c]) for c in cells)

    def mean(self, cells: Sequence[GridCell]) -> Stat | None:
        """The mean score of cells, one per task; None if one has no score."""
        stats = [self.stats[c] for c in cells if c in self.stats]
        return average(stats) if stats and len(stats) == len(cells) else None

    def overheads(self, cell: GridCell) -> list[float]:
        """The share that each batch of a cell adds to the full cache's time to first token."""
        full = self.cells.get(cell._replace(policy="full", budget=0), [])
        return overhead(self.cells[cell], full)

    def first_token(self, cell: GridCell) -> Stat | None:
        """Seconds to the first token, over the batches of a cell."""
        batches = {row["first_of_batch"]: row for row in self.cells[cell]}.values()
        return spread([row["ttft_s"] for row in batches if row["ttft_s"] is not None])

    def legend(self, cells: Sequence[GridCell]) -> list[tuple[str, str]]:
        """(policy, colour) of every policy among the cells."""
        return [(name, self.colors[name]) for name in distinct("policy", cells)]

    def numbers(self) -> list[dict[str, Any]]:
        """Every cell with its score, its interval, its times and its sizes."""
        lines = []
        for cell, rows in self.cells.items():
            stat, ttft = self.stats.get(cell), self.first_token(cell)
            beside = {name: _rounded(value) for name, value in measures(rows).items()}
            added = spread(self.overheads(cell))
            lines.append(
                cell._asdict()
                | {"n": len(rows), "score": stat and _rounded(stat)}
                | ({"measures": beside} if beside else {})
                | {"ttft_s": ttft and _rounded(ttft)}
                | ({"ttft_overhead": _rounded(added)} if added else {})
                | {"cache_bytes": rows[0]["cache_bytes"]}
            )
        return lines


def distinct(name: str, cells: Sequence[GridCell]) -> list[Any]:
    """The values of a field, in their first order; numbers ascending."""
    values = list(dict.fromkeys(getattr(c, name) for c in cells))
    return sorted(values) if values and isinstance(values[0], int) else values


def described(stat: Stat) -> str:
    """A mean with its interval, as text."""
    return f"{stat.mean:.3f} (95 %: {stat.low:.3f} to {stat.high:.3f}), n = {stat.n}"


def model_name(path: str) -> str:
    """The last part of a model's path."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def _rounded(stat: Stat) -> list[float]:
    return [round(value, 4) for value in (stat.mean, stat.low, stat.high)]
