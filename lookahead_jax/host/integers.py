"""Integers that a caller gives: a float where an integer belongs is refused, not rounded."""

import operator
from typing import Any


def check_integer(name: str, value: Any, *, least: int | None = None) -> None:
    """Raises ValueError unless `value` is an integer (NumPy's included) of at least `least`."""
    wanted = "an integer" if least is None else f"an integer of at least {least}"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value} must be {wanted}") from None
    if least is not None and number < least:
        raise ValueError(f"{name}={value} must be {wanted}")
