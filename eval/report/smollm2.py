"""`lookahead eval smollm2`: the published table of the modules that ship for SmolLM2, renewed.

    lookahead eval smollm2 [--out DIR] [--count N ...]

Runs eval/grid/configs/smollm2.json, any field of which can be set, and prints the table: a row for
each policy, a column for each task and budget. The same command resumes a run. Default of --out:
~/.cache/lookahead_jax/eval/smollm2.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lookahead_jax.eval.grid.config import RunConfig, parse_run
from lookahead_jax.eval.grid.rows import GridCell
from lookahead_jax.eval.grid.run import run
from lookahead_jax.eval.report.cells import Report, distinct
from lookahead_jax.eval.report.stats import Stat
from lookahead_jax.host.command import run_command
from lookahead_jax.host.files import atomic_write

_CONFIG = "smollm2"


def parse(args: Sequence[str]) -> RunConfig:
    """Options -> the run; ValueError or UsageError as `parse_run`."""
    out = [] if any(arg.split("=")[0] == "--out" for arg in args) else ["--out", str(_default())]
    return parse_run([_CONFIG, *out, *args])


def renew(config: RunConfig) -> None:
    """Runs what is missing, prints the table, and writes it to `table.md` of the run."""
    run(config)
    text = table(Report([config.out]))
    atomic_write(config.out / "table.md", text)
    print(text, end="")


def table(report: Report) -> str:
    """Mean scores with 95 % intervals as a Markdown table, in which `full` has one budget: all."""
    cells = list(report.cells)
    budgets = sorted({cell.budget for cell in cells if cell.policy != "full"}) or [0]
    columns = [
        (task, length, protocol, budget)
        for length in distinct("length", cells)
        for protocol in distinct("protocol", cells)
        for task in distinct("task", cells)
        for budget in budgets
    ]
    heads = [f"{task}, {length}, {kind}, {kept} kept" for task, length, kind, kept in columns]
    lines = ["| policy | mean | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    for policy in distinct("policy", cells):
        found = [_cell(cells, policy, column) for column in columns]
        stats = [report.mean(group) for group in found]
        mean = report.mean([cell for group in found for cell in group])
        lines.append(f"| {policy} | {_text(mean)} | " + " | ".join(map(_text, stats)) + " |")
    return "\n".join(lines) + "\n"


def _cell(cells: Sequence[GridCell], policy: str, column: tuple[str, int, str, int]) -> list:
    """The cell of a policy in a column, if it was run."""
    task, length, protocol, budget = column
    return [
        cell
        for cell in cells
        if (cell.policy, cell.task, cell.length, cell.protocol) == (policy, task, length, protocol)
        and cell.budget in (budget, 0)
    ][:1]


def _text(stat: Stat | None) -> str:
    return "" if stat is None else f"{stat.mean:.2f} ({stat.low:.2f} to {stat.high:.2f})"


def _default() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lookahead_jax" / "eval" / _CONFIG


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    given = list(sys.argv[1:] if args is None else args)
    return run_command(lambda: parse(given), renew, prog="lookahead eval smollm2")


if __name__ == "__main__":
    sys.exit(main())
