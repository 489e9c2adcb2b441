"""`python -m lookahead_jax.eval COMMAND ...` is `lookahead eval COMMAND ...`.

Without one of the commands' names, the arguments are those of `run`.
"""

import sys
from collections.abc import Callable, Sequence

_USAGE = """\
usage: lookahead eval run [CONFIG] [options]      answer a grid of tasks
       lookahead eval report RUN... [options]    write a page with charts of runs
       lookahead eval compare [options]          compare eviction policies
       lookahead eval frontier [CONFIG] [options] compare at equal bytes of cache
       lookahead eval agreement [options]        compare cut caches with the full one
       lookahead eval smollm2 [options]          renew the table of SmolLM2's modules
"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs one of the commands; returns the exit status.

    Progress goes to stderr, and a failure is one line there.
    """
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] in (["-h"], ["--help"]):
        print(_USAGE)
        return 0
    name = args[0] if args else ""
    if name in ("run", "report", "compare", "frontier", "agreement", "smollm2"):
        return _command(name)(args[1:])
    return _command("run")(args)


def _command(name: str) -> Callable[[Sequence[str]], int]:
    """The `main` of a command; only what it needs is imported."""
    match name:
        case "report":
            from lookahead_jax.eval.report.report import main as command
        case "compare":
            from lookahead_jax.eval.compare.compare import main as command
        case "frontier":
            from lookahead_jax.eval.frontier.frontier import main as command
        case "agreement":
            from lookahead_jax.eval.agreement.agreement import main as command
        case "smollm2":
            from lookahead_jax.eval.report.smollm2 import main as command
        case _:
            from lookahead_jax.eval.grid.run import main as command
    return command


if __name__ == "__main__":
    sys.exit(main())
