"""Strategies compared: accuracy over tokens spent, with others and with samples at equal tokens.

The candidates of `best_of_n` and `self_consistency` are stored. Their first k are what the strategy
would have had with n=k, so for any number of tokens there is a baseline on the same examples. (With
`--most-tokens` the n candidates share that limit, and are shorter than fewer would be.)
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lookahead_jax.eval.grid.rows import GridCell
from lookahead_jax.eval.grid.strategies import NONE, ORACLE, decoding_of
from lookahead_jax.eval.report.cells import Report, described, distinct, model_name
from lookahead_jax.eval.report.charts import PALETTE, REFERENCE, Chart, Point, Series
from lookahead_jax.eval.report.figures import Section
from lookahead_jax.eval.report.stats import Row, Stat, accuracy, difference, spread
from lookahead_jax.strategies.self_consistency import SelfConsistency

BASELINES = ("self_consistency", "best_of_n")
NOTE = (
    "Tokens are those of all rows of an example, rows that were given up included. A line joins "
    "the first 1, 2, ... candidates of a baseline."
)
_Ranking = Callable[[Sequence[Row]], Sequence[float]]
"""Candidates -> what they are compared by, as if there were no others."""
_HEADS = ("task", "strategy", "right", "n", "tokens", "steps", "minus greedy")


def strategy_sections(report: Report) -> Iterator[tuple[str, list[Section]]]:
    """Accuracy over tokens spent: a heading for each setting that has strategies."""
    for name, cells in _settings(report):
        palette = itertools.cycle(PALETTE)
        others = [spec for spec in distinct("strategy", cells) if spec != NONE]
        colors = {NONE: REFERENCE} | {spec: next(palette) for spec in others}
        drawn = []
        for task in distinct("task", cells):
            of_task = [cell for cell in cells if cell.task == task and cell in report.stats]
            if not of_task:
                continue
            series = [_series(report, cell, colors[cell.strategy]) for cell in of_task]
            label, ticks = "tokens spent on an example", _ticks(series)
            drawn.append(Chart(title=task, x_label=label, series=series, log=True, ticks=ticks))
        legend = [(spec, colors[spec]) for spec in distinct("strategy", cells)]
        yield name, [Section(title="Strategies", charts=drawn, note=NOTE, legend=legend)]


def numbers(report: Report) -> list[dict[str, Any]]:
    """Every cell of a setting with strategies: its score, its work, and paired differences."""
    lines = []
    for _, cells in _settings(report):
        for task in distinct("task", cells):
            of_task = [cell for cell in cells if cell.task == task and cell in report.stats]
            lines += [_line(report, cell, of_task) for cell in of_task]
    return lines


def table(report: Report) -> str:
    """The numbers as Markdown, a table for each setting; empty without strategies."""
    parts = []
    every = numbers(report)
    for name, cells in _settings(report):
        known = set(cells)
        lines = [line for line in every if GridCell(*_key(line)) in known]
        against = list(dict.fromkeys(spec for line in lines for spec in line["equal_tokens"]))
        heads = [*_HEADS, *(f"minus {spec}, at its tokens" for spec in against)]
        rows = [_cells(line, against) for line in lines]
        marks = "|---" * len(heads) + "|"
        body = [f"| {' | '.join(row)} |" for row in (heads, *rows)]
        parts.append("\n".join([f"{name}\n", body[0], marks, *body[1:]]) + "\n")
    return "\n".join(parts)


def _settings(report: Report) -> Iterator[tuple[str, list[GridCell]]]:
    """The cells that differ in task and strategy only, where there are strategies."""

    def of(cell: GridCell) -> tuple:
        return cell.model, cell.length, cell.protocol, cell.policy, cell.budget

    # Drafters change no answer: one is enough.
    plain = {cell._replace(drafter=""): cell for cell in reversed(report.cells)}.values()
    plain = list(reversed(plain))
    for setting in dict.fromkeys(map(of, plain)):
        cells = [cell for cell in plain if of(cell) == setting]
        if any(cell.strategy != NONE for cell in cells):
            model, length, protocol, policy, budget = setting
            hidden = ", question hidden" if protocol == "hidden" else ""
            kept = f", {budget} kept" if budget else ""
            yield f"{model_name(model)}, {length} tokens{hidden}: {policy}{kept}", cells


def _line(report: Report, cell: GridCell, cells: Sequence[GridCell]) -> dict[str, Any]:
    rows = report.cells[cell]
    tokens = _mean([_tokens(row) for row in rows])
    steps = [float(n) for row in rows if (n := row.get("work_forwards")) is not None]
    same = (other for other in cells if other.task == cell.task and other.strategy == NONE)
    greedy = report.cells.get(next(same, cell._replace(strategy=NONE)))
    line: dict[str, Any] = cell._asdict() | {
        "reward": rows[0].get("reward"), "n": len(rows), "score": _rounded(report.stats[cell]),
        "work_tokens": _rounded(tokens), "work_forwards": _rounded(_mean(steps)) if steps else None,
        "minus_greedy": None, "equal_tokens": {},
    }  # fmt: skip
    if cell.strategy == NONE:
        return line
    if greedy is not None:
        line["minus_greedy"] = _difference(rows, {row["id"]: row["score"] for row in greedy})
    for other in cells:
        rank = _ranking(other)
        if rank is None or other == cell:
            continue
        theirs = {row["id"]: row for row in report.cells[other]}
        matched = {
            row["id"]: _at_tokens(theirs[row["id"]], _tokens(row), rank)
            for row in rows
            if row["id"] in theirs
        }
        if matched:
            gain = _difference(rows, {i: score for i, (score, _) in matched.items()})
            mean = float(np.mean([spent for _, spent in matched.values()]))
            line["equal_tokens"][other.strategy] = {
                "difference": gain, "tokens": round(mean, 1),
                "reward": report.cells[other][0].get("reward"),
            }  # fmt: skip
    return line


def _ranking(cell: GridCell) -> _Ranking | None:
    """How a baseline compares its candidates; None for other strategies."""
    if cell.strategy.partition(":")[0] not in BASELINES:
        return None
    strategy = decoding_of(cell.strategy).strategy
    if isinstance(strategy, SelfConsistency):
        return lambda candidates: strategy.votes([c["text"] for c in candidates])
    return lambda candidates: [c["compared"] for c in candidates]


def _first(row: Row, k: int, rank: _Ranking) -> tuple[float, float]:
    """Score and tokens of the first k candidates of a baseline's row."""
    candidates = _candidates(row)[:k]
    best = candidates[int(np.argmax(rank(candidates)))]
    return best["score"], float(sum(c["new_tokens"] for c in candidates))


