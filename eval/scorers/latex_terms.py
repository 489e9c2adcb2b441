"""A LaTeX term -> a sympy expression, and whether two expressions are equal.

Texts come from a model, so nothing here evaluates them as a program, and the work is bounded by
construction: by the length of a term, the depth of its brackets, the digits of its powers, and the
size of every value on the way. sympy is an optional extra; this module imports it.
"""

import random
import re
from collections.abc import Callable
from typing import Any

import sympy

LONGEST = 400  # characters of a term
_DEEPEST = 30  # brackets in brackets
_TALLEST = 2  # powers of powers with variables in the exponent, which sympy builds slowly
_DIGITS = 1000  # of a power of numbers
_FACTORIAL = 400  # the largest n of n! and of binomials
_PRECISION = 130  # digits of a value
_CLOSE = sympy.Float("1e-100")  # of two values, relative to the larger one
_LARGEST = 20_000  # logarithm of a power, and argument of a function
_FACTORIALS = (sympy.factorial, sympy.binomial)
_POINTS = ((0, 1), (1, 2), (-1, 0), (-2, 2), (2, 9))  # a variable is drawn between these
_TOKEN = re.compile(r"\d+\.?\d*|\.\d+|\\[A-Za-z]+|\\.|[A-Za-z]+|\S")


class Unreadable(ValueError):
    """A text is no term that this module reads."""


def _inverse(function: Callable) -> Callable:
    return lambda x: 1 / function(x)


_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    **{name: getattr(sympy, name) for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "exp")},
    "cot": _inverse(sympy.tan), "sec": _inverse(sympy.cos), "csc": _inverse(sympy.sin),
    "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan,
    "ln": sympy.log, "log": sympy.log,
}  # fmt: skip
_CONSTANTS = {
    "pi": sympy.pi, "e": sympy.E, "i": sympy.I,
    **dict.fromkeys(("infty", "infinity"), sympy.Symbol("infty")),  # an endpoint, not a number
}  # fmt: skip
_TIMES = {"*", r"\cdot", r"\times"}
_OVER = {"/", ":", r"\div"}
_CLOSING = {
    "(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil",
    "|": "|", r"\lvert": r"\rvert",
}  # fmt: skip
_AROUND = {"|": sympy.Abs, r"\lvert": sympy.Abs, r"\lfloor": sympy.floor, r"\lceil": sympy.ceiling}
_NO_FACTOR = {"+", "-", *_TIMES, *_OVER, *_CLOSING.values(), "^", "_", "!", "'", ",", "=", "<", ">"}
_SYMBOLS = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho "
    "sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell".split()
)


def term(text: str) -> Any:
    """The sympy expression of a term; Unreadable if it is none.

    Numbers are exact, decimals too. Letters are variables, but for e and i; letters side by side
    are a product. A number with an index, such as 52_8, is a variable of its own. An integer
    before a fraction of integers is a mixed number.
    """
    if len(text) > LONGEST or not text.isascii():
        raise Unreadable(f"more than {LONGEST} characters, or others than ASCII")
    parser = _Parser(text)
    value = parser.sum()
    if parser.next:
        raise Unreadable(f"{parser.next!r} is left over")
    if value.has(sympy.nan, sympy.zoo, sympy.oo, sympy.AccumBounds):
        raise Unreadable("a division by zero")
    return value


