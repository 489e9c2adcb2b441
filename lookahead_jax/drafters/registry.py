"""The drafters by name. `make_drafter` builds one.

Host drafters (decoding.host_drafter) run in Python between steps; device drafters
(decoding.device_drafter) are part of the compiled step. Each is one file.
"""

import inspect
from importlib import import_module
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """One drafter."""

    path: str  # of its class, below lookahead_jax
    summary: str  # one sentence, for help texts
    needs: tuple[str, ...] = ()  # arguments that it cannot be made without, see _NEEDED


DRAFTERS = {
    "none": Entry("decoding.device_drafter.NoDrafter", "Plain decoding, one token per step."),
    "trie": Entry(
        "drafters.trie.Trie",
        "Frequent continuations in the prompt and in all earlier outputs, from a token trie.",
    ),
    "suffix": Entry(
        "drafters.suffix.Suffix",
        "Long repeats of the prompt and of earlier outputs, from suffix trees (SuffixDecoding).",
    ),
    "prompt_lookup": Entry(
        "drafters.prompt_lookup.PromptLookup",
        "The text that followed the last few tokens where they occurred before in the row.",
    ),
    "recycling": Entry(
        "drafters.recycling.Recycling",
        "The target's own candidates from the last time it saw a token (Token Recycling).",
    ),
    "stand": Entry(
        "drafters.stand.Stand",
        "The target's own candidates whenever it read the last few tokens before (STAND).",
    ),
    "draft_model": Entry(
        "drafters.draft_model.DraftModel",
        "The likeliest continuations by a smaller model with the same tokenizer.",
        needs=("model",),
    ),
    "drawn_model": Entry(
        "drafters.drawn_model.DrawnModel",
        "Continuations sampled from a smaller model with the same tokenizer; accepts more of them "
        "when sampling, but emits other tokens than plain decoding would.",
        needs=("model",),
    ),
    "specdec": Entry(
        "drafters.specdec.SpecDec",
        "A chain by a smaller model that ends where a trained head expects a rejection "
        "(SpecDec++).",
        needs=("model", "head"),
    ),
    "cascade": Entry(
        "drafters.cascade.Cascade",
        "Branches by a smaller model while they are likely, by a threshold that adapts (LLMCad).",
        needs=("model",),
    ),
}

_NEEDED = {
    "model": "a smaller model with the same tokenizer: give make_drafter({name!r}, "
    "model=lk.load(DIR)) (--draft-model DIR)",
    "head": "an acceptance head for its draft model, from lookahead train specdec: give "
    "make_drafter({name!r}, model=..., head=FILE) (--drafter-arg head=FILE)",
}
COMBINED = "trie+suffix, prompt_lookup+recycling"  # examples, see `make_drafter`


def drafter_summaries() -> dict[str, str]:
    """One sentence per drafter; neither jax nor a drafter is imported for it."""
    return {name: entry.summary for name, entry in DRAFTERS.items()}


def make_drafter(name: str, **arguments: Any) -> Any:
    """The drafter called `name` with its settings; a HostDrafter or a DeviceDrafter.

    "trie+suffix" merges the trees of two drafters with default settings (combine.py). Both must
    run on the host or both on the device; draft models and "none" cannot be combined. Raises
    ValueError for other combinations, for unknown names and arguments, listing the known ones, and
    for a drafter without what it needs, such as `model=`.
    """
    names = name.split("+")
    if len(names) > 1:
        return _combined(name, [make_drafter(part) for part in names])
    if name not in DRAFTERS:
        raise ValueError(f"unknown drafter {name!r}; known: {', '.join(DRAFTERS)}, {COMBINED}")
    module, _, kind = DRAFTERS[name].path.rpartition(".")
    # Imported on demand: the trie compiles its code at import.
    make = getattr(import_module(f"lookahead_jax.{module}"), kind)
    parameters = inspect.signature(make).parameters
    for argument in arguments:
        if argument not in parameters:
            known = f"known: {', '.join(parameters)}" if parameters else "it takes none"
            raise ValueError(f"drafter {name}: unknown argument {argument!r}; {known}")
    for needed in DRAFTERS[name].needs:
        if needed not in arguments:
            raise ValueError(f"drafter {name} needs {_NEEDED[needed].format(name=name)}")
    try:
        return make(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"drafter {name}: {error}") from error


def _combined(name: str, drafters: list[Any]) -> Any:
    from lookahead_jax.decoding.host_drafter import HostDrafter
    from lookahead_jax.drafters.combine import Combine, CombineOnDevice

    if len(drafters) == 2:
        if all(isinstance(drafter, HostDrafter) for drafter in drafters):
            return Combine(*drafters)
        if not any(isinstance(drafter, HostDrafter) for drafter in drafters):
            return CombineOnDevice(*drafters)
    raise ValueError(
        f"{name!r} cannot be combined: join two drafters that both run on the host or both on the "
        f"device, such as {COMBINED}"
    )
