"""The prompts of a training recipe: chats of drawn kinds and lengths, functions of (seed, number).

They are about text that every machine has (material.py) and about facts that are made up. Wordings
of the evaluation's tasks do not occur.
"""

import dataclasses
import json
import math
import random
from collections.abc import Callable
from typing import Any

from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.train.recipe import chats, documents, tables
from lookahead_jax.train.recipe.material import Material
from lookahead_jax.train.recipe.turns import ChatDraft

KINDS: dict[str, tuple[Callable[[random.Random, int, Material], ChatDraft], float]] = {
    "facts": (documents.facts, 0.24),
    "register": (documents.register, 0.10),
    "table": (tables.table, 0.12),
    "sections": (documents.sections, 0.07),
    "repetition": (documents.repetition, 0.08),
    "code": (documents.code, 0.08),
    "definitions": (documents.definitions, 0.05),
    "chat": (chats.chat, 0.09),
    "transcript": (chats.transcript, 0.05),
    "examples": (chats.examples, 0.05),
    "open": (documents.open_question, 0.05),
    "continuation": (documents.continuation, 0.02),
}
"""Kinds of prompts: what makes one of about so many characters, and its share."""
_TRIES = 12
_CLOSE = 0.1  # of the length that was drawn, in which a prompt may differ from it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Maker:
    """What all prompts have in common."""

    material: Material
    tokenizer: Tokenizer
    seed: int
    lengths: tuple[int, int]
    """Tokens of the shortest and the longest prompt, under the chat template."""


def prompt(maker: Maker, number: int) -> dict[str, Any]:
    """A row with `kind`, `messages`, `answers`, `question` and `tokens`, by seed and number.

    The lengths of all prompts are distributed log-uniformly.
    """
    for attempt in range(_TRIES):
        name = f"{maker.seed} {number} {attempt}"
        rng = random.Random(name)
        kind = rng.choices(list(KINDS), [share for _, share in KINDS.values()])[0]
        wanted = round(math.exp(rng.uniform(*map(math.log, maker.lengths))))
        fitted = _fit(maker, name, kind, wanted)
        if fitted is not None:
            draft, tokens = fitted
            return {
                "kind": kind,
                "messages": draft.messages,
                "answers": draft.answers,
                "question": draft.question,
                "tokens": tokens,
            }
    raise ValueError(
        f"no prompt of {maker.lengths[0]} to {maker.lengths[1]} tokens in {_TRIES} attempts: widen "
        "the lengths"
    )


def _fit(maker: Maker, name: str, kind: str, wanted: int) -> tuple[ChatDraft, int] | None:
    """A prompt of nearly `wanted` tokens; None if its kind cannot be so short or so long."""
    tried: set[int] = set()
    size, best = 3 * wanted, None
    for _ in range(6):
        draft = KINDS[kind][0](random.Random(name), size, maker.material)
        tokens = length(draft, maker.tokenizer)
        if maker.lengths[0] <= tokens <= maker.lengths[1] and _stated(draft):
            if best is None or abs(tokens - wanted) < abs(best[1] - wanted):
                best = draft, tokens
            if abs(tokens - wanted) <= _CLOSE * wanted:
                break
        tried.add(size)
        size = max(40, round(size * wanted / tokens))
        if size in tried:
            break
    return best


def length(draft: ChatDraft, tokenizer: Tokenizer) -> int:
    """Tokens of a prompt under the chat template."""
    return len(tokenizer.encode(tokenizer.render_chat(draft.messages), special=False))


def _stated(draft: ChatDraft) -> bool:
    """Whether all answers stand in the messages."""
    text = json.dumps([message["content"] for message in draft.messages], ensure_ascii=False)
    return all(json.dumps(answer, ensure_ascii=False)[1:-1] in text for answer in draft.answers)
