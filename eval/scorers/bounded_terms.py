"""Powers, factorials and binomials of sympy expressions, refused where they would be huge."""

from typing import Any

import sympy

LARGEST = 20_000  # logarithm of a power of numbers, and argument of a function
LARGEST_FACTORIAL = 400  # the largest n of n! and of binomials
_EXPONENT = 4000  # the largest number as an exponent
_BITS = 16_000  # of a power of rational numbers
_ROOT_BITS = 2_000  # of a number whose root is taken
_HIGHEST = 3  # powers in exponents, which sympy evaluates once per level and again within each
_TALLEST = 2  # powers of powers with variables in the exponent, which sympy builds slowly


class Unreadable(ValueError):
    """A text is no term that this module reads."""


def power(base: Any, exponent: Any) -> Any:
    """base ** exponent; Unreadable if sympy would work long on it, or with a very large number."""
    if _height(exponent) >= _HIGHEST:
        raise Unreadable("powers in exponents")
    if exponent.is_number and exponent.is_finite and not abs(exponent.evalf(15)) <= _EXPONENT:
        raise Unreadable("a large power")
    if exponent.free_symbols and max(_towers(base), _towers(exponent)) >= _TALLEST:
        raise Unreadable("powers of powers of variables")
    if base.is_Rational and exponent.is_Rational:
        bits = (max(abs(base.p), base.q) - 1).bit_length()  # none of 0, 1 and -1
        if bits * abs(exponent) > _BITS or (not exponent.is_Integer and bits > _ROOT_BITS):
            raise Unreadable("a large power")
    elif base.is_number and exponent.is_number and not logarithm(base) * abs(exponent) <= LARGEST:
        raise Unreadable("a large power")
    return base**exponent


def logarithm(number: Any) -> Any:
    """The absolute value of a number's logarithm; 0 for 0."""
    return abs(sympy.log(number).evalf(15)) if number != 0 else 0


def _height(expression: Any) -> int:
    """How many powers stand in each other's exponents, at most."""
    inner = max(map(_height, expression.args), default=0)
    raised = expression.is_Pow or isinstance(expression, sympy.exp)
    return max(inner, 1 + _height(expression.exp)) if raised else inner


def _towers(expression: Any) -> int:
    """How many powers with variables in the exponent stand within each other, at most."""
    inner = max(map(_towers, expression.args), default=0)
    raised = expression.is_Pow or isinstance(expression, sympy.exp)
    return inner + (raised and bool(expression.exp.free_symbols))


def factorial(n: Any) -> Any:
    """n!; Unreadable for a number that is no integer, negative or large."""
    if n.is_number and not (n.is_Integer and 0 <= n <= LARGEST_FACTORIAL):
        raise Unreadable("a large factorial")
    return sympy.factorial(n)


def binomial(n: Any, k: Any) -> Any:
    """n over k; Unreadable for numbers that are no integers, or large."""
    if any(x.is_number and not (x.is_Integer and abs(x) <= LARGEST_FACTORIAL) for x in (n, k)):
        raise Unreadable("a large binomial")
    return sympy.binomial(n, k)
