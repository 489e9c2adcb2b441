"""Lookahead modules that ship with the package, by the name their model is loaded with."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

_ASSETS = Path(__file__).parents[1] / "assets"


class Shipped(NamedTuple):
    """Modules of one model, and the settings of the policy lookaheadkv that suit them."""

    folder: Path
    settings: Mapping[str, Any]
    """Chosen on a validation split (docs/results.md); the defaults where this is empty."""


_SHIPPED = {
    None: Shipped(_ASSETS / "lookahead", {}),  # the embedded model
    "smollm2": Shipped(
        _ASSETS / "smollm2",
        {"reduce": "max", "group": "max", "pool": "avg", "kernel": 5, "window": 8},
    ),
}


def shipped_modules(model: str | os.PathLike | None) -> Shipped | None:
    """The modules for a model as `--model` names it, or None if none ship.

    None names the embedded model.
    """
    return _SHIPPED.get(None if model is None else str(model))
