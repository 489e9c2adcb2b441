"""Whether two sympy expressions are equal, by their values; the size of every value is bounded."""

import random
from typing import Any

import sympy

from lookahead_jax.eval.scorers.bounded_terms import (
    LARGEST,
    LARGEST_FACTORIAL,
    Unreadable,
    logarithm,
)

_PRECISION = 130  # digits of a value
_CLOSE = sympy.Float("1e-100")  # of two values, relative to the larger one
_FACTORIALS = (sympy.factorial, sympy.binomial)
_POINTS = ((0, 1), (1, 2), (-1, 0), (-2, 2), (2, 9))  # a variable is drawn between these


def equal(a: Any, b: Any) -> bool:
    """Whether two expressions of `term` have the same value wherever both are defined.

    Rational numbers are compared exactly. Others are compared to 100 digits, and expressions with
    variables at random points where both are real (or both contain i), of which there must be two:
    short terms that differ do not come this close.
    """
    if a == b:
        return True
    if a.is_Rational and b.is_Rational:
        return False
    pairs = list(_values(a, b))
    return len(pairs) >= (2 if a.free_symbols | b.free_symbols else 1) and all(
        _close(x, y) for x, y in pairs
    )


def proportional(a: Any, b: Any) -> bool:
    """Whether a = 0 and b = 0 are one equation: a/b is the same number at random points."""
    ratios = [x / y for x, y in _values(a, b) if x != 0 and y != 0]
    return len(ratios) >= 2 and all(_close(ratios[0], ratio) for ratio in ratios[1:])


def _close(a: Any, b: Any) -> bool:
    larger = max(abs(a), abs(b))
    return bool(larger < _CLOSE or abs(a - b) <= _CLOSE * larger)


def _values(a: Any, b: Any):
    """The values of both expressions, at several points if they have variables."""
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    complex_too = a.has(sympy.I) or b.has(sympy.I) or not symbols
    for low, high in _POINTS if symbols else _POINTS[:1]:
        at = {s: _point(f"{s} {low} {high}", low, high) for s in symbols}
        try:
            pair = _value(a, at), _value(b, at)
        except ValueError:  # Unreadable, or sympy's at a pole
            continue
        if complex_too or all(sympy.im(x) == 0 for x in pair):
            yield pair


def _point(name: str, low: int, high: int) -> Any:
    return sympy.Float(str(random.Random(name).uniform(low, high)), _PRECISION)


def _value(expression: Any, at: dict[Any, Any]) -> Any:
    """The number at a point, from the leaves up; Unreadable for one that is too large or none."""
    if expression in at:
        return at[expression]
    if expression.is_Rational:
        return expression
    parts = [_value(part, at) for part in expression.args]
    if expression.is_Pow:
        bounded = abs(parts[1]) * (1 + logarithm(parts[0])) <= LARGEST
    else:
        most = LARGEST_FACTORIAL if isinstance(expression, _FACTORIALS) else LARGEST
        bounded = not expression.is_Function or all(abs(part) <= most for part in parts)
    if not bounded:
        raise Unreadable("a large value")
    value = (expression.func(*parts) if parts else expression).evalf(_PRECISION)
    if not value.is_number or not value.is_finite:
        raise Unreadable("no value")
    return value
