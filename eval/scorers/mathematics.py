r"""Final answers of mathematics problems: found in a text, and compared exactly, without a judge.

The answer of a text is in its last complete \boxed{...} that is not empty; without one, what
follows the last "answer is", on that line; without this, its last number. Two answers are the same
if they are the same words, or if sympy finds the same value in both (latex_answers.py, beside this
file). What is not compared: units, the sign of percent, degrees and dollars, the order of a list.
A decimal must be exact: 0.33 is not 1/3.
"""

import re

from lookahead_jax.eval.scorers.latex_text import (
    choice_of,
    clean,
    is_words,
    without_spaces,
    words_of,
)
from lookahead_jax.eval.scorers.numbers import NUMBER

LONGEST = 1000  # characters of a final answer that is read
_BRACE = re.compile(r"\\(?:boxed|fbox|framebox)(?:\s*\{|(?![A-Za-z])\s*(\w))|\\.|[{}]", re.DOTALL)
_SAYS = re.compile(r"answer\s{0,8}(?:is|:|=)\s{0,8}:?\s{0,8}([^\n]+)", re.IGNORECASE)


def require_sympy() -> None:
    """Raises ModuleNotFoundError, saying what to install, without sympy."""
    try:
        import sympy  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the grader of mathematics needs sympy: pip install 'lookahead-jax[math]'"
        ) from None


def final_answer(text: str) -> str | None:
    """The final answer in a text; None if it has none."""
    if (boxed := _last_box(text)) is not None:
        return boxed
    if said := _SAYS.findall(text):
        line = said[-1][: 2 * LONGEST]  # what is longer is not read, and would take long to search
        formula = re.search(r"(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)", line)
        if formula:
            return formula[1] or formula[2]
        return re.split(r"\.(?:\s|$)", line.replace("**", ""))[0].strip()
    numbers = re.findall(NUMBER, text)
    return numbers[-1] if numbers else None


def _last_box(text: str) -> str | None:
    r"""What the last filled \boxed{...} holds, or the character of \boxed 5; in one pass."""
    opened: list[int | None] = []  # braces: where the content of a box begins, None for others
    last: tuple[int, int] | None = None
    for found in _BRACE.finditer(text):
        if found[1]:
            last = found.span(1)
        elif found[0] == "}":
            start = opened.pop() if opened else None
            later = start is not None and (last is None or start > last[0])
            if start is not None and later and text[start : found.start()].strip():
                last = start, found.start()
        elif found[0].endswith("{") and found[0] != r"\{":
            opened.append(found.end() if len(found[0]) > 1 else None)
    return None if last is None else text[slice(*last)].strip()


def same_answer(text: str, answer: str) -> float:
    """1 if the final answer of a text is `answer`.

    Raises ModuleNotFoundError without sympy.
    """
    given = final_answer(text)
    return float(given is not None and is_same(given, answer))


def is_same(given: str, answer: str) -> bool:
    """Whether a final answer is the right one."""
    require_sympy()
    if len(given) > LONGEST:
        return False
    from lookahead_jax.eval.scorers.latex_answers import read_answer, same

    if is_words(answer):
        letter = choice_of(answer)
        return words_of(given) == words_of(answer) or (
            letter is not None and choice_of(given) == letter
        )
    left, right = clean(given), clean(answer)
    if without_spaces(left) == without_spaces(right):
        return True
    try:
        return same(read_answer(right), read_answer(left))
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError):
        return False  # it is Unreadable, or sympy fails on it, which must not end an evaluation
