"""A reward for Python programs: the share of tests that they pass.

Programs run under the limits of limited_run.py, which is not a security boundary: whoever gives
this reward to a search permits that.
"""

import secrets
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from lookahead_jax.eval.scorers.limited_run import SECONDS, run_limited

Test = str | tuple[str, str]


def _whole(prompt: str, text: str) -> str:
    return prompt + text


def share_of_tests(
    tests: Sequence[Test],
    *,
    program: Callable[[str, str], str] = _whole,
    seconds: int = SECONDS,
) -> Callable[[str, str], float]:
    """A reward(prompt, text) for `lk.search`: which share of `tests` passes, from 0 to 1.

    A test is code that runs after the program and fails with an exception, or a pair of an input
    and the output for it, compared without white space at both ends. Each has an interpreter and
    `seconds` of its own. `program(prompt, text)` is the program's source, by default the one after
    the other. Raises ValueError without tests.
    """
    if not tests:
        raise ValueError("a share of no tests is no number: give at least one test")

    def reward(prompt: str, text: str) -> float:
        source = program(prompt, text)
        return sum(_passes(source, test, seconds) for test in tests) / len(tests)

    return reward


def _passes(source: str, test: Test, seconds: int) -> bool:
    given, expected = ("", None) if isinstance(test, str) else test
    end = secrets.token_hex(8)  # a program that exits before its test does not print it
    if expected is None:
        source = f"{source}\n{test}\nprint({end!r})\n"
    with tempfile.TemporaryDirectory(prefix="lookahead-exec-") as name:
        folder = Path(name)
        (folder / "program.py").write_text(source, encoding="utf-8", errors="replace")
        command = [sys.executable, "-I", str(folder / "program.py")]
        printed = run_limited(command, given, folder=folder, seconds=seconds)
    if printed is None:
        return False
    return printed.endswith(f"{end}\n") if expected is None else printed.strip() == expected.strip()
