"""How the commands of this room end: one line on stderr, and an exit status."""

import sys
import warnings
from collections.abc import Callable
from typing import TypeVar

from lookahead_jax.host.config_files import UsageError, usage_errors

Config = TypeVar("Config")
EXPECTED = (ValueError, OSError, RuntimeError, ModuleNotFoundError)


def run_command(parse: Callable[[], Config], work: Callable[[Config], object], *, prog: str) -> int:
    """Parses, works, and returns the exit status: 0, 1 (failed), 2 (misused) or 130 (interrupted).

    A failure is one line on stderr, and so is a warning. `parse` may end in tyro's SystemExit.
    """
    try:
        with usage_errors():
            config = parse()
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *place: _say(prog, f"notice: {message}")
            work(config)
    except UsageError as error:
        _say(prog, f"error: {error} (see {prog} --help)")
        return 2
    except EXPECTED as error:
        _say(prog, f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say(prog, "interrupted; the same command resumes the run")
        return 130
    return 0


def _say(prog: str, message: str) -> None:
    print(f"{prog}:", " ".join(message.split()), file=sys.stderr, flush=True)
