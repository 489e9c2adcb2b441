"""Prompts from a JSON-lines file, and perhaps their answers, as token ids."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lookahead_jax.checkpoints.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """One prompt of the file."""

    id: str
    category: str  # "" if the file names none
    ids: list[int]
    answer: list[int] | None  # None if the file's answers are not read


def read_prompts(
    path: Path,
    tokenizer: Tokenizer,
    *,
    categories: Sequence[str] = (),
    count: int,
    shortest: int,
    longest: int,
    answers: bool = False,
    answer_tokens: int | None = None,
) -> list[Prompt]:
    """The first `count` prompts of each category, of `shortest` to `longest` tokens.

    A line is a JSON object with `messages`, `prompt` (a text), or `turns` (texts of the user, of
    which the first is taken); `id` or `question_id`, and `category`, are optional. Texts go through
    the chat template, if the tokenizer has one. The shortest prompts come first. With `answers` the
    last message is the answer, or the text `response` beside a prompt; its first `answer_tokens`
    are taken, and the length is that of both.

    Raises ValueError, naming the line, for anything else, and if no prompt is left.
    """
    found: list[Prompt] = []
    taken: Counter[str] = Counter()
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        row = _row(path, number, line)
        category = str(row.get("category", ""))
        if (categories and category not in categories) or taken[category] == count:
            continue
        try:
            ids, answer = _answered(row, tokenizer) if answers else _question(row, tokenizer)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        answer = None if answer is None else answer[:answer_tokens]
        if shortest <= len(ids) + len(answer or ()) <= longest:
            taken[category] += 1
            name = row.get("id", row.get("question_id", number))
            found.append(Prompt(str(name), category, ids, answer))
    if not found:
        among = f" of {', '.join(categories)}" if categories else ""
        raise ValueError(
            f"{path}: no prompt{among} has {shortest} (for the largest budget) to {longest} "
            "tokens: change --categories, --budgets or --longest"
        )
    if len({prompt.id for prompt in found}) < len(found):
        raise ValueError(f"{path}: two prompts have one id: give each line another `id`")
    return sorted(found, key=lambda prompt: len(prompt.ids))


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: expected a JSON object")
    return row


def _question(row: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[list[int], None]:
    """The tokens of the prompt; all messages are part of it."""
    return _encoded(_asked(row, tokenizer), tokenizer), None


def _encoded(asked: str | list[Any], tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(asked) if isinstance(asked, str) else tokenizer.encode_chat(asked)


def _asked(row: Mapping[str, Any], tokenizer: Tokenizer) -> str | list[Any]:
    """The messages of a row; a text, if the tokenizer has no chat template for it."""
    messages = row.get("messages")
    if messages is None:
        turns = row.get("turns")
        text = turns[0] if isinstance(turns, list) and turns else row.get("prompt")
        if not isinstance(text, str):
            raise ValueError("it has no `messages`, no `prompt` and no `turns`")
        if not tokenizer.chat_templates:
            return text
        messages = [{"role": "user", "content": text}]
    if not isinstance(messages, list):
        raise ValueError(f"`messages` must be a list, not {type(messages).__name__}")
    return messages


def _answered(row: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens of prompt and answer."""
    asked, response = _asked(row, tokenizer), row.get("response")
    if "messages" in row:
        last = asked[-1] if asked else None
        if not isinstance(last, dict) or last.get("role") != "assistant":
            raise ValueError("its last message is not the assistant's, which is the answer")
        asked, response = asked[:-1], last.get("content")
    if not isinstance(response, str) or not response:
        raise ValueError("it has no answer: `response`, or a last message of the assistant")
    return _encoded(asked, tokenizer), tokenizer.encode_behind(response, plain=True)
