"""Lookahead modules that ship with the package, by the name their model is loaded with."""

import os
from pathlib import Path

_ASSETS = Path(__file__).parents[1] / "assets"
_FOLDERS = {None: "lookahead", "smollm2": "smollm2"}  # None: the embedded model


def shipped_modules(model: str | os.PathLike | None) -> Path | None:
    """The folder of the modules for a model as `--model` names it, or None if none ship.

    None names the embedded model.
    """
    name = _FOLDERS.get(None if model is None else str(model))
    return None if name is None else _ASSETS / name
