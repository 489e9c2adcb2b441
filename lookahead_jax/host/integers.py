"""Integers that a caller gives: a float is refused instead of being cut to an integer."""

import operator
from typing import Any


def check_integer(name: str, value: Any, *, least: int | None = None) -> None:
    """Raises ValueError unless `value` is an integer (NumPy's included) of at least `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, not {value!r}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


def whole_id(token: Any, name: str) -> int:
    """A token id given as any kind of integer; a fraction would silently be another token."""
    try:
        return operator.index(token)
    except TypeError:
        raise ValueError(f"{name} is {token!r}: token ids are integers") from None
