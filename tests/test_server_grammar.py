"""The server's response_format and tools, as OpenAI's client sees them."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from lookahead_jax.checkpoints.load import load
from lookahead_jax.decoding.grammar import Grammar
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.engine.engine import Engine
from lookahead_jax.engine.requests import Limits
from lookahead_jax.generation.generate import generate
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.server.chat_schema import Message, Tool, ToolChoice
from lookahead_jax.server.prompts import make_requests
from lookahead_jax.server.schema import ChatBody, parse_body
from lookahead_jax.server.tools import ToolUse, chat_with_tools, takes_tools
from tests import tiny
from tests.serving import NAME, running, until

POLICY, BUDGET, NEW, PROMPT = SnapKV(window=4, pool="avg", kernel=3), 16, 128, 1200
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2, 30]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop_it", "description": "Stops."}},
]
CALLS = [("weather", {"city": c, "days": d}) for c in ("Oslo", "Rome") for d in (1, 2, 30)]
CALLS.append(("stop_it", {}))
WITH_TOOLS = (
    "{% if tools %}T:{% for t in tools %}{{ t.function.name }},{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{% for c in m.tool_calls %}CALL {{ c.function.name }} {{ c.function.arguments.city }}"
    "{% endfor %};{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save_chat_model(folder, num_hidden_layers=1, max_position_embeddings=2048)
    return load(folder)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A model whose template writes tools."""
    folder = tmp_path_factory.mktemp("native")
    tiny.save_chat_model(folder, WITH_TOOLS, num_hidden_layers=1, max_position_embeddings=2048)
    return load(folder)


@pytest.fixture(scope="module")
def server(model):
    engine = Engine(
        model, policy=POLICY, budget=BUDGET, rows=2, max_new_tokens=NEW, max_prompt_tokens=PROMPT,
        burst=4, drafter="trie", draft_nodes=8,
    )  # fmt: skip
    with running(model, engine) as server:
        yield server


def chat(server, **fields):
    messages = fields.pop("messages", [{"role": "user", "content": "hi"}])
    return server.client().chat.completions.create(
        model=NAME, messages=messages, max_tokens=NEW, **fields
    )


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 3}])
def test_a_json_schema_is_followed_as_by_generate(model, server, sampling):
    answer = chat(server, response_format=schema_format(SCHEMA), **sampling)
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert ("weather", json.loads(choice.message.content)) in CALLS
    completion = server.client().completions.create(
        model=NAME, prompt="hi", max_tokens=NEW,
        extra_body={"response_format": schema_format(SCHEMA)}, **sampling,
    )  # fmt: skip
    settings = dict(sampling)
    alone = generate(
        model, ["hi"], policy=POLICY, budget=BUDGET, max_new_tokens=NEW,
        grammar=Grammar.json_schema(SCHEMA), seeds=[settings.pop("seed", 0)],
        sampling=Sampling(**settings),
    )  # fmt: skip
    assert completion.choices[0].text == alone.text[0]


def test_a_json_object_is_the_beginning_of_one_at_least(server):
    answer = chat(server, response_format={"type": "json_object"}, temperature=1.0)
    (choice,) = answer.choices
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    plain, text = chat(server), chat(server, response_format={"type": "text"})
    assert text.choices[0].message.content == plain.choices[0].message.content


@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_is_one_of_the_functions_whole_and_streamed(server, seed):
    given = dict(tools=TOOLS, tool_choice="required", temperature=1.5, seed=seed, n=2)
    whole = chat(server, **given)
    for choice in whole.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls
        assert call.type == "function"
        assert call.id.startswith("call_")
        assert (call.function.name, json.loads(call.function.arguments)) in CALLS
    streamed: dict[int, list[str]] = {0: ["", ""], 1: ["", ""]}
    finish = {}
    for chunk in chat(server, stream=True, **given):
        (choice,) = chunk.choices
        assert not choice.delta.content
        for call in choice.delta.tool_calls or ():
            assert call.index == 0
            streamed[choice.index][0] += call.function.name or ""
            streamed[choice.index][1] += call.function.arguments
        finish[choice.index] = choice.finish_reason
    assert finish == {0: "tool_calls", 1: "tool_calls"}
    for choice in whole.choices:
        function = choice.message.tool_calls[0].function
        assert streamed[choice.index] == [function.name, function.arguments]


def test_a_named_function_is_called(server):
    named = {"type": "function", "function": {"name": "stop_it"}}
    (choice,) = chat(server, tools=TOOLS, tool_choice=named).choices
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("stop_it", "{}")
    assert choice.finish_reason == "tool_calls"


def test_a_call_that_is_cut_short_says_so(server):
    client = server.client()
    named = {"type": "function", "function": {"name": "weather"}}
    for most in (5, 45):
        (choice,) = client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "hi"}], max_tokens=most,
            tools=TOOLS, tool_choice=named,
        ).choices  # fmt: skip
        assert choice.finish_reason == "length"
        calls = choice.message.tool_calls or []
        assert [call.function.name for call in calls] == (["weather"] if most > 5 else [])


