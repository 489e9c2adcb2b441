"""A final answer in LaTeX -> its structure, and whether two answers are the same.

An answer is a term, words, a list, a point or an interval, a matrix, a union, or an equation.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from lookahead_jax.eval.scorers.bounded_terms import Unreadable
from lookahead_jax.eval.scorers.latex_terms import LONGEST, term
from lookahead_jax.eval.scorers.latex_text import (
    clean,
    matching_end,
    split_outside,
    without_separators,
)
from lookahead_jax.eval.scorers.term_values import equal, proportional

_MOST = 32  # parts of a list, a row or a union
_AND = re.compile(r",|;|\\cup(?![A-Za-z])")
_MATRIX = re.compile(
    r"\\begin\{([pbB]?(?:small)?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL
)
_ORDER = {"<": "<", r"\lt": "<", r"\le": "<=", r"\leq": "<=", r"\leqslant": "<="}
_TURNED = {">": "<", r"\gt": "<", r"\ge": "<=", r"\geq": "<=", r"\geqslant": "<="}
_RELATION = re.compile(r"=|<|>|\\(?:lt|le|leq|leqslant|gt|ge|geq|geqslant|in)(?![A-Za-z])")
_NAME = re.compile(r"[A-Za-z\\{}_'()\[\],|\s]*")  # of a quantity: no digits, no operators


class Several(NamedTuple):
    """Values in any order: a list, a set, a union, or both signs of +-."""

    parts: tuple[Any, ...]


class Row(NamedTuple):
    """Values in order, with what stands around them: a point, an interval, a matrix."""

    around: str
    parts: tuple[Any, ...]


class Equation(NamedTuple):
    """Both sides of an equation, unread, and the name that the first one is, if it is one."""

    left: str
    right: str
    named: bool


def read_answer(text: str) -> Any:
    """The structure of a cleaned answer; Unreadable for what is none."""
    if not text or len(text) > LONGEST:
        raise Unreadable(f"empty, or more than {LONGEST} characters")
    text = without_separators(text)
    sign = re.search(r"\\(pm|mp)(?![A-Za-z])", text)
    parts, _ = split_outside(text, _AND)
    if len(parts) > _MOST:
        raise Unreadable(f"more than {_MOST} parts")
    if len(parts) > 1:
        return Several(_flat([read_answer(part.strip()) for part in parts]))
    sides, relations = split_outside(text, _RELATION)
    if relations:
        return _related([side.strip() for side in sides], relations)
    if matrix := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in re.split(r"\\\\(?:\[\d+pt\])?", matrix[2]) if row.strip()]
        if len(rows) * max(map(len, rows), default=0) > _MOST:
            raise Unreadable(f"more than {_MOST} parts")
        lines = tuple(Row("line", tuple(term(cell) for cell in row)) for row in rows)
        return Row("matrix", lines)
    if text.startswith(r"\{") and matching_end(text) == len(text):
        return Several(_flat([read_answer(text[2:-2].strip())]))
    if text[0] in "([" and text[-1] in ")]" and matching_end(text) == len(text):
        inner, commas = split_outside(text[1:-1], re.compile(","))
        if commas:
            if len(inner) > _MOST:
                raise Unreadable(f"more than {_MOST} parts")
            return Row(text[0] + text[-1], tuple(read_answer(part.strip()) for part in inner))
    if sign:
        upper = re.sub(r"\\pm(?![A-Za-z])", "+", re.sub(r"\\mp(?![A-Za-z])", "-", text))
        lower = re.sub(r"\\pm(?![A-Za-z])", "-", re.sub(r"\\mp(?![A-Za-z])", "+", text))
        return Several((term(upper), term(lower)))
    return term(text)


def _flat(values: Sequence[Any]) -> tuple[Any, ...]:
    """Values, and those of the lists among them."""
    return tuple(
        part
        for value in values
        for part in (value.parts if isinstance(value, Several) else (value,))
    )


def _related(sides: list[str], relations: list[str]) -> Any:
    r"""An equation; a membership's set; an order of a variable as the interval that it is.

    `x = a = b` is `x = b` if a equals b.
    """
    if relations == [r"\in"]:
        return read_answer(sides[1])
    if set(relations) == {"="}:
        if any(not _same_term(side, sides[-1]) for side in sides[1:-1]):
            raise Unreadable("sides that differ")
        return Equation(sides[0], sides[-1], _NAME.fullmatch(sides[0]) is not None)
    if all(relation in _TURNED for relation in relations):
        sides, relations = sides[::-1], [_TURNED[relation] for relation in reversed(relations)]
    elif all(relation in _ORDER for relation in relations):
        relations = [_ORDER[relation] for relation in relations]
    else:
        raise Unreadable("relations of several kinds")
    if len(sides) == 2:  # x < b, or a < x
        if term(sides[0]).is_Symbol:
            sides, relations = [r"-\infty", *sides], ["<", *relations]
        else:
            sides, relations = [*sides, r"\infty"], [*relations, "<"]
    if len(sides) != 3 or not term(sides[1]).is_Symbol:
        raise Unreadable("an order that is no interval")
    around = ("(" if relations[0] == "<" else "[") + (")" if relations[1] == "<" else "]")
    return Row(around, (term(sides[0]), term(sides[2])))


def _same_term(a: str, b: str) -> bool:
    return equal(term(a), term(b))


def same(answer: Any, given: Any) -> bool:
    """Whether a given answer is the right one; both are of `read_answer`.

    A side with a name is left out where the other answer has none: x = 5 is 5. Equations are the
    same if one is a multiple of the other. Lists may have any order.
    """
    if isinstance(answer, Equation) and isinstance(given, Equation):
        return _same_equation(answer, given)
    for one, other, turn in ((answer, given, False), (given, answer, True)):
        if isinstance(one, Equation):
            if not one.named and not _same_term(one.left, one.right):
                return False
            value = read_answer(one.right)
            return same(other, value) if turn else same(value, other)
    if isinstance(answer, Several) and isinstance(given, Several):
        return _same_in_any_order(answer.parts, given.parts)
    if isinstance(answer, Several) or isinstance(given, Several):
        return False
    if isinstance(answer, Row) and isinstance(given, Row):
        return (
            answer.around == given.around
            and len(answer.parts) == len(given.parts)
            and all(map(same, answer.parts, given.parts))
        )
    if isinstance(answer, Row) or isinstance(given, Row):
        return False
    return equal(answer, given)


def _same_in_any_order(answers: Sequence[Any], given: Sequence[Any]) -> bool:
    left = list(given)
    for part in answers:
        at = next((i for i, other in enumerate(left) if same(part, other)), None)
        if at is None:
            return False
        del left[at]
    return not left


def _same_equation(answer: Equation, given: Equation) -> bool:
    try:
        differences = [term(e.left) - term(e.right) for e in (answer, given)]
    except Unreadable:
        return clean(answer.left) == clean(given.left) and same(
            read_answer(answer.right), read_answer(given.right)
        )
    return proportional(*differences)
