"""The drafters by name. `make_drafter` builds one.

Host drafters (decoding.host_drafter) run in Python between steps; device drafters
(decoding.device_drafter) are part of the compiled step. Each is one file.
"""

import inspect
import types
import typing
from importlib import import_module
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """One drafter."""

    path: str  # of its class, below lookahead_jax
    summary: str  # one sentence, for help texts
    needs: tuple[str, ...] = ()  # arguments that it cannot do without, of _NEEDED


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
    "sam": Entry(
        "drafters.sam.Sam",
        "What followed the longest repeat of the text's end, from suffix automata (SAM-Decoding).",
    ),
    "aded": Entry(
        "drafters.aded.Aded",
        "What follows the last two tokens in prompt and outputs, found by a tree search (ADED).",
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
    "early_exit": Entry(
        "drafters.early_exit.EarlyExit",
        "A chain by the target's own first layers, as many as pay (LayerSkip, DEL).",
    ),
    "denoiser": Entry(
        "drafters.denoiser.Denoiser",
        "A block at once from a small head trained on the target, by masked denoising (DEER).",
        needs=("head", "target"),
    ),
    "draft_model": Entry(
        "drafters.draft_model.DraftModel",
        "The likeliest continuations by a smaller model with the same tokenizer.",
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
    "other_vocabulary": Entry(
        "drafters.other_vocabulary.OtherVocabulary",
        "The likeliest continuation by a smaller model with another tokenizer (OmniDraft).",
        needs=("model", "tokenizer"),
    ),
    "drawn_model": Entry(
        "drafters.drawn_model.DrawnModel",
        "Continuations sampled from a smaller model with the same tokenizer; accepts more of them "
        "when sampling, but emits other tokens than plain decoding would.",
        needs=("model",),
    ),
}
_NEEDED = {
    "model": "a smaller model: give make_drafter({name!r}, model=lk.load(DIR)) (--draft-model DIR)",
    "target": "the model that it drafts for: give make_drafter({name!r}, target=MODEL)",
    "tokenizer": "the tokenizer of the model that it drafts for: give make_drafter({name!r}, "
    "tokenizer=MODEL.tokenizer)",
    "head": "a trained head: give make_drafter({name!r}, head=FILE) (--drafter-arg head=FILE); "
    "lookahead train {name} writes one",
}

COMBINED = "trie+suffix, prompt_lookup+recycling"  # examples, see `make_drafter`


def drafter_summaries() -> dict[str, str]:
    """One sentence per drafter; neither jax nor a drafter is imported for it."""
    return {name: entry.summary for name, entry in DRAFTERS.items()}


def needs(name: str) -> set[str]:
    """Arguments that a drafter cannot do without; ValueError for an unknown name."""
    return {needed for part in name.split("+") for needed in _entry(part).needs}


def make_drafter(name: str, **arguments: Any) -> Any:
    """The drafter called `name` with its settings; a HostDrafter or a DeviceDrafter.

    Numbers may be text, as on a command line. "trie+suffix" is a mixture of two or more drafters
    (mixture.py), each with those of the settings that it has. All must run on the host or all on
    the device; "none", early_exit and drawn_model cannot be combined. Raises ValueError for other
    combinations, for unknown names and arguments, listing the known ones, and for a drafter without
    what it needs, such as `model=`.
    """
    # Imported on demand: the trie compiles its code at import.
    kinds = [(part, _kind(_entry(part))) for part in name.split("+")]
    known = dict.fromkeys(p for _, kind in kinds for p in inspect.signature(kind).parameters)
    for argument in arguments:
        if argument not in known:
            listed = f"known: {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"drafter {name}: unknown argument {argument!r}; {listed}")
    for part, _ in kinds:
        for needed in DRAFTERS[part].needs:
            if needed not in arguments:
                raise ValueError(f"drafter {part} needs {_NEEDED[needed].format(name=part)}")
    if sum("head" in DRAFTERS[part].needs for part, _ in kinds) > 1:
        raise ValueError(f"drafter {name}: only one of these can have a head; leave the others out")
    drafters = [_made(part, kind, arguments) for part, kind in kinds]
    return drafters[0] if len(drafters) == 1 else _mixture(name, drafters)


def _entry(name: str) -> Entry:
    if name not in DRAFTERS:
        raise ValueError(f"unknown drafter {name!r}; known: {', '.join(DRAFTERS)}, {COMBINED}")
    return DRAFTERS[name]


def _kind(entry: Entry) -> Any:
    """The class of a drafter."""
    module, _, kind = entry.path.rpartition(".")
    return getattr(import_module(f"lookahead_jax.{module}"), kind)


def _made(name: str, kind: Any, arguments: dict[str, Any]) -> Any:
    """A drafter with those of the arguments that it knows."""
    known = inspect.signature(kind).parameters
    try:
        return kind(**{
            key: _parsed(key, value, known[key].annotation)
            for key, value in arguments.items()
            if key in known
        })  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ValueError(f"drafter {name}: {error}") from error


def _parsed(name: str, value: Any, kind: Any) -> Any:
    """The value of an argument; of a text, the number or numbers if the argument is that."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) is types.UnionType else (kind,)
    several = any(typing.get_origin(each) is tuple for each in kinds)
    number = int if several or int in kinds else float if float in kinds else None
    if not isinstance(value, str) or number is None:
        return value
    try:
        return tuple(map(number, value.split(","))) if several else number(value)
    except ValueError:
        wanted = "an integer" if number is int else "a number"
        wanted = "integers with commas between" if several else wanted
        raise ValueError(f"{name}={value} is not {wanted}") from None


def _mixture(name: str, drafters: list[Any]) -> Any:
    from lookahead_jax.decoding.host_drafter import HostDrafter
    from lookahead_jax.drafters.mixture import Mixture, MixtureOnDevice

    on_host = [isinstance(drafter, HostDrafter) for drafter in drafters]
    if all(on_host):
        return Mixture(drafters)
    if not any(on_host):
        return MixtureOnDevice(tuple(drafters))
    raise ValueError(
        f"{name!r} cannot be combined: join drafters that all run on the host or all on the "
        f"device, such as {COMBINED}"
    )