def test_tools_may_be_left_alone(server):
    plain = chat(server, tools=TOOLS, tool_choice="none")
    assert plain.choices[0].message.content == chat(server).choices[0].message.content
    (choice,) = chat(server, tools=TOOLS).choices
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    pieces = [c.choices[0].delta.content or "" for c in chat(server, tools=TOOLS, stream=True)]
    assert "".join(pieces) == choice.message.content


def test_calls_and_results_are_read_in_the_next_turn(server):
    (choice,) = chat(server, tools=TOOLS, tool_choice="required").choices
    call = choice.message.tool_calls[0]

    def prompt_tokens(result):
        """Of the chat with this result of the call; the tiny tokenizer has a token per byte."""
        messages = [
            {"role": "user", "content": "hi"},
            choice.message.model_dump(),
            {"role": "tool", "tool_call_id": call.id, "content": result},
        ]
        return chat(server, tools=TOOLS, messages=messages).usage.prompt_tokens

    assert prompt_tokens("rain") == prompt_tokens("") + len("rain")


def use(model, choice="auto", name=None):
    tools = [Tool.model_validate(tool) for tool in TOOLS]
    return ToolUse.of(tools, ToolChoice(choice, name), model.tokenizer)


CALL = '{"name": "weather", "arguments": {"city": "Oslo", "days": 1}}'
TAGGED = f"<tool_call>\n{CALL}\n</tool_call>"


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "tagged", "content", "called"),
    [
        (TAGGED, True, "", True),
        (f"Well <b>:\n{TAGGED}", True, "Well <b>:\n", True),
        ("a < b <tool_cal", True, "a < b <tool_cal", False),
        (CALL, False, "", True),
        ("Hello {x", False, "Hello {x", False),
        ("", True, "", False),
    ],
)
def test_the_reader_gives_back_content_and_call(model, native, size, text, tagged, content, called):
    reader = use(model if tagged else native).reader()
    deltas = [reader.feed(text[i : i + size]) for i in range(0, len(text), size)]
    deltas.append(reader.close())
    assert "".join(delta.get("content", "") for delta in deltas) == content
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert reader.called == called
    assert len([c for c in calls if "id" in c]) == called
    if called:
        assert calls[0]["function"]["name"] == "weather"
        arguments = "".join(call["function"]["arguments"] for call in calls)
        assert json.loads(arguments) == {"city": "Oslo", "days": 1}


@pytest.mark.parametrize("cut", range(len(TAGGED)))
def test_a_cut_call_shows_no_more_than_its_arguments(model, cut):
    reader = use(model).reader()
    deltas = [reader.feed(TAGGED[:cut]), reader.close()]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    arguments = "".join(call["function"]["arguments"] for call in calls)
    assert '{"city": "Oslo", "days": 1}'.startswith(arguments)


