"""What the programs of this folder share: their options, and what a report says about a run.

Importing this module puts the root of the checkout on the import path, so that the programs run
without an installation. It imports the standard library only: benchmarks/gpu.py runs where tyro is
not installed, and the environment of a peer library has neither JAX nor this package.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
T = TypeVar("T")


class Help(NamedTuple):
    """How a field of a dataclass appears on the command line."""

    text: str | None  # None hides the option
    choices: Sequence[str] | None = None
    nargs: str | int = "+"  # of a tuple
    repeated: bool = False  # a tuple is given as --name A --name B


def parse(options: type[T], doc: str, args: Sequence[str] | None = None) -> T:
    """The command line as an instance of the dataclass `options`, described by `doc`.

    Every field is annotated `Annotated[type, Help(...)]`; types are str, int, float, Path, bool
    (a flag), tuples of these, and None in a union. Exits with 2 for anything else on the line.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    hints = typing.get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        kind, about = typing.get_args(hints[field.name])
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, **_argument(kind, about, field.default))
    given = {k: v for k, v in vars(parser.parse_args(args)).items() if v is not None}
    return options(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def _argument(kind: Any, about: Help, default: Any) -> dict[str, Any]:
    """What `add_argument` is told about a field."""
    needed = default is dataclasses.MISSING
    shown = "" if needed or default in (None, False, (), "") else f" (default: {_shown(default)})"
    argument: dict[str, Any] = {
        "help": argparse.SUPPRESS if about.text is None else (about.text + shown).replace("%", "%%")
    }
    if kind is bool:
        return argument | {"action": "store_true"}
    if isinstance(kind, types.UnionType):
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
        argument |= {"action": "append"} if about.repeated else {"nargs": about.nargs}
    # Left out, an option is None here and the dataclass has the default.
    return argument | {"type": kind, "choices": about.choices, "required": needed}


def _shown(default: Any) -> str:
    if isinstance(default, Path) and default.is_relative_to(ROOT):
        default = default.relative_to(ROOT)
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def commit(*, short: bool = True) -> str:
    """The checkout's commit, or "unknown" without git."""
    command = ["git", "rev-parse", *(["--short"] * short), "HEAD"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(cores: int | None = None) -> str:
    """The CPU's name and how many cores the process may use."""
    if cores is None:
        affinity = getattr(os, "sched_getaffinity", None)  # Linux only
        cores = len(affinity(0)) if affinity else os.cpu_count()
    return f"{processor()}, {cores} cores"


def ran_on() -> dict[str, Any]:
    """Code, device and versions of a run, as the reports of timings begin."""
    import jax

    return {
        "commit": commit(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "jax": jax.__version__,
    }


def settings(options: Any, *without: str) -> dict[str, Any]:
    """The options as a report names them, less those that change no figure."""
    return {k: v for k, v in vars(options).items() if k not in without}


def save(path: Path, report: Any, *, indent: int = 1) -> None:
    """Writes the report as JSON, whole or not at all, and the folder if need be."""
    from lookahead_jax.host.files import atomic_write

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(report, indent=indent) + "\n")


def publish(report: Any, out: Path | None, *, indent: int = 1) -> None:
    """Prints the report and, where `out` is given, saves it."""
    print(json.dumps(report, indent=indent))
    if out is not None:
        save(out, report, indent=indent)
