"""Configuration files of commands: a JSON object, overridden field by field on the command line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class UsageError(ValueError):
    """The command line itself is wrong: exit status 2."""


def read_config(name: str, presets: Path) -> dict[str, Any]:
    """The fields of a .json file, or of the one of that name in the folder `presets`.

    Raises ValueError if there is no such file, or if it holds something else.
    """
    path = Path(name) if name.endswith(".json") else presets / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in presets.glob("*.json")))
        raise ValueError(f"{name}: neither a .json file nor one of the presets ({known})")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(fields).__name__}")
    return fields


def split_config(args: Sequence[str], presets: Path) -> tuple[list[str], Sequence[str]]:
    """[CONFIG] and overrides -> the fields of CONFIG as options, and the overrides.

    In front of the overrides, both are read, and refused, by the same rules.
    """
    if not args or args[0].startswith("-"):
        return [], args
    return as_options(read_config(args[0], presets)), args[1:]


def as_options(fields: dict[str, Any], prefix: str = "--") -> list[str]:
    """The fields of a configuration file as the command line would give them."""
    options: list[str] = []
    for name, value in fields.items():
        if isinstance(value, dict):
            options += as_options(value, f"{prefix}{name}.")
        else:
            options += [prefix + name, *map(str, value if isinstance(value, list) else [value])]
    return options
