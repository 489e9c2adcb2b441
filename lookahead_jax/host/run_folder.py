"""The settings that a run's folder was started with: results of other settings are kept out."""

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lookahead_jax.host.files import atomic_write

SETTINGS = "settings.json"


def keep_settings(folder: Path, settings: Mapping[str, Any], results_glob: str) -> None:
    """Makes the folder and stores the settings, or compares them with those stored before.

    `settings` must be JSON; `results_glob` is a pattern, relative to the folder, of files that hold
    results. Raises ValueError if a setting differs, if the stored settings cannot be read, or if
    there are results but no stored settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    content = json.dumps(settings, indent=1) + "\n"
    if path.exists():
        if changed := changed_settings(_read(path), json.loads(content)):
            raise ValueError(
                f"{folder} was started with other settings ({changed}); choose another folder"
            )
        return
    if any(folder.glob(results_glob)):
        raise ValueError(
            f"{folder} has results ({results_glob}) but no {SETTINGS}, so their settings are "
            "unknown; choose another folder"
        )
    atomic_write(path, content)


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Names each setting of `now` that differs in `before`, with both values, or "".

    A setting that was not stored was None: versions before it had no such option.
    """

    def show(value: Any) -> str:
        return textwrap.shorten(repr(value), 60, placeholder="...")

    return ", ".join(
        f"{name}: {show(before[name]) if name in before else 'not stored'}, now {show(value)}"
        for name, value in now.items()
        if before.get(name) != value
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); choose another folder") from None
    if not isinstance(stored, dict):
        raise ValueError(
            f"{path}: expected a JSON object, got {type(stored).__name__}; choose another folder"
        )
    return stored
