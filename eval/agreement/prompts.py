"""Prompts from a JSON-lines file, as token ids."""

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


def read_prompts(
    path: Path,
    tokenizer: Tokenizer,
    *,
    categories: Sequence[str] = (),
    count: int,
    shortest: int,
    longest: int,
) -> list[Prompt]:
    """The first `count` prompts of each category, of `shortest` to `longest` tokens.

    A line is a JSON object with `messages`, `prompt` (a text), or `turns` (texts of the user, of
    which the first is taken); `id` or `question_id`, and `category`, are optional. Texts go through
    the chat template, if the tokenizer has one. The shortest prompts come first.

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
            ids = _ids(row, tokenizer)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if shortest <= len(ids) <= longest:
            taken[category] += 1
            name = row.get("id", row.get("question_id", number))
            found.append(Prompt(str(name), category, ids))
    if not found:
        among = f" of {', '.join(categories)}" if categories else ""
        raise ValueError(
            f"{path}: no prompt{among} has {shortest} (more than the largest budget) to {longest} "
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


def _ids(row: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    messages = row.get("messages")
    if messages is None:
        turns = row.get("turns")
        text = turns[0] if isinstance(turns, list) and turns else row.get("prompt")
        if not isinstance(text, str):
            raise ValueError("it has no `messages`, no `prompt` and no `turns`")
        if not tokenizer.chat_templates:
            return tokenizer.encode(text)
        messages = [{"role": "user", "content": text}]
    if not isinstance(messages, list):
        raise ValueError(f"`messages` must be a list, not {type(messages).__name__}")
    return tokenizer.encode_chat(messages)
