"""From the body of an HTTP request to requests of the engine, in token ids."""

import json
from collections.abc import Callable, Sequence
from functools import partial

from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.engine.requests import Limits, Request, RequestError
from lookahead_jax.host.panics import panics_as_errors
from lookahead_jax.server.chat_schema import Message, Tool
from lookahead_jax.server.schema import AnyBody, CompletionBody, TokenizeBody
from lookahead_jax.server.tools import ToolUse, chat_with_tools


def make_requests(
    body: AnyBody,
    *,
    max_new_tokens: int,
    tokenizer: Tokenizer,
    limits: Limits,
    plain: bool,
    drafter: str = "none",
    tenant: str = "",
) -> list[Request]:
    """One request per prompt and choice; the seeds of a prompt's choices are consecutive.

    `drafter` is the name of the server's; ValueError for a body that names another.
    With `plain`, control tokens that the client's texts spell are ordinary characters. Text is
    refused by its bytes before it is tokenized: ValueError, `TooLong` where it is too long.
    """
    if body.drafter not in (None, "none", drafter):
        may = "leave it out" if drafter == "none" else f'give "{drafter}" or "none"'
        raise RequestError(
            f"drafter: the server was started with --drafter {drafter}, so {may}, not "
            f"{body.drafter!r}",
            "drafter",
        )
    document, pin, grammar = None, [], body.grammar
    if isinstance(body, CompletionBody):
        document, prompts = _completion_ids(body, tokenizer, limits, plain)
    else:
        chat_ids = partial(
            _chat_ids, tokenizer=tokenizer, limits=limits, plain=plain,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            tools=body.offered,
        )  # fmt: skip
        if (use := ToolUse.of(body.tools, body.tool_choice, tokenizer)) is not None:
            grammar = use.grammar(tokenizer)
        prompts = [chat_ids(body.messages)]
        pin = _pinned_spans(body.messages, prompts[0], chat_ids)
    return [
        Request(
            prompt=prompt,
            document=document,
            pin=pin,
            tenant=tenant,
            policy=body.policy,
            draft=body.drafter != "none",
            max_new_tokens=max_new_tokens,
            sampling=body.sampling,
            seed=body.seed + choice,
            stop=body.stop,
            stop_token_ids=body.stop_token_ids,
            logprobs=body.alternatives,
            grammar=grammar,
        )
        for prompt in prompts
        for choice in range(body.n)
    ]


def token_ids(
    body: TokenizeBody, *, tokenizer: Tokenizer, limits: Limits, plain: bool
) -> list[int]:
    """The ids that `make_requests` makes of the same prompt or chat; ValueError as there."""
    if body.messages is not None:
        return _chat_ids(
            body.messages, tokenizer=tokenizer, limits=limits, plain=plain,
            add_generation_prompt=body.add_generation_prompt, tools=body.tools,
        )  # fmt: skip
    text = body.prompt or ""
    limits.check_text([text], "prompt")
    with panics_as_errors("the text cannot be tokenized"):
        return tokenizer.encode(text, plain=plain)


def _completion_ids(
    body: CompletionBody, tokenizer: Tokenizer, limits: Limits, plain: bool
) -> tuple[list[int] | None, list[list[int]]]:
    document, behind = body.document, body.document is not None
    if isinstance(document, str):
        limits.check_text([document], "document")
    for prompt in body.prompt:
        if isinstance(prompt, str):
            limits.check_text([prompt], "prompt", behind=behind)
    encode = tokenizer.encode_behind if behind else tokenizer.encode
    with panics_as_errors("the text cannot be tokenized"):
        if isinstance(document, str):
            document = tokenizer.encode(document, plain=plain)
        prompts = [encode(p, plain=plain) if isinstance(p, str) else p for p in body.prompt]
    return document, prompts


def _chat_ids(
    messages: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    limits: Limits,
    plain: bool,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
    tools: Sequence[Tool] = (),
) -> list[int]:
    """The ids of a chat, which ends as the two arguments before the last say."""
    chat, described = chat_with_tools(messages, tools, tokenizer)
    texts = [message["content"] for message in chat]
    texts += [json.dumps(message["tool_calls"]) for message in chat if "tool_calls" in message]
    limits.check_text([*texts, *map(json.dumps, described or ())], "prompt")
    with panics_as_errors("the chat cannot be tokenized"):
        return tokenizer.encode_chat(
            chat,
            tools=described,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            plain=plain,
        )


def _pinned_spans(
    messages: Sequence[Message], ids: list[int], encode: Callable[[Sequence[Message]], list[int]]
) -> list[tuple[int, int]]:
    """The tokens of the messages that are to be pinned, in the chat's `ids`.

    They are those that change when another text takes the place of a message.
    """
    spans = []
    for i, message in enumerate(messages):
        if message.pin and message.content:
            content = message.content.strip() or message.content
            other = next(c for c in "abc" if c not in (content[0], content[-1]))
            changed = message.model_copy(update={"content": other})
            others = encode([*messages[:i], changed, *messages[i + 1 :]])
            start = _same(ids, others)
            end = len(ids) - _same(ids[start:][::-1], others[start:][::-1])
            if start < end:  # a template may leave a message out
                spans.append((start, end))
    return spans


def _same(row: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows have in common before they differ."""
    differ = (i for i, (a, b) in enumerate(zip(row, other, strict=False)) if a != b)
    return next(differ, min(len(row), len(other)))
