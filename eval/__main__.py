"""`python -m lookahead_jax.eval CONFIG ...`: see run.py."""

import sys
from collections.abc import Sequence

from lookahead_jax.eval.grid.config import parse_run
from lookahead_jax.eval.grid.run import run


def main(args: Sequence[str] | None = None) -> int:
    """The command line; a failure is one line on stderr."""
    try:
        run(parse_run(sys.argv[1:] if args is None else args))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
