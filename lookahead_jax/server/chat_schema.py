"""The parts of a chat's body: messages, tools, and what an answer must be."""

import json
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import Field, PlainValidator

MAX_TOOLS = 128


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


def _content(value: Any) -> str:
    """A string, or the joined texts of a list of parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    for part in value:
        if not isinstance(part, dict) or set(part) != {"type", "text"} or part["type"] != "text":
            raise ValueError('parts must be {"type": "text", "text": ...}: only text is supported')
        if not isinstance(part["text"], str):
            raise ValueError("the text of a part must be a string")
    return "".join(part["text"] for part in value)


def _arguments(value: Any) -> dict[str, Any]:
    """The arguments of a call, which OpenAI's API writes as a JSON text."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError("must be the text of a JSON object")
    return parsed


class CalledFunction(Strict):
    name: str
    arguments: Annotated[dict[str, Any], PlainValidator(_arguments)]


class ToolCall(Strict):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    role: Literal["system", "user", "assistant", "tool"]
    content: Annotated[str, PlainValidator(_content)]
    pin: bool = False
    """Not OpenAI's: keep this message in the cache, whatever its score."""
    tool_calls: list[ToolCall] = []
    tool_call_id: str = ""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _left_out(cls, value: Any) -> Any:
        """Drops null fields: clients send an answer back as it came, with a refusal of null.

        One with calls has no content.
        """
        if not isinstance(value, dict):
            return value
        given = {name: given for name, given in value.items() if given is not None}
        return {"content": "", **given} if "tool_calls" in given else given

    @pydantic.model_validator(mode="after")
    def _parts_of_its_role(self):
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls: only messages of the assistant have them")
        if self.tool_call_id and self.role != "tool":
            raise ValueError("tool_call_id: only messages of a tool have it")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


class Function(Strict):
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
    strict: bool | None = None
    """Without effect: arguments always follow the schema."""

    @pydantic.field_validator("parameters")
    @classmethod
    def _of_an_object(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value.get("type", "object") != "object":
            raise ValueError('arguments are an object: the schema must have "type": "object"')
        return {"type": "object", **value}


class Tool(Strict):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        return self.model_dump(exclude={"function": {"strict"}})


class ToolChoice(NamedTuple):
    """Whether an answer may, must or must not call a function, and which; None: any."""

    mode: Literal["none", "auto", "required"]
    name: str | None = None


def chosen_tool(value: Any) -> ToolChoice:
    """The field `tool_choice`: a mode, or a named function."""
    if value in ("none", "auto", "required"):
        return ToolChoice(value)
    named = value.get("function") if isinstance(value, dict) else None
    if (
        isinstance(named, dict)
        and value == {"type": "function", "function": named}
        and set(named) == {"name"}
        and isinstance(named["name"], str)
    ):
        return ToolChoice("required", named["name"])
    raise ValueError(
        'must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
    )


def one_call(value: Any) -> bool:
    """The field `parallel_tool_calls`."""
    if value is not False:
        raise ValueError("an answer has one call at most: leave it out, or send false")
    return False


class NamedSchema(Strict):
    name: str = ""
    description: str = ""
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    """Without effect: the answer always follows the schema."""


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @pydantic.model_validator(mode="after")
    def _schema_of_its_type(self):
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: give it with the type json_schema, and only then")
        return self
