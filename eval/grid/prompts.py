"""Examples -> token ids, as published: long prompts lose their middle, then the chat template."""

from typing import NamedTuple

from lookahead_jax.checkpoints.token_ranges import Span, token_ranges
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.eval.tasks.base import Cut, Example


class AssembledPrompt(NamedTuple):
    """One example as the model reads it."""

    whole: list[int]  # context and question together
    context: list[int]  # on its own, with BOS
    question: list[int]  # on its own; empty if the example has none
    pin: tuple[Span, ...] = ()  # tokens of the first two that every policy keeps


def truncate(text: str, tokenizer: Tokenizer, limit: int, cut: Cut) -> str:
    """`text` without its middle, if it has more than `limit` tokens.

    "halves": the first and last limit/2 tokens, each decoded on its own (LongBench). "joined":
    decoded together (LongBench v2, InfiniteBench). Special tokens are dropped.
    """
    ids = tokenizer.encode(text)
    if len(ids) <= limit:
        return text
    if cut == "joined":
        return tokenizer.decode(ids[: limit // 2] + ids[-limit // 2 :])
    half = limit // 2
    return tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])


def assemble(example: Example, tokenizer: Tokenizer, *, limit: int, chat: bool) -> AssembledPrompt:
    """The example in at most `limit` tokens (before the chat template and the answer's prefix).

    Earlier turns of a dialogue are added in full, outside the limit; without a template, empty
    lines separate the turns. `chat` puts context and question into the chat template, unless the
    example forbids it. Raises ValueError if the question alone exceeds half of `limit`, and if the
    prompt does not contain what the example pins.
    """
    if isinstance(example.context, tuple) or isinstance(example.question, tuple):
        context, question = list(example.context), list(example.question)
        return AssembledPrompt([*context, *question], context, question)  # type: ignore[list-item]
    text = truncate(example.context + example.question, tokenizer, limit, example.cut)
    if not text.endswith(example.question):
        raise ValueError(
            f"example {example.id}: the question takes more than half of {limit} tokens"
        )
    said = [words for turn in example.turns for words in turn]
    special = not (chat and example.chat)
    if not special:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": c} for i, c in enumerate([*said, text])]
        text = tokenizer.render_chat(messages)
    else:
        text = "\n\n".join([*said, text])
    # A template may strip the text it is given.
    at = text.rfind(example.question.strip()) if example.question.strip() else len(text)
    if at < 0:
        raise ValueError(f"example {example.id}: the chat template changes the question")
    if example.question.strip():
        lead = len(example.question) - len(example.question.lstrip())
        at -= lead if text[at - lead : at] == example.question[:lead] else 0
    text += example.prefix
    has_question = bool(example.question)
    pin: tuple[Span, ...] = ()
    if example.pin:
        _, offsets = tokenizer.encode_with_offsets(text, special=special)
        pin = (token_ranges(text, offsets, example.pin)[0],)
    return AssembledPrompt(
        whole=tokenizer.encode(text, special=special),
        context=tokenizer.encode(text[:at], special=special) if has_question else [],
        question=tokenizer.encode_behind(text[at:]) if has_question else [],
        pin=pin,
    )
