"""Calls of functions: what an answer with one looks like, for the model and for the client.

A call is written as Hermes and Qwen write it: <tool_call>, a JSON object with name and arguments on
a line of its own, </tool_call>. Models whose chat template knows tools but not these tags (Llama 3)
write the object alone. The form is part of the grammar, so that reading it back cannot fail.
"""

import dataclasses
import json
import uuid
from collections.abc import Sequence
from typing import Any

from lookahead_jax.checkpoints.chat_template import reads_name
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.decoding.grammar import (
    MAX_GRAMMAR_BYTES,
    Grammar,
    GrammarError,
    check_cost,
    json_rule,
)
from lookahead_jax.engine.requests import RequestError
from lookahead_jax.server.chat_schema import Message, Tool, ToolChoice

_BEGIN, _END = "<tool_call>", "</tool_call>"
_HEAD, _MIDDLE = '{"name": "', '", "arguments": '
_SYSTEM = """\
# Tools

You may call one of these functions to help with the user's request:
<tools>
{tools}
</tools>

To call it, answer with a JSON object with its name and arguments within <tool_call></tool_call>:
<tool_call>
{{"name": <name>, "arguments": <object>}}
</tool_call>"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolUse:
    """How the answers of one request call its functions."""

    tools: Sequence[Tool]  # those that may be called
    tagged: bool  # calls are within <tool_call> tags
    required: bool  # an answer is a call, and nothing else

    @classmethod
    def of(
        cls, tools: Sequence[Tool], choice: ToolChoice, tokenizer: Tokenizer
    ) -> "ToolUse | None":
        """None where no function may be called."""
        if choice.mode == "none" or not tools:
            return None
        callable_ = [tool for tool in tools if choice.name in (None, tool.function.name)]
        source = _template(tokenizer, tools=True)
        # The text of an answer omits special tokens: they could not be read back.
        special = tokenizer.token_id(_BEGIN) in tokenizer.special_ids
        tagged = not special and (not takes_tools(tokenizer) or _BEGIN in source)
        return cls(tools=callable_, tagged=tagged, required=choice.mode == "required")

    def grammar(self, tokenizer: Tokenizer) -> Grammar:
        """What an answer may be. RequestError for parameters that are no supported JSON schema."""
        schemas = [tool.function.parameters for tool in self.tools]
        try:
            check_cost(schemas)
        except GrammarError as error:
            raise RequestError(str(error), "tools") from None
        if len(json.dumps(schemas)) > MAX_GRAMMAR_BYTES:
            raise RequestError(
                f"the parameters of all functions have more than {MAX_GRAMMAR_BYTES} bytes", "tools"
            )
        names, rules = [], []
        for i, tool in enumerate(self.tools):
            parameters = tool.function.parameters
            try:
                Grammar.json_schema(parameters).check(tokenizer)
            except GrammarError as error:
                raise RequestError(f"function {tool.function.name}: {error}", "tools") from None
            names.append(f"{json.dumps(tool.function.name + _MIDDLE)} arguments_{i}")
            rules.append(f"arguments_{i}: {json_rule(parameters)}")
        end = "}\n" + _END if self.tagged else "}"
        call = f"{json.dumps(_HEAD)} ({' | '.join(names)}) {json.dumps(end)}"
        if self.tagged:
            call = f'"\\n" {call}'
        if self.required:
            start = [f'start: "{_BEGIN}" {call}' if self.tagged else f"start: {call}"]
        elif self.tagged:
            start = [f"start: TEXT? | begun {call}", f'begun[lazy]: TEXT "{_BEGIN}"']
            start.append(r"TEXT: /(.|\n)*/")
        else:
            start = [f"start: TEXT? | {call}", r"TEXT: /[^{](.|\n)*/"]
        return Grammar.lark("\n".join(["%llguidance {}", *start, *rules]))

    def reader(self) -> "CallReader":
        """A reader of one answer."""
        return CallReader(self)


class CallReader:
    """Takes the text of an answer in pieces, and gives it back as content and a call."""

    def __init__(self, use: ToolUse):
        self._use = use
        self._text = ""
        self._begin = f"{_BEGIN}\n" if use.tagged else ""
        self._behind = len("}\n" + _END) if use.tagged else 1  # characters after the arguments
        self._shown = 0  # characters of content, and of arguments, that were given back
        self._told = 0
        self._at: int | None = None  # where the arguments begin
        self.called = False

    def feed(self, piece: str) -> dict[str, Any]:
        """What is new, as the `delta` of a stream; empty if nothing is certain."""
        self._text += piece
        call_at = self._call_at()
        delta: dict[str, Any] = {}
        if (end := self._content_end(call_at)) > self._shown:
            delta["content"] = self._text[self._shown : end]
            self._shown = end
        if call_at is not None:
            delta |= self._call(call_at, whole=False)
        return delta

    def close(self) -> dict[str, Any]:
        """What had been held back, at the end of the answer."""
        call_at = self._call_at()
        if call_at is not None:
            return self._call(call_at, whole=True)
        rest, self._shown = self._text[self._shown :], len(self._text)
        return {"content": rest} if rest else {}

    def _call_at(self) -> int | None:
        """Where the call begins, if the text has one."""
        if self._use.tagged:
            at = self._text.find(_BEGIN)
            return None if at < 0 else at
        return 0 if self._text.startswith("{") else None

    def _content_end(self, call_at: int | None) -> int:
        """Length of the text that is certainly no call."""
        if call_at is not None:
            return call_at
        if not self._use.tagged:
            return len(self._text)
        held = (n for n in range(len(_BEGIN) - 1, 0, -1) if self._text.endswith(_BEGIN[:n]))
        return len(self._text) - next(held, 0)

    def _call(self, call_at: int, *, whole: bool) -> dict[str, Any]:
        opening: dict[str, Any] = {}
        if self._at is None:
            head = self._begin + _HEAD
            name, found, _ = self._text[call_at + len(head) :].partition(_MIDDLE)
            if not found:
                return {}
            self._at = call_at + len(head) + len(name) + len(_MIDDLE)
            self.called = True
            opening = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
            opening["function"] = {"name": name, "arguments": ""}
        rest = self._text[self._at :]
        end = _object_end(rest) if whole else max(len(rest) - self._behind, self._told)
        new, self._told = rest[self._told : end], end
        if not (new or opening):
            return {}
        function = {**opening.pop("function", {}), "arguments": new}
        return {"tool_calls": [{"index": 0, **opening, "function": function}]}


def _object_end(text: str) -> int:
    """Where the JSON object at the beginning of a text ends; at its end if it was cut short."""
    try:
        return json.JSONDecoder().raw_decode(text)[1]
    except (ValueError, RecursionError):
        return len(text)


def takes_tools(tokenizer: Tokenizer) -> bool:
    """Whether the model's chat template writes tools."""
    return "tool_use" in tokenizer.chat_templates or reads_name(
        _template(tokenizer, tools=False), "tools"
    )


