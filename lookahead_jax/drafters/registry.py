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
    needs: str = ""  # what it cannot do without, and how to give it


_SMALLER = (
    "a smaller model with the same tokenizer: give make_drafter({name!r}, model=lk.load(DIR)) "
    "(--draft-model DIR)"
)
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
        needs=_SMALLER,
    ),
    "drawn_model": Entry(
        "drafters.drawn_model.DrawnModel",
        "Continuations sampled from a smaller model with the same tokenizer; accepts more of them "
        "when sampling, but emits other tokens than plain decoding would.",
        needs=_SMALLER,
    ),
    "denoiser": Entry(
        "drafters.denoiser.Denoiser",
        "A block at once from a small head trained on the model, by masked denoising (DEER).",
        needs="a head that was trained for the model: give make_drafter({name!r}, model=MODEL, "
        "head=FILE) (--drafter-arg head=FILE); lookahead train denoiser writes one",
    ),
}

COMBINED = "trie+suffix, prompt_lookup+recycling"  # examples, see `make_drafter`


def drafter_summaries() -> dict[str, str]:
    """One sentence per drafter; neither jax nor a drafter is imported for it."""
    return {name: entry.summary for name, entry in DRAFTERS.items()}


def check_name(name: str) -> None:
    """Raises ValueError, listing the known ones, for the name of no drafter."""
    for part in name.split("+"):
        if part not in DRAFTERS:
            raise ValueError(f"unknown drafter {part!r}; known: {', '.join(DRAFTERS)}, {COMBINED}")


def make_drafter(name: str, **arguments: Any) -> Any:
    """The drafter called `name` with its settings; a HostDrafter or a DeviceDrafter.

    Numbers may be text, as on a command line. "trie+suffix" merges the trees of two drafters with
    default settings (combine.py). Both must run on the host or both on the device; draft models and
    "none" cannot be combined. Raises ValueError for other combinations, for unknown names and
    arguments, listing the known ones, and for a draft model without `model=` or a denoiser without
    `model=` and `head=`.
    """
    names = name.split("+")
    if len(names) > 1:
        return _combined(name, [make_drafter(part) for part in names])
    check_name(name)
    module, _, kind = DRAFTERS[name].path.rpartition(".")
    # Imported on demand: the trie compiles its code at import.
    make = getattr(import_module(f"lookahead_jax.{module}"), kind)
    parameters = inspect.signature(make).parameters
    for argument in arguments:
        if argument not in parameters:
            known = f"known: {', '.join(parameters)}" if parameters else "it takes none"
            raise ValueError(f"drafter {name}: unknown argument {argument!r}; {known}")
    if any(p.default is p.empty and n not in arguments for n, p in parameters.items()):
        raise ValueError(f"drafter {name} needs {DRAFTERS[name].needs.format(name=name)}")
    try:
        return make(**{n: _parsed(n, value, parameters[n]) for n, value in arguments.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"drafter {name}: {error}") from error


def _parsed(name: str, value: Any, parameter: inspect.Parameter) -> Any:
    """The value of an argument; a number for a text, if the parameter is one."""
    kind = parameter.annotation
    if not isinstance(value, str) or kind not in (int, float):
        return value
    try:
        return kind(value)
    except ValueError:
        wanted = "an integer" if kind is int else "a number"
        raise ValueError(f"{name}={value} is not {wanted}") from None


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
