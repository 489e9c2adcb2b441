"""`python -m lookahead_jax` is the command `lookahead`."""

import sys


def entry() -> None:
    """Runs the command line and ends the process with its status."""
    try:
        from lookahead_jax.cli.main import main
        from lookahead_jax.host.command import end_process
    except KeyboardInterrupt:
        sys.exit("lookahead: error: interrupted")
    end_process(main())


if __name__ == "__main__":
    entry()
