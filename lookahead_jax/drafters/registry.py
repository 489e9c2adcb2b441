"""Where token trees come from. `make_drafter` builds a drafter from its name.

Host drafters (decoding.host_drafter) see tokens as Python sees them; device drafters
(decoding.device_drafter) are part of the compiled step. Each is one file.
"""

from importlib import import_module
from typing import Any

DRAFTERS = {
    "none": "decoding.device_drafter.NoDrafter",
    "trie": "drafters.trie.Trie",
    "suffix": "drafters.suffix.Suffix",
    "prompt_lookup": "drafters.prompt_lookup.PromptLookup",
    "recycling": "drafters.recycling.Recycling",
    "draft_model": "drafters.draft_model.DraftModel",
    "drawn_model": "drafters.drawn_model.DrawnModel",
}

COMBINED = "trie+suffix, prompt_lookup+recycling"  # examples, see `make_drafter`


def make_drafter(name: str, **arguments: Any) -> Any:
    """The drafter called `name` with its settings; a HostDrafter or a DeviceDrafter.

    `trie+suffix` is both merged into one tree (combine.py), each as it is without settings; so for
    any two that both run on the host or both on the device, but for draft models and `none`. Raises
    ValueError, listing what is possible, for other combinations and unknown names or arguments.
    """
    names = name.split("+")
    if len(names) > 1:
        return _combined(name, [make_drafter(part) for part in names])
    if name not in DRAFTERS:
        raise ValueError(f"unknown drafter {name!r}; known: {', '.join(DRAFTERS)}, {COMBINED}")
    module, _, kind = DRAFTERS[name].rpartition(".")
    # Imported when asked for: the trie compiles its code when it is imported.
    make = getattr(import_module(f"lookahead_jax.{module}"), kind)
    try:
        return make(**arguments)
    except TypeError as error:
        raise ValueError(f"drafter {name}: {error}") from None


def _combined(name: str, drafters: list[Any]) -> Any:
    from lookahead_jax.decoding.host_drafter import HostDrafter
    from lookahead_jax.drafters.combine import Combine, CombineOnDevice

    if len(drafters) == 2:
        if all(isinstance(drafter, HostDrafter) for drafter in drafters):
            return Combine(*drafters)
        if not any(isinstance(drafter, HostDrafter) for drafter in drafters):
            return CombineOnDevice(*drafters)
    raise ValueError(
        f"{name!r} cannot be combined; two that run on the host can, whose trees are ready before "
        f"a step, or two on the device, which draft within it: {COMBINED}"
    )