class _Parser:
    """Recursive descent over the tokens of a term."""

    def __init__(self, text: str):
        self._tokens: list[str] = []
        for token in _TOKEN.findall(text):
            known = token in _FUNCTIONS or token in _CONSTANTS or token == "sqrt"
            if token[0].isalpha() and not known:
                self._tokens += list(token)
            else:
                self._tokens.append("\\" + token if known and len(token) > 1 else token)
        self._at = self._depth = self._bars = 0

    @property
    def next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, token: str | None = None) -> str:
        found = self.next
        if not found or (token is not None and found != token):
            raise Unreadable(f"{token or 'a term'} is missing")
        self._at += 1
        return found

    def sum(self) -> Any:
        value = self._product()
        while self.next in ("+", "-"):
            sign = self._take()
            other = self._product()
            value = value + other if sign == "+" else value - other
        return value

    def _product(self) -> Any:
        if self.next in ("+", "-"):
            sign = self._take()
            return self._product() if sign == "+" else -self._product()
        value = self._factor()
        while True:
            if self.next in _TIMES:
                self._take()
                value = value * self._signed()
            elif self.next in _OVER:
                self._take()
                value = value / self._signed()
            elif self._starts_factor():
                value = value * self._factor()
            else:
                return value

    def _signed(self) -> Any:
        if self.next in ("+", "-"):
            return -self._signed() if self._take() == "-" else self._signed()
        return self._factor()

    def _starts_factor(self) -> bool:
        """Whether a factor follows without a sign; no number stands behind another factor."""
        token = self.next
        if token == "|":
            return self._bars == 0
        return bool(token) and token not in _NO_FACTOR and not token[0].isdigit()

    def _factor(self) -> Any:
        """An atom with its factorials and its power."""
        value = self._atom()
        while self.next in ("!", "^"):
            if self._take() == "!":
                value = _factorial(value)
            else:
                value = _power(value, self._exponent())
        return value

    def _exponent(self) -> Any:
        if self.next == "-":
            self._take()
            return -self._exponent()
        value = self._atom()
        return _power(value, self._exponent()) if self.next == "^" and self._take() else value

    def _atom(self) -> Any:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise Unreadable(f"more than {_DEEPEST} brackets in brackets")
        value = self._atom_at(self._take())
        self._depth -= 1
        return value

    def _atom_at(self, token: str) -> Any:
        if token[0].isdigit() or (token[0] == "." and token != "."):
            return self._number(token)
        if token in _CLOSING and token != r"\{":
            return self._enclosed(token)
        name = token.removeprefix("\\")
        if name == "frac":
            return self._argument() / self._argument()
        if name == "binom":
            return _binomial(self._argument(), self._argument())
        if name == "sqrt":
            degree = self._enclosed(self._take()) if self.next == "[" else sympy.Integer(2)
            return _power(self._atom(), 1 / degree)
        if name in _FUNCTIONS and len(name) > 1:
            return self._function(name)
        if name in _CONSTANTS and self.next != "_":
            return _CONSTANTS[name]
        if name in _SYMBOLS or (len(token) == 1 and token.isalpha()):
            return sympy.Symbol(name + self._index())
        raise Unreadable(f"unknown {token!r}")

    def _number(self, digits: str) -> Any:
        if index := self._index():
            return sympy.Symbol(digits + index)
        value = sympy.Rational(digits.rstrip("."))
        if self.next == r"\frac" and value.is_Integer and "." not in digits:
            start = self._at
            fraction = self._atom()
            if _proper(self._tokens[start : self._at]):
                return value + fraction
            self._at = start
        return value

    def _index(self) -> str:
        """An index with its underscore, without braces; empty if there is none."""
        if self.next != "_":
            return ""
        self._take()
        if self.next != "{":
            return "_" + self._take()
        self._take()
        parts = []
        while self.next != "}":
            parts.append(self._take())
        self._take()
        return "_" + "".join(parts)

    def _enclosed(self, opening: str) -> Any:
        bar = opening == "|"
        outer, self._bars = self._bars, int(bar)
        value = self.sum()
        self._take(_CLOSING[opening])
        self._bars = outer
        return _AROUND[opening](value) if opening in _AROUND else value

    def _argument(self) -> Any:
        """What TeX takes as an argument: a group, one digit, or one atom."""
        token = self.next
        if token.isdigit() and len(token) > 1:
            self._tokens[self._at : self._at + 1] = [token[0], token[1:]]
            return sympy.Integer(self._take())
        return self._atom()

    def _function(self, name: str) -> Any:
        base, power = None, None
        while self.next in ("_", "^"):
            if self._take() == "_":
                base = self._argument()
            else:
                power = self._exponent()
        if self.next in ("(", "[", "{"):
            argument = self._factor()
        else:
            argument = self._factor()
            while self._starts_factor() and self.next.removeprefix("\\") not in _FUNCTIONS:
                argument = argument * self._factor()
        value = _FUNCTIONS[name](_checked_exponent(argument) if name == "exp" else argument)
        if base is not None and name == "log":
            value = value / sympy.log(base)
        elif base is not None:
            raise Unreadable(f"{name} with an index")
        if power == -1 and f"arc{name}" in _FUNCTIONS:
            return _FUNCTIONS[f"arc{name}"](argument)
        return value if power is None else _power(value, power)


