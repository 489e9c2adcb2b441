"""The command line: every command is a frozen dataclass and a `main(config)` in commands/."""

import contextlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import tyro

from lookahead_jax.cli import demo, generate, inspect, logits, score, serve
from lookahead_jax.host.config_files import UsageError

COMMANDS = {
    generate.Generate: generate.main,
    score.Score: score.main,
    logits.Logits: logits.main,
    inspect.Inspect: inspect.main,
    demo.Demo: demo.main,
    serve.Serve: serve.main,
}
DESCRIPTION = "Long prompts through a fixed-budget KV cache."
EXPECTED = (ValueError, OSError, NotImplementedError, MemoryError)


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 (it failed) or 2 (it was misused).

    A failure is one line on stderr; LOOKAHEAD_DEBUG=1 adds the traceback.
    """
    try:
        config = parse(args)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *place: _say(f"notice: {message}")
            COMMANDS[type(config)](config)
        sys.stdout.flush()
    except UsageError as error:
        return _fail(f"{error} (see lookahead --help)", status=2)
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)
    except BrokenPipeError:  # the reader left, as `head` does; stdout must not be flushed again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except EXPECTED as error:
        return _fail(_message(error), status=1)
    except Exception as error:
        return _fail(f"unexpected {type(error).__name__}: {error}", status=1)
    return 0


def parse(args: Sequence[str] | None = None):
    """The dataclass of the command that `args` (or sys.argv) name; UsageError if none fits."""
    commands = {command.__name__.lower(): command for command in COMMANDS}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.extras.subcommand_cli_from_dict(
                commands,
                prog="lookahead",
                description=DESCRIPTION,
                args=args,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_unbox(complaint.getvalue())) from None


def _unbox(complaint: str) -> str:
    """The message inside the box that tyro draws: without its title, and the help after a rule."""
    parts: list[list[str]] = [[]]
    for line in complaint.splitlines():
        text = line.strip("│ ")
        if text and set(text) <= {"─", "-"}:
            parts.append([])
        elif not text.startswith(("╭", "╰")):
            parts[-1].append(text)
    title = 0 if complaint.startswith("╭") else 1  # part of the frame, or above a rule in ASCII
    return " ".join(parts[min(title, len(parts) - 1)])


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _fail(message: str, *, status: int) -> int:
    if os.environ.get("LOOKAHEAD_DEBUG") == "1":
        traceback.print_exc()
    _say(f"error: {message}")
    return status


def _say(message: str) -> None:
    print("lookahead:", " ".join(message.split()), file=sys.stderr)
