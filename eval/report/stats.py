"""Rows -> means with 95 % intervals, per cell and over the cells of a chart."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lookahead_jax.eval.grid.rows import (
    MEASURED,
    ROWS,
    VIEWED,
    VIEWS,
    GridCell,
    key_of,
    read_rows,
)
from lookahead_jax.eval.intervals import of_mean, of_pairs, of_share

Row = Mapping[str, Any]


class Stat(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


def read_runs(runs: Sequence[Path]) -> dict[GridCell, list[dict[str, Any]]]:
    """The rows of several runs by cell; if a row occurs twice, the last one counts.

    Each row gets its place, `file` and `line`. Raises ValueError if there are no rows, or foreign
    ones.
    """
    latest: dict[Any, dict[str, Any]] = {}
    for run in runs:
        for line, row in enumerate(read_rows(run / ROWS, MEASURED), 1):
            latest[key_of(row)] = row | {"file": str(run / ROWS), "line": line}
    if not latest:
        raise ValueError(f"no rows in {', '.join(map(str, runs))}")
    cells: dict[GridCell, list[dict[str, Any]]] = defaultdict(list)
    for (cell, _), row in latest.items():
        cells[cell].append(row)
    return dict(cells)


def read_views(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """The kept tokens of chosen examples, the last of those that occur twice."""
    return list({key_of(v): v for run in runs for v in read_rows(run / VIEWS, VIEWED)}.values())


def scores(rows: Iterable[Row]) -> list[float]:
    """The scores of rows that have one."""
    return [row["score"] for row in rows if row["score"] is not None]


def accuracy(rows: Sequence[Row]) -> Stat | None:
    """Mean score, with Wilson's interval for shares and Student's for graded scores, if any."""
    values = scores(rows)
    if not values:
        return None
    mean, n = float(np.mean(values)), len(values)
    return Stat(mean, *of_share(mean, n), n) if all(r["binary"] for r in rows) else graded(values)


def graded(values: Sequence[float]) -> Stat:
    """Mean of values in [0, 1] with Student's interval; that of a single one is [0, 1]."""
    low, high = of_mean(values)
    return Stat(float(np.mean(values)), max(low, 0.0), min(high, 1.0), len(values))


def measures(rows: Sequence[Row]) -> dict[str, Stat]:
    """Name -> mean of the benchmark's other measures."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row.get("measures", {}).items():
            by_name[name].append(value)
    return {name: graded(values) for name, values in by_name.items()}


def difference(rows: Sequence[Row], theirs: Mapping[str, float]) -> Stat | None:
    """Mean difference of scores from those of the same examples; None without common ones.

    `theirs` has scores by the id of an example. A single graded pair has no interval: None.
    """
    common = [row for row in rows if row["id"] in theirs and row["score"] is not None]
    if not common or (len(common) == 1 and not common[0]["binary"]):
        return None
    pairs = [(row["score"], theirs[row["id"]]) for row in common]
    return Stat(*of_pairs(pairs, binary=all(row["binary"] for row in common)), len(pairs))


def average(stats: Sequence[Stat], least: float = 0.0) -> Stat:
    """Mean over tasks with equal weights; half-widths of independent intervals add in squares.

    No end of the interval lies below `least` or above 1.
    """
    count = len(stats)
    mean = sum(s.mean for s in stats) / count
    below = math.sqrt(sum((s.mean - s.low) ** 2 for s in stats)) / count
    above = math.sqrt(sum((s.high - s.mean) ** 2 for s in stats)) / count
    return Stat(mean, max(mean - below, least), min(mean + above, 1.0), sum(s.n for s in stats))


def overhead(rows: Sequence[Row], full: Sequence[Row]) -> list[float]:
    """The time that a policy adds to the first token, as a share of the full cache's time.

    One value per batch. Batches that were read both ways, next to each other (`pair_times`), are
    compared with themselves; others with the full cache's own rows, by their examples.
    """
    base = {row["id"]: row["ttft_s"] for row in full}
    ratios: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        beside = row.get("full_ttft_s") or base.get(row["id"])
        if beside is not None and row["ttft_s"] is not None:
            ratios[row["first_of_batch"]].append(row["ttft_s"] / beside - 1)
    return [float(np.mean(values)) for values in ratios.values()]


def spread(values: Sequence[float]) -> Stat | None:
    """Mean of measured values with Student's interval; None without values.

    The interval of a single value is drawn as empty: it has no finite one.
    """
    if not values:
        return None
    mean = float(np.mean(values))
    low, high = of_mean(values) if len(values) > 1 else (mean, mean)
    return Stat(mean, low, high, len(values))
