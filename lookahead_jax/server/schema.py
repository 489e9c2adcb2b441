"""The bodies of requests: their fields, defaults and checks.

A field that is left out, or null, means what the same option of `lookahead generate` means when it
is left out. Unknown and unsupported fields are refused by name, except with a value that changes
nothing.
"""

from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, Field, PlainValidator
from pydantic_core import from_json

from lookahead_jax.decoding.grammar import Grammar
from lookahead_jax.decoding.logprobs import MAX_ALTERNATIVES
from lookahead_jax.decoding.sampling import MAX_BIAS, MAX_BIASES, Sampling
from lookahead_jax.engine.requests import MAX_EOS_IDS
from lookahead_jax.server.chat_schema import (
    MAX_TOOLS,
    Message,
    ResponseFormat,
    Strict,
    Tool,
    ToolChoice,
    chosen_tool,
    one_call,
)
from lookahead_jax.server.errors import Refused

MAX_STOPS, MAX_STOP_LENGTH, MAX_CHOICES = 16, 1000, 128
MAX_COMPLETION_LOGPROBS = 5  # as OpenAI's; chats may ask for more
# Fields that an endpoint does not support, and their values without effect: those of OpenAI's API,
# and at the end those that the routers of SGLang and vLLM add to every request.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
    "ignore_eos": (False,),
    "include_reasoning": (True,),
    "no_stop_trim": (False,),
    "return_hidden_states": (False,),
    "separate_reasoning": (True,),
    "skip_special_tokens": (True,),
    "stream_reasoning": (True,),
}
_TEMPLATES = ("chat_template", "chat_template_kwargs")


def _prompts(value: Any) -> list[str | list[int]]:
    """One prompt or several, as strings or token ids."""
    if isinstance(value, str) or _are_ids(value):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(p, str) or _are_ids(p) for p in value):
        raise ValueError("must be a string, a list of token ids, or a list of such prompts")
    if not value or not all(value):
        raise ValueError("must not be empty")
    return value


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int and 0 <= i < 2**31 for i in value)


def _document(value: Any) -> str | list[int]:
    if not (isinstance(value, str) or _are_ids(value)) or not value:
        raise ValueError("must be a string or a list of token ids, and not empty")
    return value


def _stops(value: Any) -> list[str]:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(stop, str) for stop in value):
        raise ValueError("must be a string or a list of strings")
    if len(value) > MAX_STOPS or not all(1 <= len(stop) <= MAX_STOP_LENGTH for stop in value):
        raise ValueError(f"must be up to {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters")
    return value


def _bias(value: Any) -> dict[int, float]:
    """Token ids, written as strings, with the bias of each."""
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise ValueError(f"must be an object with up to {MAX_BIASES} token ids")
    for token, bias in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise ValueError(f'{token!r} is not a token id: keys are ids, such as "42"')
        if type(bias) not in (int, float) or not abs(bias) <= MAX_BIAS:
            raise ValueError(
                f"the bias of token {token} must be from {-MAX_BIAS:g} to {MAX_BIAS:g}"
            )
    return {int(token): float(bias) for token, bias in value.items()}


def _some(messages: list["Message"]) -> list["Message"]:
    if not messages:
        raise ValueError("must not be empty")
    return messages


TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Body(Strict):
    """The fields of both endpoints."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[int, float], PlainValidator(_bias)] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = 0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: Annotated[list[str], PlainValidator(_stops)] = Field(default_factory=list)
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=MAX_EOS_IDS)
    """Not OpenAI's: tokens that end a continuation, besides the model's own."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    policy: str | None = None
    """Not OpenAI's: the policy that cuts the prompt, one of those the server was started with."""
    drafter: str | None = None
    """Not OpenAI's: "none", or the drafter that the server was started with."""
    response_format: ResponseFormat = ResponseFormat(type="text")
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = ""

    @property
    def sampling(self) -> Sampling:
        """The settings of sampling."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
        )

    @property
    def grammar(self) -> Grammar | None:
        """What the answer must be, by `response_format`."""
        if self.response_format.json_schema is not None:
            return Grammar.json_schema(self.response_format.json_schema.schema_)
        return Grammar.json_object() if self.response_format.type == "json_object" else None

    @property
    def alternatives(self) -> int | None:
        """How many alternatives of each token the answer names; None: no log-probabilities."""
        return None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @pydantic.model_validator(mode="after")
    def _only_streams_have_options(self):
        if self.stream_options is not None and not self.stream:
            raise _wrong("stream_options", "stream_options need stream = true")
        return self


class CompletionBody(Body):
    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    document: Annotated[str | list[int] | None, PlainValidator(_document)] = None
    """Not OpenAI's: read and cut on its own, before every prompt; see `engine.requests.Request`."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None

    @property
    def alternatives(self) -> int | None:
        """As `Body.alternatives`."""
        return self.logprobs


