"""A LaTeX term -> a sympy expression.

Texts come from a model, so nothing here evaluates them as a program, and the work is bounded by
construction: by the length of a term, the depth of its brackets, and the size of its powers
(eval/scorers/bounded_terms.py). sympy is an optional extra; this module imports it.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import sympy

from lookahead_jax.eval.scorers.bounded_terms import (
    Unreadable,
    binomial,
    factorial,
    power,
)

LONGEST = 400  # characters of a term
_DEEPEST = 30  # brackets in brackets
_TOKEN = re.compile(r"\d+\.?\d*|\.\d+|\\[A-Za-z]+|\\.|[A-Za-z]+|\S")


def _inverse(function: Callable) -> Callable:
    return lambda x: 1 / function(x)


_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    **{name: getattr(sympy, name) for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")},
    "cot": _inverse(sympy.tan), "sec": _inverse(sympy.cos), "csc": _inverse(sympy.sin),
    "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan,
    "ln": sympy.log, "log": sympy.log, "exp": partial(power, sympy.E),
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
_BEFORE_NUMBERS = {")", "]", "}", "!"}
_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho "
    "sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell"
)
_SYMBOLS = frozenset(_GREEK.split())


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
        """Whether a factor follows without a sign; a number does so behind a bracket or ! only."""
        token = self.next
        if token == "|":
            return self._bars == 0
        if token[:1].isdigit():
            return self._tokens[self._at - 1] in _BEFORE_NUMBERS
        return bool(token) and token not in _NO_FACTOR

    def _factor(self) -> Any:
        """An atom with its factorials and its power."""
        value = self._atom()
        while self.next in ("!", "^"):
            factorials = self._take() == "!"
            value = factorial(value) if factorials else power(value, self._exponent())
        return value

    def _exponent(self) -> Any:
        if self.next == "-":
            self._take()
            return -self._exponent()
        value = self._atom()
        return power(value, self._exponent()) if self.next == "^" and self._take() else value

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
            return binomial(self._argument(), self._argument())
        if name == "sqrt":
            degree = self._enclosed(self._take()) if self.next == "[" else sympy.Integer(2)
            return power(self._atom(), 1 / degree)
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
        base, raised = None, None
        while self.next in ("_", "^"):
            if self._take() == "_":
                base = self._argument()
            else:
                raised = self._exponent()
        if self.next in ("(", "[", "{"):
            argument = self._factor()
        else:
            argument = self._factor()
            while self._starts_factor() and self.next.removeprefix("\\") not in _FUNCTIONS:
                argument = argument * self._factor()
        value = _FUNCTIONS[name](argument)
        if base is not None and name == "log":
            value = value / sympy.log(base)
        elif base is not None:
            raise Unreadable(f"{name} with an index")
        if raised == -1 and f"arc{name}" in _FUNCTIONS:
            return _FUNCTIONS[f"arc{name}"](argument)
        return value if raised is None else power(value, raised)


def _proper(tokens: list[str]) -> bool:
    """Whether these tokens are a fraction of two positive integers, the first one smaller."""
    digits = [token for token in tokens[1:] if token not in "{}"]
    return len(digits) == 2 and all(map(str.isdigit, digits)) and int(digits[0]) < int(digits[1])
