"""Examples that fill a given number of tokens: as many units of their material as fit."""

import dataclasses
import random
from collections.abc import Callable, Sequence

from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.eval.tasks.base import Example, Source, largest

Builder = Callable[[random.Random, int], list[Example]]
"""(rng, units of material) -> the examples of one context, their ids not yet chosen."""


def tokens_of(examples: Sequence[Example], tokenizer: Tokenizer) -> int:
    """Tokens of one context with its longest question, before the chat template.

    Of a dialogue, whose template grows with it, the template's tokens are counted, too.
    """
    first = examples[0]
    if first.turns:
        asked = f"{first.context}{first.question}"
        said = [*(text for turn in first.turns for text in turn), asked]
        if not tokenizer.chat_templates:
            return len(tokenizer.encode("\n\n".join(said)))
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
        return len(tokenizer.encode(tokenizer.render_chat(messages), special=False))
    longest = max(len(tokenizer.encode_behind(f"{e.question}{e.prefix}")) for e in examples)
    return len(tokenizer.encode(f"{first.context}")) + longest


def fitted(source: Source, build: Builder, *, contexts: int, least: int) -> list[Example]:
    """The examples of so many contexts; with their answers each takes at most `source.length`.

    They are numbered; `build` may give them any group, which becomes the number of their context.
    Raises ValueError if `least` units do not fit.
    """
    found: list[Example] = []
    units = max(least, source.length // 32)

    def made(index: int, units: int) -> list[Example]:
        return build(random.Random(f"{source.seed}/{source.length}/{index}"), max(units, least))

    def fits(examples: Sequence[Example]) -> bool:
        room = max(example.max_new_tokens for example in examples)
        return tokens_of(examples, source.tokenizer) + room <= source.length

    for index in range(contexts):
        units = largest(lambda n, index=index: fits(made(index, n)), units)
        if units < least:
            raise ValueError(f"{source.length} tokens are too few for this task")
        for example in made(index, units):
            group = example.group and str(index)
            found.append(dataclasses.replace(example, id=str(len(found)), group=group))
    return found