class ChatBody(Body):
    messages: Annotated[list[Message], AfterValidator(_some)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    add_generation_prompt: bool = True
    """Not OpenAI's, but vLLM's: end where a new turn of the assistant begins."""
    continue_final_message: bool = False
    """Not OpenAI's, but vLLM's: continue the last message instead of beginning a new turn."""
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Annotated[ToolChoice, PlainValidator(chosen_tool)] = ToolChoice("auto")
    parallel_tool_calls: Annotated[bool, PlainValidator(one_call)] = False
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None

    @property
    def alternatives(self) -> int | None:
        """As `Body.alternatives`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told about."""
        return [] if self.tool_choice.mode == "none" else self.tools

    @pydantic.model_validator(mode="after")
    def _tools_to_choose(self):
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise _wrong("tools", "tools: two functions have the same name")
        mode, name = self.tool_choice
        if mode == "required" and (not names or name not in (None, *names)):
            called = "a function" if name is None else f"function {name!r}"
            raise _wrong("tool_choice", f"tool_choice: {called} is not among the tools")
        if self.offered and self.response_format.type != "text":
            raise _wrong(
                "response_format", "response_format and tools exclude each other: leave out one"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _alternatives_of_something(self):
        if self.top_logprobs and not self.logprobs:
            raise _wrong("top_logprobs", "top_logprobs needs logprobs = true")
        return self

    @pydantic.model_validator(mode="after")
    def _one_ending(self):
        if self.continue_final_message and self.add_generation_prompt:
            raise _wrong(
                "continue_final_message",
                "continue_final_message needs add_generation_prompt = false, which is true if left "
                "out",
            )
        return self

    @pydantic.model_validator(mode="after")
    def _one_maximum(self):
        if None not in (self.max_tokens, self.max_completion_tokens):
            name = "max_completion_tokens"
            raise _wrong(name, f"{name} is another name of max_tokens: give only one of them")
        return self


class TokenizeBody(Strict):
    """The fields of /tokenize, with vLLM's names: a text, or the messages of a chat."""

    model: str
    prompt: str | None = None
    messages: Annotated[list[Message], AfterValidator(_some)] | None = None
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    add_generation_prompt: bool = True

    @pydantic.model_validator(mode="after")
    def _one_source(self):
        if (self.prompt is None) == (self.messages is None):
            raise _wrong("prompt", "give either a prompt or messages")
        return self


AnyBody = CompletionBody | ChatBody
_Kind = TypeVar("_Kind", bound=Strict)


def parse_body(kind: type[_Kind], content: bytes) -> _Kind:
    """The fields of a body; `Refused` with status 400 names the first wrong one."""
    try:
        fields = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise Refused(400, "the body must be a JSON object", code="invalid_json")
    given = {name: value for name, value in fields.items() if value is not None}
    for name in [n for n in given if n in _NEUTRAL and n not in kind.model_fields]:
        value = given.pop(name)
        if not any(type(value) in _alike(type(n)) and value == n for n in _NEUTRAL[name]):
            raise _wrong(name, f"{name} is not supported here; leave it out")
    for name in _TEMPLATES:
        if name in given:
            raise _wrong(name, f"{name}: only the model's own chat template is used; leave it out")
    try:
        return kind.model_validate(given)
    except pydantic.ValidationError as error:
        raise _complaint(error) from None


def _alike(kind: type) -> tuple[type, ...]:
    return (int, float) if kind is int else (kind,)


def _complaint(error: pydantic.ValidationError) -> Refused:
    """The first error, with the path of its field."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return _wrong(name, f"there is no field {name!r}", "unknown_field")
    return _wrong(name, f"{name}: {message}" if name else message)


def _wrong(name: str, message: str, code: str = "invalid_value") -> Refused:
    return Refused(400, message, param=name or None, code=code)
