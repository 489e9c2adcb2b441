"""Configuration files of commands: a JSON object, overridden field by field on the command line."""

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
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


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turns a complaint that tyro prints before it exits into a UsageError of one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            yield
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_unbox(complaint.getvalue())) from None


def _unbox(complaint: str) -> str:
    """The message inside the box that tyro draws: without its title, and the help after a rule."""
    parts: list[list[str]] = [[]]
    for line in complaint.splitlines():
        text = line.strip("│ ")
        if text and set(text) <= {"─", "-"}:
            parts.append([])
        elif not text.startswith(("╭", "╰")):
            parts[-1].append(text)
    title = 0 if complaint.startswith("╭") else 1  # part of the frame, or above a rule in ASCII
    return " ".join(parts[min(title, len(parts) - 1)])
