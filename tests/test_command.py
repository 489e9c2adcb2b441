"""The frame of every command: exit statuses, one line per failure, consoles, interrupts."""

import gc
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from lookahead_jax.host.command import run_command
from lookahead_jax.host.config_files import UsageError

ROOT = Path(__file__).parent.parent


def fails(error, **options):
    def work(config):
        raise error

    return run_command(lambda: None, work, prog="tool", **options)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("two\nlines"), 1, "two lines"),
        (FileNotFoundError(2, "No such file", "x.txt"), 1, "x.txt: No such file"),
        (FloatingPointError("no finite loss"), 1, "no finite loss"),
        (KeyError("name"), 1, "unexpected KeyError: 'name'"),
        (UsageError("--x"), 2, "--x (see tool --help)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_failure_is_one_line_and_a_status(error, status, line, capsys):
    assert fails(error) == status
    assert capsys.readouterr().err == f"tool: error: {line}\n"


def test_warnings_are_notices(capsys):
    assert run_command(lambda: "careful", warnings.warn, prog="tool") == 0
    assert capsys.readouterr().err == "tool: notice: careful\n"


def test_an_interrupt_that_a_finaliser_drops_is_raised_again(capsys):
    class Finalised:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # the exception is raised here, and dropped

    def work(config):
        item = Finalised()
        del item
        gc.collect()
        until = time.monotonic() + 20
        while time.monotonic() < until:
            time.sleep(0.01)

    assert run_command(lambda: None, work, prog="tool") == 130
    assert capsys.readouterr().err == "tool: error: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_becomes_another_error_is_an_interrupt(capsys):
    def work(config):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise ImportError("half of a module") from None

    assert run_command(lambda: None, work, prog="tool") == 130
    assert capsys.readouterr().err == "tool: error: interrupted\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_console_without_a_character_shows_a_substitute(encoding, tmp_path):
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from lookahead_jax.host.command import run_command\n"
        "from lookahead_jax.host.files import atomic_write\n"
        "def work(config):\n"
        "    print('caf\\u00e9 \\u65e5 \\U0001f600'); atomic_write(sys.argv[1], 'caf\\u00e9')\n"
        "    raise ValueError('caf\\u00e9 \\u65e5')\n"
        "sys.exit(run_command(lambda: None, work, prog='tool'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out"],
        env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=False,
    )  # fmt: skip
    cafe = "café".encode(encoding, "replace")
    assert run.stdout == cafe + b" ? ?\n"
    assert run.stderr == b"tool: error: " + cafe + b" ?\n"
    assert run.returncode == 1
    assert (tmp_path / "out").read_bytes() == "café".encode()
