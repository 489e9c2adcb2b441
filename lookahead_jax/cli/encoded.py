"""Prompts as token ids, each with its characters; chats, and the tokens of a part of the text."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from lookahead_jax.checkpoints.token_ranges import Span, token_ranges
from lookahead_jax.host.config_files import UsageError


class EncodedPrompt(NamedTuple):
    """A prompt as token ids; for a text also the text, and each token's characters in it."""

    ids: list[int]
    text: str | None = None
    offsets: list[Span] | None = None
    before_user: int = 0  # tokens of a chat in front of the user's first words


def chat_messages(question: str, document: str | None, system: str | None) -> list[dict[str, str]]:
    """A chat with one question; a document stands before it, a blank line between them."""
    content = question if document is None else f"{document.rstrip()}\n\n{question}"
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": content}]


def encode_chat_prompt(
    model: Any, messages: Sequence[Mapping[str, str]], *, plain: bool = True
) -> EncodedPrompt:
    """The chat as the model's template renders it, up to where the answer begins.

    With `plain`, the messages cannot write control tokens. Raises ValueError for a model without a
    chat template.
    """
    tokenizer = model.tokenizer
    if tokenizer is None or not tokenizer.chat_templates:
        raise ValueError(
            f"{model.path} has no chat template: take a model for chats, such as --model smollm2"
        )
    ids = tokenizer.encode_chat(messages, plain=plain)
    # Where chats that differ in the user's words alone begin to differ.
    others = [
        [{**m, "content": words} if m["role"] == "user" else m for m in messages] for words in "ab"
    ]
    rows = zip(ids, *map(tokenizer.encode_chat, others), strict=False)
    same = len(list(takewhile(lambda row: len(set(row)) == 1, rows)))
    return EncodedPrompt(ids, *_characters(tokenizer, ids), before_user=same)


def _characters(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text of token ids, control tokens included, and each token's characters in it.

    Tokens that are bytes of one character share its span.
    """
    stream = tokenizer.stream(skip_special=False)
    text, offsets, waiting = "", [], 0

    def pieces() -> Iterator[tuple[str, int]]:
        yield from ((stream.push(token), 1) for token in ids)
        yield stream.finish(), 0

    for piece, tokens in pieces():
        waiting += tokens
        if piece:
            offsets += [(len(text), len(text) + len(piece))] * waiting
            text, waiting = text + piece, 0
    return text, offsets + [(len(text), len(text))] * waiting


def pinned_spans(prompt: EncodedPrompt, parts: Sequence[str], *, system: bool) -> list[Span]:
    """The tokens of a prompt that --pin and --pin-system name."""
    spans = []
    if system:
        if not prompt.before_user:
            raise UsageError("--pin-system pins the system message of a chat: add --chat")
        spans.append((0, prompt.before_user))
    for part in parts:
        if prompt.text is None or prompt.offsets is None:
            raise UsageError("--pin takes a part of a text: give --prompt or --prompt-file")
        if not part:
            raise UsageError("--pin takes a text that is not empty")
        try:
            spans += token_ranges(prompt.text, prompt.offsets, part)
        except ValueError as error:
            raise ValueError(f"--pin: {error}") from None
    return spans