def _candidates(row: Row) -> Sequence[Row]:
    alone = {
        "text": row["predicted_answer"], "new_tokens": _tokens(row), "compared": 0.0,
        "score": row["score"],
    }  # fmt: skip
    return row.get("candidates", [alone])


def _at_tokens(row: Row, tokens: float, rank: _Ranking) -> tuple[float, float]:
    """Score and tokens of as many candidates as take about `tokens`, at least one."""
    sums = np.cumsum([c["new_tokens"] for c in _candidates(row)])
    return _first(row, int(np.abs(sums - tokens).argmin()) + 1, rank)


def _series(report: Report, cell: GridCell, color: str) -> Series:
    """A strategy's accuracy over its tokens; of a baseline for each number of candidates."""
    rows, name = report.cells[cell], _name(cell.strategy, report.cells[cell][0].get("reward"))
    points, rank = [], _ranking(cell)
    most = 1 if rank is None else min(len(_candidates(row)) for row in rows)
    for k in range(1, most + 1):
        if rank is None:
            stat, tokens = report.stats[cell], [_tokens(row) for row in rows]
        else:
            found = [_first(row, k, rank) for row in rows]
            stat = accuracy([{**row, "score": s} for row, (s, _) in zip(rows, found, strict=True)])
            tokens = [spent for _, spent in found]
        spent = _mean(tokens)
        if stat is not None:
            note = f"{name}, {spent.mean:.0f} tokens: {described(stat)}"
            point = (spent.mean, *stat[:3], report.href([cell]), note)
            points.append(Point(*point, max(spent.low, 1.0), spent.high))
    return Series(name, color, points, joined=len(points) > 1)


def _ticks(series: Sequence[Series]) -> list[float]:
    """The powers of two among the tokens of all points."""
    spent = [point.x for one in series for point in one.points]
    if not spent:
        return []
    powers = range(int(np.log2(min(spent))), int(np.ceil(np.log2(max(spent)))) + 1)
    return [float(2**power) for power in powers]


def _difference(rows: Sequence[Row], theirs: Mapping[str, float]) -> list[float] | None:
    """Mean difference of the scores on common examples, with its interval, if there is one."""
    found = difference(rows, theirs)
    return None if found is None else _rounded(found)


def _tokens(row: Row) -> float:
    return float(row.get("work_tokens", row["new_tokens"]))


def _mean(values: Sequence[float]) -> Stat:
    stat = spread(values)
    assert stat is not None
    return stat


def _rounded(stat: Stat) -> list[float]:
    return [round(value, 4) for value in stat[:3]]


def _name(spec: str, reward: str | None) -> str:
    """A strategy, and whether it was told what is right."""
    shown = "greedy" if spec == NONE else spec
    shown = " ".join(shown.split()).replace("|", "\\|")  # as a cell of a table
    return f"{shown} (oracle)" if reward == ORACLE else shown


def _key(line: Mapping[str, Any]) -> list[Any]:
    return [line[name] for name in GridCell._fields]


def _cells(line: Mapping[str, Any], against: Sequence[str]) -> list[str]:
    score, low, high = line["score"]
    steps = line["work_forwards"]
    found = [line["equal_tokens"].get(spec) for spec in against]
    return [
        line["task"], _name(line["strategy"], line["reward"]),
        f"{score:.2f} ({low:.2f} to {high:.2f})", str(line["n"]),
        f"{line['work_tokens'][0]:.0f}", "" if steps is None else f"{steps[0]:.0f}",
        _signed(line["minus_greedy"]),
        *map(_against, found),
    ]  # fmt: skip


def _against(baseline: Mapping[str, Any] | None) -> str:
    if baseline is None:
        return ""
    return f"{_signed(baseline['difference'])}, {baseline['tokens']:.0f} tokens"


def _signed(difference: Sequence[float] | None) -> str:
    if difference is None:
        return ""
    mean, low, high = difference
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