def follows(model, grammar, text):
    """Whether the text is one of the grammar: True; the beginning of one: None."""
    row = grammar.compile(model.tokenizer, vocab_size=258, end_ids=(257,)).begin()
    for token in model.tokenizer.encode(text, special=False):
        if not row.mask()[token // 32] >> (token % 32) & 1:
            return False
        row.observe([token])
    return True if row.mask()[257 // 32] >> (257 % 32) & 1 else None


def test_the_grammar_of_tools(model, native):
    auto, plain = (use(m).grammar(m.tokenizer) for m in (model, native))
    required = use(model, "required").grammar(model.tokenizer)
    named = use(model, "required", "stop_it").grammar(model.tokenizer)
    wrong = TAGGED.replace("Oslo", "Bonn")
    cases = [
        (auto, {TAGGED: True, f"So: {TAGGED}": True, "a <b>\nc": True, wrong: False,
                "<tool_call>x": False, TAGGED + "x": False, "": True}),
        (plain, {CALL: True, "So {": True, "{x": False, CALL.replace("1", "7"): False}),
        (required, {TAGGED: True, "a": False, wrong: False, "": None}),
        (named, {TAGGED: False, '<tool_call>\n{"name": "stop_it", "arguments": {}': None}),
    ]  # fmt: skip
    for grammar, texts in cases:
        for text, expected in texts.items():
            assert follows(model, grammar, text) is expected, text


def test_templates_with_and_without_tools(model, native):
    tools = [Tool.model_validate(tool) for tool in TOOLS]
    messages = [
        Message.model_validate(message)
        for message in (
            {"role": "system", "content": "Be kind."},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "a", "type": "function",
                 "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]},
            {"role": "tool", "tool_call_id": "a", "content": "rain"},
        )
    ]  # fmt: skip
    assert takes_tools(native.tokenizer)
    assert not takes_tools(model.tokenizer)
    chat, described = chat_with_tools(messages, tools, native.tokenizer)
    text = native.tokenizer.render_chat(chat, tools=described)
    assert text == "T:weather,stop_it,s:Be kind.;a:CALL weather Oslo;t:rain;"
    chat, described = chat_with_tools(messages, tools, model.tokenizer)
    assert described is None
    system, call, result = chat
    assert system["content"].startswith("Be kind.\n\n# Tools")
    assert all(json.dumps(tool.for_template()) in system["content"] for tool in tools)
    assert '{"name": "weather", "arguments": {"city": "Oslo"}}' in call["content"]
    assert result == {"role": "user", "content": "<tool_response>\nrain\n</tool_response>"}


def function(**fields):
    return [{"type": "function", "function": {"name": "f", **fields}}]


DEEP = {"type": "object", "properties": {"a": {"items": {"not": {}}}}}
REFUSED = [
    ({"response_format": schema_format(DEEP)}, "response_format", r"properties\.a\.items: .*not"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
    ({"response_format": schema_format([])}, "response_format.json_schema.schema", "dict"),
    ({"tools": function(parameters=DEEP)}, "tools", r"function f: properties\.a\.items"),
    ({"tools": function(parameters={"type": "array"})}, "tools.0.function.parameters", "object"),
    ({"tools": [*function(), *function()]}, "tools", "same name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name",
     "a-z"),
    ({"tools": [{"type": "search"}]}, "tools.0.type", "function"),
    ({"tool_choice": "required"}, "tool_choice", "not among the tools"),
    ({"tool_choice": "any", "tools": function()}, "tool_choice", "required"),
    ({"tools": function(), "tool_choice": {"type": "function", "function": {"name": "g"}}},
     "tool_choice", "'g' is not among"),
    ({"tools": function(), "parallel_tool_calls": True}, "parallel_tool_calls", "one call"),
    ({"tools": function(), "response_format": {"type": "json_object"}}, "response_format",
     "exclude"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [
        {"function": {"name": "f", "arguments": "{}"}}]}]}, "messages.0", "assistant"),
    ({"messages": [{"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "[]"}}]}]},
     "messages.0.tool_calls.0.function.arguments", "JSON object"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED)
def test_what_is_wrong_or_unsupported_is_refused_by_name(server, fields, param, message):
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        server.client().chat.completions.create(model=NAME, extra_body=body, messages=[])
    assert caught.value.param == param


def test_tokenize_counts_the_tools(server):
    body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}]}
    answer = chat(server, tools=TOOLS, messages=body["messages"])
    status, counted = server.send("POST", "/tokenize", {**body, "tools": TOOLS})
    assert (status, counted["count"]) == (200, answer.usage.prompt_tokens)
    assert counted["count"] > server.send("POST", "/tokenize", body)[1]["count"] + 100


def test_completions_have_no_tools(server):
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        server.client().completions.create(model=NAME, prompt="a", extra_body={"tools": function()})


def test_choices_share_one_grammar(model):
    body = {"model": NAME, "messages": [{"role": "user", "content": "a"}], "n": 3, "tools": TOOLS}
    requests = make_requests(
        parse_body(ChatBody, json.dumps(body).encode()), max_new_tokens=4,
        tokenizer=model.tokenizer, plain=True,
        limits=Limits(max_prompt_tokens=PROMPT, max_new_tokens=4, max_question_tokens=0),
    )  # fmt: skip
    assert len({request.grammar for request in requests}) == 1
    assert requests[0].grammar is not None


def test_grammars_that_compile_slowly_hold_up_only_each_other(model, monkeypatch):
    """There are more of them than a pool of the event loop has threads."""
    engine = Engine(
        model, policy=POLICY, budget=BUDGET, rows=2, max_new_tokens=4, max_prompt_tokens=32
    )
    engine.warm_up([1])
    compiling, go_on, compile_ = [], threading.Event(), Grammar.compile

    def slow(self, *args, **keywords):
        compiling.append(self)
        assert go_on.wait(20)
        return compile_(self, *args, **keywords)

    body = {"model": NAME, "prompt": "a", "max_tokens": 1}
    posing = body | {"response_format": {"type": "json_object"}}
    with running(model, engine, queue_seconds=4.0) as server, ThreadPoolExecutor(40) as pool:
        monkeypatch.setattr(Grammar, "compile", slow)
        begun = time.monotonic()
        slow_ones = [pool.submit(server.send, "POST", "/v1/completions", posing) for _ in range(40)]
        until(lambda: server.service.taken == 40)
        assert server.send("POST", "/v1/completions", body)[0] == 200
        assert time.monotonic() - begun < 4
        ends = [answer.result(30) for answer in slow_ones]
        assert {(status, content["error"]["code"]) for status, content in ends} == {
            (503, "queue_timeout")
        }
        assert server.send("POST", "/v1/completions", body)[0] == 200
        until(lambda: server.service.taken == 2)  # those that the threads have begun
        go_on.set()
        until(lambda: server.service.taken == 0)
        assert len(compiling) == 2  # the others had ended before they began
