"""`python -m lookahead_jax.eval [CONFIG] ...`, which `lookahead eval` calls, too."""

import sys
from collections.abc import Sequence

from lookahead_jax.eval.command import run_command
from lookahead_jax.eval.grid.config import PROG, parse_run

_USAGE = """\
usage: python -m lookahead_jax.eval [CONFIG] [options]        answer a grid of tasks
       python -m lookahead_jax.eval report RUN... [options]   write a page with charts of runs
       python -m lookahead_jax.eval compare [options]         compare eviction policies
"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs a grid, a report or a comparison; returns the exit status.

    `report ...` and `compare ...` are those commands, everything else is `[CONFIG] [options]` of a
    grid. Progress goes to stderr, and a failure is one line there.
    """
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] == ["report"]:
        from lookahead_jax.eval.report.report import main as report

        return report(args[1:])
    if args[:1] == ["compare"]:
        from lookahead_jax.eval.compare.compare import main as compare

        return compare(args[1:])
    if args[:1] in (["-h"], ["--help"]):
        print(_USAGE)
    return run_command(lambda: parse_run(args), _run, prog=PROG)


def _run(config) -> None:
    print(f"{PROG}: starting JAX", file=sys.stderr, flush=True)
    from lookahead_jax.eval.grid.run import run

    run(config)


if __name__ == "__main__":
    sys.exit(main())
