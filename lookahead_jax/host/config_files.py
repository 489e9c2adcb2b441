"""Command lines that start from a configuration file: its values are the defaults of the options.

A configuration file is a JSON object with fields of the command's dataclass; a nested dataclass is
a nested object.
"""

import contextlib
import dataclasses
import io
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

Config = TypeVar("Config")


class UsageError(ValueError):
    """The command line itself is wrong: exit status 2."""


def read_config(name: str, presets: Path) -> dict[str, Any]:
    """The fields of a .json file, or of the one of that name in the folder `presets`.

    Raises ValueError if there is no such file, or if it is not a JSON object.
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


def cli_with_file(
    config_class: type[Config],
    args: Sequence[str],
    presets: Path,
    prog: str,
    *,
    refused: Sequence[str] = (),
) -> Config:
    """Parses `[CONFIG] [options]` into a `config_class`, a dataclass.

    CONFIG is a .json file, or the name of one in the folder `presets`; without it, the defaults are
    those of the class. Every field can be overridden by its option. Fields named in `refused` may
    be set on the command line only.

    Raises ValueError if CONFIG does not exist or has an unknown, ill-typed or refused field, and
    UsageError for wrong options. `--help` prints the options and exits.
    """
    defaults: dict[str, Any] = {}  # without a file, those of the class
    if args and not args[0].startswith("-"):
        fields = read_config(args[0], presets)
        for name in refused:
            if name in (key.replace("-", "_") for key in fields):
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{args[0]}: {name} may only be set by {option}, not in a file")
        defaults["default"] = _default(config_class, fields, args[0])
        args = args[1:]
    with usage_errors():
        return tyro.cli(
            config_class,
            **defaults,
            args=list(args),
            prog=f"{prog} [CONFIG]",
            config=(tyro.conf.AvoidSubcommands,),
        )


def check_at_least_one(config: Any, *names: str) -> None:
    """Raises ValueError, naming the option, for fields with a number below 1; None is allowed."""
    for name in names:
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if any(number is not None and number < 1 for number in numbers):
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")


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
    text = " ".join(parts[min(title, len(parts) - 1)])
    if text.startswith("Missing from"):  # what follows is the help of every missing option
        missing = re.findall(r"(--[a-z][\w.-]*)(?= [A-Z{\[])", text)
        text = f"missing options: {', '.join(dict.fromkeys(missing))}" if missing else text
    return text


def _default(config_class: type[Config], fields: dict[str, Any], where: str) -> Config:
    """The fields of a file as a default for tyro, which then asks for those that are missing.

    The dataclass's own `__post_init__` does not run: it checks whole configurations, and overrides
    are still to come.
    """
    hints = typing.get_type_hints(config_class)
    known = {f.name: f for f in dataclasses.fields(config_class) if f.init}  # pyright: ignore[reportArgumentType]
    given = {name.replace("-", "_"): value for name, value in fields.items()}
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(known)}")
    default = object.__new__(config_class)
    for name, field in known.items():
        if name in given:
            value = _typed(hints[name], given[name], f"{where}: {name}")
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = tyro.MISSING
        object.__setattr__(default, name, value)
    return default


def _typed(hint: Any, value: Any, where: str) -> Any:
    """A JSON value as the type that a field is annotated with; ValueError if it does not fit."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in options:
            with contextlib.suppress(ValueError):
                return _typed(option, value, where)
    elif origin is typing.Literal:
        if value in options:
            return value
    elif origin is tuple:
        repeated = len(options) == 2 and options[1] is Ellipsis
        values = value if isinstance(value, list) else [value]  # one value stands for a list of it
        each = options[:1] * len(values) if repeated else options
        if len(each) == len(values):
            return tuple(_typed(t, v, where) for t, v in zip(each, values, strict=True))
    elif dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _default(typing.cast("type[Any]", hint), value, where)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint or hint is Any:  # an exact match: True is no int
        return value
    expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise ValueError(f"{where}: expected {expected}, got {json.dumps(value)}")
