"""Warnings that name the caller's line instead of one of this package."""

import os
import sys
import warnings
from pathlib import Path

_PACKAGE = os.path.join(Path(__file__).parents[1], "")


def warn(message: str) -> None:
    """Issues a UserWarning at the innermost frame outside this package.

    Decorators may stand in between, so no fixed `stacklevel` would do.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _skipped(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level + 1)


def _skipped(file: str) -> bool:
    if file.startswith((_PACKAGE, "<@")):  # the latter: functions that beartype wraps
        return True
    return file.endswith(("contextlib.py", os.path.join("jaxtyping", "_decorator.py")))
