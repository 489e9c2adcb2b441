r"""Final answers of mathematics problems: found in a text, and compared exactly, without a judge.

The answer of a text is in its last complete \boxed{...}; without one, what follows the last
"answer is", on that line; without this, its last number. Two answers are the same if they are the
same words, or if sympy finds the same value in both (eval/scorers/latex_terms.py). What is not
compared: units, the sign of percent, degrees and dollars, the order of a list. A decimal must be
exact: 0.33 is not 1/3.
"""

import re

from lookahead_jax.eval.scorers.latex_text import (
    choice_of,
    clean,
    is_words,
    words_of,
)
from lookahead_jax.eval.scorers.numbers import NUMBER

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*")
_SAYS = re.compile(r"answer\s*(?:is|:|=)\s*:?\s*([^\n]+)", re.IGNORECASE)


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
    for found in reversed(list(_BOX.finditer(text))):
        if (content := _braced(text, found.end())) is not None:
            return content
    if said := _SAYS.findall(text):
        formula = re.search(r"(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)", said[-1])
        if formula:
            return formula[1] or formula[2]
        return re.split(r"\.(?:\s|$)", said[-1].replace("**", ""))[0].strip()
    numbers = re.findall(NUMBER, text)
    return numbers[-1] if numbers else None


def _braced(text: str, at: int) -> str | None:
    r"""What is between the brace at `at` and its partner, or the one character of \boxed 5."""
    if not text.startswith("{", at):
        return text[at : at + 1] if text[at : at + 1].isalnum() else None
    depth = 0
    for found in re.finditer(r"\\.|[{}]", text[at:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return text[at + 1 : at + found.start()].strip()
    return None


def same_answer(text: str, answer: str) -> float:
    """1 if the final answer of a text is `answer`.

    Raises ModuleNotFoundError without sympy.
    """
    given = final_answer(text)
    return float(given is not None and is_same(given, answer))


def is_same(given: str, answer: str) -> bool:
    """Whether a final answer is the right one."""
    require_sympy()
    from lookahead_jax.eval.scorers.latex_answers import read_answer, same
    from lookahead_jax.eval.scorers.latex_terms import Unreadable

    if is_words(answer):
        letter = choice_of(answer)
        return words_of(given) == words_of(answer) or (
            letter is not None and choice_of(given) == letter
        )
    left, right = clean(given), clean(answer)
    if re.sub(r"\s", "", left) == re.sub(r"\s", "", right):
        return True
    try:
        return same(read_answer(right), read_answer(left))
    except Unreadable:
        return False