def _template(tokenizer: Tokenizer, *, tools: bool) -> str:
    templates = tokenizer.chat_templates
    if tools and "tool_use" in templates:
        return templates["tool_use"]
    return templates.get("default", "")


def chat_with_tools(
    messages: Sequence[Message], tools: Sequence[Tool], tokenizer: Tokenizer
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools for the model's chat template.

    For a template that knows no tools, they are described in the system message, calls become text
    of the assistant, and their results messages of the user.
    """
    chat = [message.for_template() for message in messages]
    described = [tool.for_template() for tool in tools]
    if takes_tools(tokenizer):
        return chat, described or None
    chat = [_as_text(message) for message in chat]
    if described:
        system = _SYSTEM.format(tools="\n".join(json.dumps(tool) for tool in described))
        if chat[0]["role"] == "system":
            chat[0]["content"] += "\n\n" + system
        else:
            chat.insert(0, {"role": "system", "content": system})
    return chat, None


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message without calls and results that are more than text."""
    content = message["content"]
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = [
        "\n".join([_BEGIN, json.dumps({key: call["function"][key] for key in _KEYS}), _END])
        for call in message.get("tool_calls", ())
    ]
    return {"role": message["role"], "content": "\n".join(filter(None, [content, *calls]))}


_KEYS = ("name", "arguments")
