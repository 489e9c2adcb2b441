"""`lookahead eval smollm2`: the published table of the modules that ship for SmolLM2, renewed.

    lookahead eval smollm2 [--out DIR] [--count N ...]

Runs eval/grid/configs/smollm2.json, any field of which can be set, and prints the table: a row for
each policy, and for each budget a column of the mean over tasks and one for each task. The same
command resumes a run. Default of --out: ~/.cache/lookahead_jax/eval/smollm2.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lookahead_jax.eval.grid.config import RunConfig, parse_run
from lookahead_jax.eval.grid.rows import GridCell
from lookahead_jax.eval.grid.run import run
from lookahead_jax.eval.report.cells import Report, distinct
from lookahead_jax.eval.report.stats import Stat
from lookahead_jax.host.command import run_command
from lookahead_jax.host.files import atomic_write

_CONFIG = "smollm2"
_PROG = "lookahead eval smollm2"


class _Column(NamedTuple):
    """The mean over some tasks, at one length, protocol and budget."""

    head: str
    length: int
    protocol: str
    budget: int
    tasks: list[str]


def parse(args: Sequence[str]) -> RunConfig:
    """Options -> the run; ValueError or UsageError as `parse_run`."""
    out = [] if any(arg.split("=")[0] == "--out" for arg in args) else ["--out", str(_default())]
    return parse_run([_CONFIG, *out, *args], _PROG)


def renew(config: RunConfig) -> None:
    """Runs what is missing, prints the table, and writes it to `table.md` of the run."""
    run(config)
    text = table(Report([config.out]))
    atomic_write(config.out / "table.md", text)
    print(text, end="")


def table(report: Report) -> str:
    """Mean scores with 95 % intervals as a Markdown table; `full` has the same for every budget.

    Means are over tasks, never over budgets: those share their examples.
    """
    cells = list(report.cells)
    budgets = sorted({cell.budget for cell in cells if cell.policy != "full"}) or [0]
    tasks = distinct("task", cells)
    columns = [
        _Column(f"{length}, {protocol}, {budget} kept: {name}", length, protocol, budget, chosen)
        for length in distinct("length", cells)
        for protocol in distinct("protocol", cells)
        for budget in budgets
        for name, chosen in [("mean", tasks), *((task, [task]) for task in tasks)]
    ]
    heads = [column.head for column in columns]
    lines = ["| policy | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for policy in distinct("policy", cells):
        of_policy = [cell for cell in cells if cell.policy == policy]
        stats = [report.mean(_found(of_policy, column)) for column in columns]
        lines.append(f"| {policy} | " + " | ".join(map(_text, stats)) + " |")
    return "\n".join(lines) + "\n"


def _found(cells: Sequence[GridCell], column: _Column) -> list[GridCell]:
    """The cells that a column is the mean of; none of them unless all tasks were run."""
    found = [
        cell
        for cell in cells
        if (cell.length, cell.protocol) == (column.length, column.protocol)
        and cell.task in column.tasks
        and cell.budget in (column.budget, 0)
    ]
    return found if len(found) == len(column.tasks) else []


def _text(stat: Stat | None) -> str:
    return "" if stat is None else f"{stat.mean:.2f} ({stat.low:.2f} to {stat.high:.2f})"


def _default() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lookahead_jax" / "eval" / _CONFIG


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    given = list(sys.argv[1:] if args is None else args)
    return run_command(lambda: parse(given), renew, prog=_PROG)


if __name__ == "__main__":
    sys.exit(main())
