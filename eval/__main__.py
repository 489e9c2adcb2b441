"""`python -m lookahead_jax.eval [CONFIG] ...`; `lookahead eval` calls the same function."""

import sys
from collections.abc import Sequence

_USAGE = """\
usage: lookahead eval run [CONFIG] [options]      answer a grid of tasks
       lookahead eval report RUN... [options]    write a page with charts of runs
       lookahead eval compare [options]          compare eviction policies
       lookahead eval smollm2 [options]          renew the table of SmolLM2's modules
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
    return _grid(args)


def _grid(args: Sequence[str]) -> int:
    from lookahead_jax.eval.grid.config import PROG, parse_run
    from lookahead_jax.eval.grid.run import run
    from lookahead_jax.host.command import run_command

    return run_command(lambda: parse_run(args), run, prog=PROG)


if __name__ == "__main__":
    sys.exit(main())