def _proper(tokens: list[str]) -> bool:
    """Whether these tokens are a fraction of two positive integers, the first one smaller."""
    digits = [token for token in tokens[1:] if token not in "{}"]
    return len(digits) == 2 and all(map(str.isdigit, digits)) and int(digits[0]) < int(digits[1])


def _checked_exponent(exponent: Any) -> Any:
    """The exponent; Unreadable for a number whose power of ten has more than _DIGITS digits."""
    if exponent.is_number and exponent.is_finite and not abs(exponent.evalf(15)) <= 4 * _DIGITS:
        raise Unreadable("a large power")
    return exponent


def _power(base: Any, exponent: Any) -> Any:
    """base ** exponent; Unreadable if it has too many digits to be written out."""
    _checked_exponent(exponent)
    if exponent.free_symbols and max(_towers(base), _towers(exponent)) >= _TALLEST:
        raise Unreadable("powers of powers of variables")
    if base.is_Rational and exponent.is_Rational:
        digits = max(len(str(abs(base.p))), len(str(base.q)))
        if digits * abs(exponent) > _DIGITS:
            raise Unreadable("a large power")
    return base**exponent


def _towers(expression: Any) -> int:
    """How many powers with variables in the exponent stand within each other, at most."""
    inner = max(map(_towers, expression.args), default=0)
    power = expression.is_Pow or isinstance(expression, sympy.exp)
    return inner + (power and bool(expression.exp.free_symbols))


def _factorial(n: Any) -> Any:
    if n.is_number and not (n.is_Integer and 0 <= n <= _FACTORIAL):
        raise Unreadable("a large factorial")
    return sympy.factorial(n)


def _binomial(n: Any, k: Any) -> Any:
    if any(x.is_number and not (x.is_Integer and abs(x) <= _FACTORIAL) for x in (n, k)):
        raise Unreadable("a large binomial")
    return sympy.binomial(n, k)


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
    return larger < _CLOSE or abs(a - b) <= _CLOSE * larger


def _values(a: Any, b: Any):
    """The values of both expressions, at several points if they have variables."""
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    complex_too = a.has(sympy.I) or b.has(sympy.I) or not symbols
    for low, high in _POINTS if symbols else _POINTS[:1]:
        at = {s: _point(f"{s} {low} {high}", low, high) for s in symbols}
        try:
            pair = _value(a, at), _value(b, at)
        except Unreadable:
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
        lead = abs(sympy.log(parts[0]).evalf(15)) if parts[0] != 0 else 0
        bounded = abs(parts[1]) * (1 + lead) <= _LARGEST
    else:
        most = _FACTORIAL if isinstance(expression, _FACTORIALS) else _LARGEST
        bounded = not expression.is_Function or all(abs(part) <= most for part in parts)
    if not bounded:
        raise Unreadable("a large value")
    value = (expression.func(*parts) if parts else expression).evalf(_PRECISION)
    if not value.is_number or not value.is_finite:
        raise Unreadable("no value")
    return value
