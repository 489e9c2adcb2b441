"""Tiny Python functions: a docstring with public tests, and hidden tests that grade.

A program runs only where --allow-exec permits it, under limits (eval/scorers/limited_run.py).
"""

import ast
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lookahead_jax.eval.scorers.limited_run import run_python
from lookahead_jax.eval.tasks.base import Example, Source

PUBLIC, HIDDEN = 2, 6  # tests
_INDENT = "    "
_VOWELS = "aeiou"


class _Kind(NamedTuple):
    """A kind of function; `k` is a small number that each problem chooses."""

    name: str
    arguments: str
    text: str
    solve: Callable[..., Any]  # (k, *arguments)
    draw: Callable[[random.Random], Sequence[Any]]  # the arguments of one test


def _number(rng: random.Random) -> list[Any]:
    return [rng.randint(-9, 20)]


def _pair(rng: random.Random) -> list[Any]:
    return [rng.randint(-9, 20), rng.randint(-9, 20)]


def _numbers(rng: random.Random) -> list[Any]:
    return [[rng.randint(-9, 20) for _ in range(rng.randint(3, 6))]]


def _word(rng: random.Random) -> list[Any]:
    return ["".join(rng.choice("abcdeioprstu") for _ in range(rng.randint(4, 8)))]


_KINDS = (
    _Kind("add_scaled", "a, b", "Return a plus {k} times b.", lambda k, a, b: a + k * b, _pair),
    _Kind("larger", "a, b", "Return the larger of a and b, plus {k}.",
          lambda k, a, b: max(a, b) + k, _pair),
    _Kind("distance", "a, b", "Return {k} times the distance between a and b.",
          lambda k, a, b: k * abs(a - b), _pair),
    _Kind("divisible", "n", "Return True if n is divisible by {k}, else False.",
          lambda k, n: n % k == 0, _number),
    _Kind("shifted_square", "n", "Return the square of n minus {k}.",
          lambda k, n: n * n - k, _number),
    _Kind("clamp", "n", "Return n, but at least 0 and at most {k}.",
          lambda k, n: min(max(n, 0), k), _number),
    _Kind("total", "xs", "Return the sum of the numbers in xs, plus {k}.",
          lambda k, xs: sum(xs) + k, _numbers),
    _Kind("count_above", "xs", "Return how many numbers in xs are greater than {k}.",
          lambda k, xs: sum(x > k for x in xs), _numbers),
    _Kind("keep_below", "xs", "Return a list of the numbers in xs that are less than {k}.",
          lambda k, xs: [x for x in xs if x < k], _numbers),
    _Kind("scaled", "xs", "Return a list of the numbers in xs, each multiplied by {k}.",
          lambda k, xs: [k * x for x in xs], _numbers),
    _Kind("spread", "xs", "Return the largest number in xs minus the smallest, times {k}.",
          lambda k, xs: k * (max(xs) - min(xs)), _numbers),
    _Kind("descending", "xs", "Return the {k} largest numbers in xs, the largest first.",
          lambda k, xs: sorted(xs, reverse=True)[:k], _numbers),
    _Kind("repeat", "s", "Return s repeated {k} times.", lambda k, s: s * k, _word),
    _Kind("beginning", "s", "Return the first {k} characters of s in upper case.",
          lambda k, s: s[:k].upper(), _word),
    _Kind("reverse_tail", "s", "Return s reversed, without its first {k} characters.",
          lambda k, s: s[::-1][k:], _word),
    _Kind("vowels", "s", "Return the number of vowels in s, times {k}.",
          lambda k, s: k * sum(c in _VOWELS for c in s), _word),
)  # fmt: skip


def programs(source: Source) -> list[Example]:
    """Functions of all kinds in turn; the answer begins with the function's head.

    The head has no last line break: models write it together with the indentation.
    """
    found = []
    for i in range(source.count):
        rng = random.Random(f"{source.seed}/{i}")
        kind, k = _KINDS[i % len(_KINDS)], rng.randint(2, 5)
        cases: dict[str, tuple[Sequence[Any], Any]] = {}
        while len(cases) < PUBLIC + HIDDEN:
            arguments = kind.draw(rng)
            cases[repr(arguments)] = (arguments, kind.solve(k, *arguments))
        tests = list(cases.values())
        shown = "\n".join(
            f"{_INDENT}>>> {kind.name}({', '.join(map(repr, arguments))})\n{_INDENT}{right!r}"
            for arguments, right in tests[:PUBLIC]
        )
        head = (
            f"def {kind.name}({kind.arguments}):\n"
            f'{_INDENT}"""{kind.text.format(k=k)}\n\n{shown}\n{_INDENT}"""'
        )
        found.append(
            Example(
                id=str(i), context="Complete this Python function.\n\n",
                question=f"```python\n{head}\n```", prefix=f"```python\n{head}",
                max_new_tokens=48, stop=("```",),
                extra={"name": kind.name, "head": head, "tests": tests},
            )
        )  # fmt: skip
    return found


def _passes(prediction: str, example: Example, tests: Sequence[tuple[Sequence[Any], Any]]) -> bool:
    """Whether the function passes the tests: its head, and the indented lines of the prediction."""
    lines = itertools.takewhile(
        lambda line: not line.strip() or line.startswith(_INDENT), prediction.split("\n")
    )
    name, head = example.extra["name"], example.extra["head"]
    inputs, right = [list(a) for a, _ in tests], [value for _, value in tests]
    program = head + "\n".join(lines) + f"\nprint([{name}(*case) for case in {inputs!r}])\n"
    try:
        ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False  # most texts that are not complete: no process is started for them
    return run_python(program) == f"{right!r}\n"


def public_tests(prediction: str, example: Example) -> float:
    """Whether the function passes the tests that its docstring shows."""
    return float(_passes(prediction, example, example.extra["tests"][:PUBLIC]))


def hidden_tests(prediction: str, example: Example) -> float:
    """Whether the function passes the tests that no prompt shows."""
    return float(_passes(prediction, example, example.extra["tests"][PUBLIC:]))
