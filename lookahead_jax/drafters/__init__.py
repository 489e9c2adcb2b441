"""Where token trees come from. `make_drafter` builds a drafter from its name.

Host drafters (base.HostDrafter) see tokens as Python sees them; device drafters
(device.DeviceDrafter) are part of the compiled step. Each is one file.
"""

from importlib import import_module
from typing import Any

DRAFTERS = {
    "none": "device.NoDrafter",
    "trie": "trie.Trie",
    "suffix": "suffix.Suffix",
    "prompt_lookup": "prompt_lookup.PromptLookup",
    "recycling": "recycling.Recycling",
    "draft_model": "draft_model.DraftModel",
    "drawn_model": "drawn_model.DrawnModel",
}


def make_drafter(name: str, **arguments: Any) -> Any:
    """The drafter called `name` with its settings; a HostDrafter or a DeviceDrafter.

    Raises ValueError, listing what is possible, for an unknown name or argument.
    """
    if name not in DRAFTERS:
        raise ValueError(f"unknown drafter {name!r}; known: {', '.join(DRAFTERS)}")
    module, kind = DRAFTERS[name].split(".")
    # Imported when asked for: the trie compiles its code when it is imported.
    make = getattr(import_module(f"lookahead_jax.drafters.{module}"), kind)
    try:
        return make(**arguments)
    except TypeError as error:
        raise ValueError(f"drafter {name}: {error}") from None
