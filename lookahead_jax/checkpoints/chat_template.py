"""Chat templates: Jinja programs that turn messages into the text a model was trained on."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes
import numpy as np

from lookahead_jax.checkpoints.hf_files import files_of_folder, find, read_text
from lookahead_jax.checkpoints.template_worker import TemplateWorker, environment

MAX_BYTES = 2**20  # of one template; the longest published ones have some ten thousand
_MAX_TEMPLATES = 100
_MAX_DEPTH = 100
_FOLDER = "additional_chat_templates"
# Names under which messages carry reasoning; templates read the first, gpt-oss the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # its last space shows whether the template trims the message


def read_templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a directory by name; the usual one is called "default".

    `chat_template.jinja` and the files of `additional_chat_templates/` win over the templates in
    `settings`, the content of tokenizer_config.json.

    Raises:
      ValueError: when a template is malformed, too large, or outside the directory.
    """
    templates = {}
    if (path := find(directory, "chat_template.jinja", limit=MAX_BYTES)) is not None:
        templates["default"] = read_text(path)
    for path in files_of_folder(directory, _FOLDER, suffix=".jinja", limit=MAX_BYTES):
        templates[path.stem] = read_text(path)
    declared = settings.get("chat_template")
    if not templates and declared is not None:
        templates = {"default": declared} if isinstance(declared, str) else _named(declared)
        if not all(isinstance(text, str) for pair in templates.items() for text in pair):
            raise ValueError(f"{directory}: chat_template is neither text nor named texts")
    if len(templates) > _MAX_TEMPLATES or any(len(t) > MAX_BYTES for t in templates.values()):
        raise ValueError(
            f"{directory}: refused, more than {_MAX_TEMPLATES} chat templates or one of more than "
            f"{MAX_BYTES} characters"
        )
    return templates


def _named(declared: Any) -> dict[Any, Any]:
    """Templates by name, or listed as {"name": ..., "template": ...}; {None: None} otherwise."""
    if isinstance(declared, Mapping):
        return dict(declared)
    try:
        return {entry["name"]: entry["template"] for entry in declared}
    except (TypeError, KeyError):
        return {None: None}


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool | str,
    variables: Mapping[str, Any],
) -> str:
    """The text of a chat, as `apply_chat_template` of transformers 5.24 renders it.

    Args:
      source: the Jinja template.
      messages: {"role": ..., "content": ...} each; entries that are None count as missing.
      add_generation_prompt: end where the assistant's answer begins.
      continue_final_message: end within the last message, so that the model continues it. A
        text names the field of the message to continue ("content" otherwise).
      variables: further names that the template may read.

    Raises:
      ValueError: when the template fails, takes too long or too much memory, or the last
        message cannot be continued.
    """
    for message in messages:
        if not isinstance(message, Mapping):
            raise ValueError(f"a chat message must be an object with role and content: {message!r}")
    chat = plain_data([{k: v for k, v in message.items() if v is not None} for message in messages])
    chat = [_with_reasoning_names(message) for message in chat]
    if continue_final_message:
        if add_generation_prompt:
            raise ValueError(
                "continue_final_message continues the last message and add_generation_prompt "
                "begins a new one; pass add_generation_prompt=False"
            )
        field = "content" if continue_final_message is True else str(continue_final_message)
        final = _tag_final_message(chat, field, source)
    context = {
        **plain_data(variables),
        "messages": chat,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        text = _worker().render(source, context)
    except ValueError as error:
        raise ValueError(f"the chat template failed: {error}") from error
    return _cut_behind_final_message(text, final) if continue_final_message else text


def literal_text(source: str) -> str:
    """The text and the strings that are written in a template, separated by null characters.

    The whole source of a template that is not valid Jinja.
    """
    try:
        syntax = environment().parse(source)
    except (jinja2.TemplateError, RecursionError):
        return source
    texts = [node.data for node in syntax.find_all(jinja2.nodes.TemplateData)]
    constants = [node.value for node in syntax.find_all(jinja2.nodes.Const)]
    return "\0".join([*texts, *(value for value in constants if isinstance(value, str))])


@functools.lru_cache(maxsize=8)
def reads_name(source: str, name: str) -> bool:
    """Whether a template reads a variable; no for one that is not valid Jinja."""
    try:
        syntax = environment().parse(source)
    except (jinja2.TemplateError, RecursionError):
        return False
    return any(node.name == name for node in syntax.find_all(jinja2.nodes.Name))


def plain_data(value: Any, depth: int = 0) -> Any:
    """The value rebuilt from JSON types: methods of other objects may do harm in a template.

    Raises:
      ValueError: when lists and mappings are nested more than 100 deep.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"messages or template arguments are nested more than {_MAX_DEPTH} deep")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {plain_data(k, depth + 1): plain_data(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item, depth + 1) for item in value]
    if isinstance(value, np.generic):
        return plain_data(value.item(), depth)
    for kind in (str, int, float):  # members of enumerations
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"


def _with_reasoning_names(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the names that templates read."""
    given = [message[name] for name in _REASONING if message.get(name) is not None]
    if not given:
        return message
    return {"thinking": given[0], **message, "reasoning_content": given[0]}


def _tag_final_message(chat: list[dict[str, Any]], field: str, source: str) -> str:
    """Marks the end of the last message's text; returns that text without the mark."""
    final = chat[-1].get(field) if chat else None
    if final is None:
        raise ValueError(f"continue_final_message: the last message has no {field!r} to continue")
    fields = [field]
    if field in _REASONING:  # the same text has several names
        fields = [name for name in _REASONING if chat[-1].get(name) == final]
    if not any(name in source for name in fields):
        raise ValueError(f"continue_final_message: the chat template does not read {field!r}")
    if isinstance(final, list):
        for block in reversed(final):
            if isinstance(block, dict) and isinstance(block.get("text"), str):
                block["text"] += _TAG
                return block["text"].removesuffix(_TAG)
        raise ValueError("continue_final_message: the last message has no text to continue")
    if not isinstance(final, str):
        raise ValueError(f"continue_final_message: {field!r} of the last message is not text")
    for name in fields:
        chat[-1][name] = final + _TAG
    return final


def _cut_behind_final_message(text: str, final: str) -> str:
    at = text.rfind(_TAG.strip())
    if at < 0 or final.strip() not in text:
        raise ValueError(
            "continue_final_message: the last message does not appear in the rendered chat; the "
            "chat template changes it, so it cannot be continued"
        )
    # Without the last space of the tag the template trims messages, so their end is trimmed too.
    return text[:at] if text.startswith(_TAG, at) else text[:at].rstrip()


@functools.cache
def _worker() -> TemplateWorker:
    return TemplateWorker()
