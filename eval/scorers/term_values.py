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
_TINY = sympy.Float("1e-30")  # values below may be rounding errors: all others keep 100 digits
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
    return bool(abs(a - b) <= _CLOSE * max(abs(a), abs(b)))


def _values(a: Any, b: Any):
    """The values of both expressions, at several points if they have variables."""
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    complex_too = a.has(sympy.I) or b.has(sympy.I) or not symbols
    for low, high in _POINTS if symbols else _POINTS[:1]:
        at = {s: random.Random(f"{s} {low} {high}").uniform(low, high) for s in symbols}
        try:
            pair = _value(a, at), _value(b, at)
        except ValueError:  # Unreadable, or sympy's at a pole
            continue
        if complex_too or all(sympy.im(x) == 0 for x in pair):
            yield pair


def _value(expression: Any, at: dict[Any, float]) -> Any:
    """The number at a point; Unreadable for one that is too large or none.

    A tiny number is computed again with twice the digits: a rounding error, as is left of equal
    terms, gets smaller and is 0.
    """
    value = _rounded(expression, at, _PRECISION)
    if not 0 < abs(value) < _TINY:
        return value
    finer = _rounded(expression, at, 2 * _PRECISION)
    return sympy.Integer(0) if abs(finer) < _TINY * abs(value) else finer


def _rounded(expression: Any, at: dict[Any, float], digits: int) -> Any:
    """The number at a point, from the leaves up."""
    if expression in at:
        return sympy.Float(str(at[expression]), digits)
    if expression.is_Rational:
        return expression
    parts = [_rounded(part, at, digits) for part in expression.args]
    if expression.is_Pow:
        bounded = abs(parts[1]) * (1 + logarithm(parts[0])) <= LARGEST
    else:
        most = LARGEST_FACTORIAL if isinstance(expression, _FACTORIALS) else LARGEST
        bounded = not expression.is_Function or all(abs(part) <= most for part in parts)
    if not bounded:
        raise Unreadable("a large value")
    value = (expression.func(*parts) if parts else expression).evalf(digits)
    if not value.is_number or not value.is_finite:
        raise Unreadable("no value")
    return value
