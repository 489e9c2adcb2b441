"""What a run's folder was begun with: results of other settings never get into it."""

import json
from pathlib import Path
from typing import Any

from lookahead_jax.host.files import atomic_write

SETTINGS = "settings.json"


def keep_settings(out: Path, settings: dict[str, Any], results: str) -> None:
    """Makes the folder and writes the settings down, or compares them with those of before.

    Raises ValueError if they differ, or if the folder has results (a glob) of unknown settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / SETTINGS
    content = json.dumps(settings, indent=1) + "\n"
    if path.is_file():
        wanted, found = json.loads(content), json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name in wanted if found.get(name) != wanted[name]]:
            raise ValueError(
                f"{out} was begun with other settings ({', '.join(changed)}); choose another --out"
            )
        return
    if any(out.glob(results)):
        raise ValueError(
            f"{out} has results, but no {SETTINGS} that says what they are of; choose another --out"
        )
    atomic_write(path, content)
