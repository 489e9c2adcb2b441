"""The server, as OpenAI's client and plain sockets see it: answers, refusals, ends."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from socket import SHUT_RDWR

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.engine.engine import Engine
from lookahead_jax.engine.requests import Limits
from lookahead_jax.generation.generate import generate
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.server.prompts import make_requests
from lookahead_jax.server.schema import ChatBody, parse_body
from tests.serving import NAME, Gate, chat_model, running, until

POLICY, BUDGET, ROWS, NEW, PROMPT = SnapKV(window=4, pool="avg", kernel=3), 16, 3, 48, 16
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
KEY = "sesame"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("model"), TEMPLATE)


def make_engine(model):
    return Engine(
        model, policy=POLICY, budget=BUDGET, rows=ROWS, max_new_tokens=NEW,
        max_prompt_tokens=PROMPT, max_question_tokens=16, burst=4, prompt_store_bytes=10**8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(model):
    """One for all tests that leave it as it was."""
    engine = make_engine(model)
    engine.warm_up()
    with running(model, engine, max_body_bytes=100_000) as server:
        yield server


@pytest.fixture(scope="module")
def spare(model):
    """An engine for servers with limits or ends of their own, one after the other."""
    return make_engine(model)


@pytest.fixture
def gate(server, monkeypatch):
    with Gate.before(server.engine, monkeypatch) as gate:
        yield gate


@pytest.fixture
def spare_gate(spare, monkeypatch):
    with Gate.before(spare, monkeypatch) as gate:
        yield gate


def alone(model, prompt, seed=0, **sampling):
    """What `lookahead generate` makes of one prompt."""
    return generate(
        model, [prompt], policy=POLICY, budget=BUDGET, max_new_tokens=NEW,
        sampling=Sampling(**sampling), seeds=[seed],
    )  # fmt: skip


def fields(**changes):
    return {"model": NAME, "prompt": "abc", "max_tokens": 5, **changes}


def chat(**changes):
    return {"model": NAME, "messages": [{"role": "user", "content": "abc"}], **changes}


# `generate` compiles once for greedy rows and once for rows that ask for everything.
WARM = dict(
    temperature=0.9, top_p=0.9, top_k=100, min_p=0.01, repetition_penalty=1.3,
    presence_penalty=0.4, frequency_penalty=-0.3, logit_bias={97: 2.5, 98: -100},
)  # fmt: skip
SETTINGS = [
    dict(),
    dict(seed=7, **WARM),
    dict(seed=2**40 + 3, **WARM),
    dict(seed=-1, **WARM),
]


def test_answers_are_those_of_generate_whatever_else_is_in_the_batch(model, server):
    prompts = ["def add(a, b):", "x", "one two three"]
    cases = [(prompt, settings) for prompt in prompts for settings in SETTINGS]
    client = server.client()

    def ask(case):
        prompt, settings = case
        return client.completions.create(
            model=NAME, prompt=prompt, max_tokens=NEW, extra_body=settings
        )

    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(pool.map(ask, cases))
    for (prompt, settings), answer in zip(cases, answers, strict=True):
        expected = alone(model, prompt, **settings)
        (choice,) = answer.choices
        assert choice.text == expected.text[0]
        assert choice.finish_reason == "length"
        assert answer.object == "text_completion"
        assert answer.usage.prompt_tokens == expected.prompt_tokens[0]
        assert answer.usage.completion_tokens == len(expected.tokens[0])
        assert answer.usage.total_tokens == len(prompt) + NEW
        kept = min(len(prompt), BUDGET)
        assert answer.usage.lookahead == {"kept_entries": kept, "steps": NEW - 1}
    assert len({answer.id for answer in answers}) == len(answers)


def test_what_is_left_out_is_what_generate_leaves_out(model, server):
    answer = server.client().completions.create(model=NAME, prompt="abc")
    assert answer.choices[0].text == alone(model, "abc").text[0]  # greedy, as far as allowed


def test_a_stream_adds_up_to_the_answer(server):
    client, given = server.client(), dict(model=NAME, prompt="stream me", max_tokens=NEW, n=2)
    whole = client.completions.create(**given, temperature=1.0)
    usage = {"include_usage": True}
    chunks = list(
        client.completions.create(**given, temperature=1.0, stream=True, stream_options=usage)
    )
    *pieces, counts = chunks
    assert counts.choices == []
    assert counts.usage.completion_tokens == whole.usage.completion_tokens == 2 * NEW
    assert counts.usage.prompt_tokens == whole.usage.prompt_tokens == len("stream me")
    assert counts.usage.lookahead == whole.usage.lookahead
    for choice in whole.choices:
        mine = [c for chunk in pieces for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["length"]
        assert len(mine) > 3
    without = list(client.completions.create(**given, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in without)


def test_a_chat_goes_through_the_models_own_template(model, server):
    client = server.client()
    messages = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    text = "s:x;u:ab;a:"
    expected = alone(model, text, seed=3, **WARM).text[0]
    given = dict(model=NAME, messages=messages, seed=3, extra_body=WARM)
    answer = client.chat.completions.create(**given, max_completion_tokens=NEW)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected
    assert answer.usage.prompt_tokens == len(text)
    first, *chunks = list(client.chat.completions.create(**given, max_tokens=NEW, stream=True))
    assert first.object == "chat.completion.chunk"
    assert first.choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"


def test_the_tokens_of_a_pinned_message_are_found(model):
    limits = Limits(max_prompt_tokens=64, max_new_tokens=4, max_question_tokens=0)
    said = ["abc", "", "b", " a ", "\u00e9a"]
    for pinned in ([0], [1, 2], [3, 4], [0, 2, 4]):
        messages = [
            {"role": "user", "content": text} | ({"pin": True} if i in pinned else {})
            for i, text in enumerate(said)
        ]
        body = parse_body(ChatBody, json.dumps(chat(messages=messages)).encode())
        (request,) = make_requests(
            body, max_new_tokens=4, tokenizer=model.tokenizer, limits=limits, plain=True
        )
        decode = model.tokenizer.decode
        texts = [decode(request.prompt[start:end]) for start, end in request.pin]
        assert texts == [said[i] for i in pinned if said[i]]


def test_a_pinned_message_is_answered_and_refused_beyond_the_budget(model, server, monkeypatch):
    body = chat(messages=[{"role": "user", "content": "abcde", "pin": True}], max_tokens=3)
    status, content = server.send("POST", "/v1/chat/completions", body)
    assert status == 200
    expected = alone(model, "u:abcde;a:").text[0][:3]
    assert content["choices"][0]["message"]["content"] == expected
    few = dataclasses.replace(server.engine.limits, max_pinned_tokens=4)
    monkeypatch.setattr(server.engine, "limits", few)
    status, content = server.send("POST", "/v1/chat/completions", body)
    assert (status, content["error"]["param"]) == (400, "messages")
    assert "5 tokens are pinned and the budget is 4" in content["error"]["message"]


def test_an_answer_can_be_sent_back_as_it_came(server):
    given = dict(model=NAME, max_tokens=1)
    ask, create = {"role": "user", "content": "a"}, server.client().chat.completions.create
    said = create(messages=[ask], **given).choices[0].message
    written = {"role": "assistant", "content": said.content}
    answers = [create(messages=[ask, m, ask], **given) for m in (said, written)]
    assert answers[0].choices == answers[1].choices
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens


def test_several_prompts_and_choices_have_seeds_in_a_row(model, server):
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    answer = server.client().completions.create(
        model=NAME, prompt=prompts, n=2, seed=5, max_tokens=NEW, extra_body=WARM
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice in answer.choices:
        prompt, seed = prompts[choice.index // 2], 5 + choice.index % 2
        expected = alone(model, prompt, seed=seed, **WARM)
        assert choice.text == expected.text[0]
    assert answer.usage.prompt_tokens == 7
    assert answer.usage.completion_tokens == 4 * NEW


def test_stop_strings_end_a_text_before_them(model, server):
    text = alone(model, "abc").text[0]
    stop = text[8:10]
    for stops in (stop, [stop, "never in it"]):
        given = dict(model=NAME, prompt="abc", max_tokens=NEW, stop=stops)
        answer = server.client().completions.create(**given)
        assert answer.choices[0].text == text[: text.find(stop)]
        assert answer.choices[0].finish_reason == "stop"
        chunks = list(server.client().completions.create(**given, stream=True))
        assert "".join(c.choices[0].text for c in chunks) == text[: text.find(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_stop_token_ids_end_a_text(model, server):
    expected = alone(model, "abc", seed=7, **WARM)
    tokens = expected.tokens[0]
    at = next(i for i in range(1, NEW) if tokens[i] not in tokens[:i])
    unused = next(i for i in range(256) if i not in tokens)
    answer = server.client().completions.create(
        model=NAME, prompt="abc", max_tokens=NEW, seed=7,
        extra_body={"stop_token_ids": [unused, tokens[at]], **WARM},
    )  # fmt: skip
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == at + 1
    assert expected.text[0].startswith(answer.choices[0].text[:-1])


def test_an_equal_prompt_and_an_equal_document_are_read_once(server):
    client = server.client()

    def cached(**given):
        given = dict(model=NAME, max_tokens=4, **given)
        usage = client.completions.create(**given).usage
        return usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens

    assert [cached(prompt="read me once") for _ in range(2)] == [(0, 12), (12, 12)]
    document = {"document": "a long document"}
    asked = [cached(prompt=question, extra_body=document) for question in ("why?", "who?")]
    assert asked == [(0, 19), (15, 19)]
    assert 0 < server.engine.prompt_store.bytes <= 10**8


def test_models_and_health(server):
    client = server.client()
    assert [entry.id for entry in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "lookahead_jax"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    assert server.send("GET", "/health") == (200, {"status": "ok"})
    assert server.send("GET", "/ready") == (200, {"status": "ready"})
    entry = server.send("GET", f"/v1/models/{NAME}")[1]
    assert (entry["max_prompt_tokens"], entry["max_new_tokens"]) == (PROMPT, NEW)
    assert entry["max_model_len"] == PROMPT + 16 + NEW


def test_tokenize_gives_the_ids_that_a_request_is_read_with(model, server):
    status, content = server.send("POST", "/tokenize", {"model": NAME, "prompt": "a b\n"})
    assert (status, content["tokens"]) == (200, model.tokenizer.encode("a b\n", plain=True))
    assert (content["count"], content["max_prompt_tokens"]) == (len(content["tokens"]), PROMPT)
    chat = {"model": NAME, "messages": [{"role": "user", "content": "hi"}]}
    found = server.send("POST", "/tokenize", chat)[1]["tokens"]
    assert model.tokenizer.decode(found) == "u:hi;a:"
    answered = server.send("POST", "/v1/chat/completions", chat | {"max_tokens": 1})[1]
    assert answered["usage"]["prompt_tokens"] == len(found)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "other", "prompt": "a"}, 404, "model"),
        ({"model": NAME}, 400, "prompt"),
        ({"model": NAME, "prompt": "a", "messages": []}, 400, "messages"),
        ({"model": NAME, "prompt": "a" * 70_000}, 400, "prompt"),
        ({"model": NAME, "prompt": "a", "colour": 1}, 400, "colour"),
    ],
)
def test_tokenize_refuses_by_name(server, body, status, param):
    found, content = server.send("POST", "/tokenize", body)
    assert (found, content["error"]["param"]) == (status, param)


WRONG = [
    ("completions", fields(model="other"), 404, "model"),
    ("completions", {"prompt": "a"}, 400, "model"),
    ("completions", fields(colour="red"), 400, "colour"),
    ("completions", fields(temperature="hot"), 400, "temperature"),
    ("completions", fields(temperature=-1), 400, "temperature"),
    ("completions", fields(temperature=True), 400, "temperature"),
    ("completions", fields(top_p=0), 400, "top_p"),
    ("completions", fields(n=0), 400, "n"),
    ("completions", fields(n=1.0), 400, "n"),
    ("completions", fields(seed="1"), 400, "seed"),
    ("completions", fields(stop=[""]), 400, "stop"),
    ("completions", fields(stop=3), 400, "stop"),
    ("completions", fields(stream="yes"), 400, "stream"),
    ("completions", fields(stream_options={"include_usage": True}), 400, "stream_options"),
    ("completions", fields(stream=True, stream_options={"x": 1}), 400, "stream_options.x"),
    ("completions", fields(max_tokens=0), 400, "max_tokens"),
    ("completions", fields(max_tokens=NEW + 1), 400, "max_tokens"),
    ("completions", fields(prompt=""), 400, "prompt"),
    ("completions", fields(prompt=[]), 400, "prompt"),
    ("completions", fields(prompt=[[]]), 400, "prompt"),
    ("completions", fields(prompt=[1, "a"]), 400, "prompt"),
    ("completions", fields(prompt=[1, -1]), 400, "prompt"),
    ("completions", fields(prompt=[True]), 400, "prompt"),
    ("completions", fields(prompt=[2**40]), 400, "prompt"),
    ("completions", fields(prompt=[[5.5]]), 400, "prompt"),
    ("completions", fields(prompt=[5.0]), 400, "prompt"),
    ("completions", fields(document=[5.5]), 400, "document"),
    ("completions", fields(top_k=2.5), 400, "top_k"),
    ("completions", fields(top_k=2.0), 400, "top_k"),
    ("completions", fields(seed=1.5), 400, "seed"),
    ("completions", fields(max_tokens=5.0), 400, "max_tokens"),
    ("completions", fields(stop_token_ids=[5.5]), 400, "stop_token_ids.0"),
    ("completions", fields(stop_token_ids=[-1]), 400, "stop_token_ids.0"),
    ("completions", fields(stop_token_ids=7), 400, "stop_token_ids"),
    ("completions", fields(stop_token_ids=list(range(17))), 400, "stop_token_ids"),
    ("completions", fields(add_generation_prompt=True), 400, "add_generation_prompt"),
    ("completions", fields(prompt=[256]), 400, "prompt"),
    ("completions", fields(prompt="a" * (PROMPT + 1)), 400, "prompt"),
    ("completions", fields(prompt=["a"] * 100), 400, "prompt"),
    ("completions", fields(document="", prompt="a"), 400, "document"),
    ("completions", fields(document="a", prompt="b" * 17), 400, "prompt"),
    ("completions", fields(document="a" * (PROMPT + 1), prompt="b"), 400, "document"),
    ("completions", fields(best_of=2), 400, "best_of"),
    ("completions", fields(echo=True), 400, "echo"),
    ("completions", fields(messages=[]), 400, "messages"),
    ("chat/completions", chat(chat_template="{{ x }}"), 400, "chat_template"),
    ("chat/completions", chat(chat_template_kwargs={}), 400, "chat_template_kwargs"),
    ("chat/completions", chat(messages=[]), 400, "messages"),
    ("chat/completions", chat(messages=["a"]), 400, "messages.0"),
    ("chat/completions", chat(messages=[{"role": "user"}]), 400, "messages.0.content"),
    (
        "chat/completions",
        chat(messages=[{"role": "assistant", "content": None}]),
        400,
        "messages.0.content",
    ),
    (
        "chat/completions",
        chat(messages=[{"role": "user", "content": "a", "pin": 1}]),
        400,
        "messages.0.pin",
    ),
    ("chat/completions", chat(messages=[{"role": "bot", "content": ""}]), 400, "messages.0.role"),
    (
        "chat/completions",
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        400,
        "messages.0.content",
    ),
    (
        "chat/completions",
        chat(messages=[{"role": "user", "content": "a", "name": "b"}]),
        400,
        "messages.0.name",
    ),
    ("chat/completions", chat(messages=[{"role": "user", "content": "a" * 99}]), 400, "messages"),
    ("chat/completions", chat(tools=[{"type": "function"}]), 400, "tools.0.function"),
    ("chat/completions", chat(response_format={"type": "json_object"}), 400, "response_format"),
    ("chat/completions", chat(max_tokens=2, max_completion_tokens=2), 400, "max_completion_tokens"),
    ("chat/completions", chat(prompt="a"), 400, "prompt"),
    ("chat/completions", chat(continue_final_message=True), 400, "continue_final_message"),
    ("chat/completions", chat(add_generation_prompt=1), 400, "add_generation_prompt"),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), WRONG)
def test_what_is_wrong_is_refused_by_name(server, path, body, status, param):
    found, content = server.send("POST", f"/v1/{path}", body)
    assert (found, content["error"]["param"]) == (status, param)
    assert content["error"]["type"] == "invalid_request_error"
    assert server.service.taken == 0


def test_what_asks_for_nothing_is_taken(server):
    neutral = dict(
        best_of=1, echo=False, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, suffix="",
        logprobs=None, user="me", seed=None, stop=None, n=None, stream=None, temperature=None,
    )  # fmt: skip
    assert server.send("POST", "/v1/completions", fields(**neutral))[0] == 200
    neutral = dict(tools=[], tool_choice="none", response_format={"type": "text"}, logprobs=False)
    assert server.send("POST", "/v1/chat/completions", chat(max_tokens=2, **neutral))[0] == 200


# What the routers of SGLang (0.3.2) and vLLM (0.1.17) write into every body.
ROUTED = dict(
    echo=False, ignore_eos=False, no_stop_trim=False, return_hidden_states=False,
    skip_special_tokens=True, stream=False,
)  # fmt: skip
ROUTED_CHAT = dict(
    ignore_eos=False, include_reasoning=True, logprobs=False, no_stop_trim=False,
    return_hidden_states=False, separate_reasoning=True, skip_special_tokens=True, stream=False,
    stream_reasoning=True,
)  # fmt: skip


def test_what_routers_add_is_taken(server):
    assert server.send("POST", "/v1/completions", fields(**ROUTED))[0] == 200
    assert server.send("POST", "/v1/chat/completions", chat(max_tokens=2, **ROUTED_CHAT))[0] == 200
    for name in set(ROUTED_CHAT) - {"logprobs", "stream"}:
        other = fields(**{name: not ROUTED_CHAT[name]})
        status, content = server.send("POST", "/v1/completions", other)
        assert (status, content["error"]["param"]) == (400, name)


def test_openais_client_raises_its_own_errors(server):
    client = server.client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt="a" * 99)
    assert caught.value.code == "context_length_exceeded"
    assert "99 tokens, more than max_prompt_tokens = 16" in caught.value.message
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="x", messages=[{"role": "user", "content": "a"}])
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"", {}, 400),
        (b"[]", {}, 400),
        (b"\xff", {}, 400),
        (b'{"model": NaN}', {}, 400),
        (b"[" * 50_000, {}, 400),
        (b'{"model": "tiny", "prompt": "\\ud800"}', {}, 400),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b" " * 100_001, {}, 413),
        (iter([b" " * 60_000] * 3), {}, 413),
        (b" " * 5_000_000, {}, 413),
    ],
)
def test_bodies_that_are_no_json_or_too_large(server, body, headers, status):
    connection = server.connect()
    given = {"Content-Type": "application/json"} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    connection.request("POST", "/v1/completions", body, given)
    response = connection.getresponse()
    assert response.status == status
    assert set(json.loads(response.read())["error"]) == {"message", "type", "param", "code"}
    connection.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/favicon.ico", 404),
        ("POST", "/", 405),
        ("GET", "/v1/models/x", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/tokenize", 405),
        ("OPTIONS", "/v1/completions", 405),
    ],
)
def test_other_paths_and_methods(server, method, path, status):
    found, content = server.send(method, path)
    assert found == status
    assert content["error"]["type"] == "invalid_request_error"


def test_metrics_are_prometheus_text(server):
    def read():
        status, text = server.send("GET", "/metrics")
        assert status == 200
        families = text_string_to_metric_families(text)
        return {(s.name, *s.labels.values()): s.value for f in families for s in f.samples}

    before = read()
    server.client().completions.create(model=NAME, prompt="metrics", max_tokens=9, n=2)
    assert server.send("POST", "/v1/completions", fields(n=0))[0] == 400
    after = read()

    def gain(*name):
        return after[name] - before.get(name, 0)

    assert gain("lookahead_generated_tokens_total") == 18
    assert gain("lookahead_prompt_tokens_total") == 14
    assert gain("lookahead_reused_prompt_tokens_total") == 7
    assert gain("lookahead_steps_total") == 16
    assert gain("lookahead_continuations_total", "length") == 2
    assert gain("lookahead_first_token_seconds_count") == 2
    assert gain("lookahead_http_responses_total", "/v1/completions", "200") == 1
    assert gain("lookahead_http_responses_total", "/v1/completions", "400") == 1
    assert {"lookahead_prompt_pause_seconds_count"} <= {name for name, *_ in after}
    assert after[("lookahead_running",)] == after[("lookahead_waiting",)] == 0
    assert after[("lookahead_prompt_store_bytes",)] == server.engine.prompt_store.bytes


def stream_of(server, body):
    """A connection whose streamed answer has begun, and its first piece."""
    connection = server.connect()
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    return connection


def test_a_client_that_leaves_frees_its_row_within_a_burst(server, gate):
    engine = server.engine
    for body in (fields(max_tokens=NEW, stream=True), fields(max_tokens=NEW)):
        connection = stream_of(server, body)
        until(lambda: engine.alive == 1)
        gate.allow(2)  # read and a burst of 4, twice: 9 tokens of 48
        if body.get("stream"):
            assert connection.getresponse().readline().startswith(b"data: ")
        until(lambda: engine.waiting == 0)
        connection.sock.shutdown(SHUT_RDWR)
        until(lambda: engine._queue._cancelled)
        assert engine.alive == 1
        gate.allow(1)
        until(lambda: engine.alive == 0)
        until(lambda: server.service.taken == 0)
    assert all(job is None for job in engine._rows)


def test_a_client_that_leaves_the_queue_is_forgotten(server, gate):
    engine = server.engine
    connections = [stream_of(server, fields()) for _ in range(ROWS + 2)]
    until(lambda: engine.alive == ROWS + 2)
    for connection in connections:
        connection.close()
    until(lambda: len(engine._queue._cancelled) == ROWS + 2)
    gate.allow(1)
    until(lambda: server.service.taken == 0)
    assert engine.alive == 0


def test_a_full_queue_and_a_long_wait(model, spare, spare_gate):
    limits = dict(max_queue=1, queue_seconds=1.0)
    with running(model, spare, **limits) as server, ThreadPoolExecutor(8) as pool:
        client = server.client()
        many = [pool.submit(client.completions.create, **fields(n=ROWS, max_tokens=NEW))]
        until(lambda: spare.alive == ROWS)
        waits = pool.submit(server.send, "POST", "/v1/completions", fields())
        until(lambda: spare.alive == ROWS + 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**fields())
        assert caught.value.code == "queue_full"
        assert caught.value.response.headers["retry-after"] == "1"
        status, content = waits.result(30)
        assert (status, content["error"]["code"]) == (503, "queue_timeout")
        with pytest.raises(openai.InternalServerError) as caught:
            many[0].result(30)
        assert caught.value.code == "queue_timeout"
        spare_gate.open()
        until(lambda: server.service.taken == 0)
        assert client.completions.create(**fields()).usage.completion_tokens == 5


def test_a_request_that_takes_too_long(model, spare, spare_gate):
    with running(model, spare, request_seconds=1.0) as server:
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(server.send, "POST", "/v1/completions", fields(max_tokens=NEW))
            until(lambda: spare.alive == 1)
            connection = stream_of(server, fields(max_tokens=NEW, stream=True))
            until(lambda: spare.alive == 2)
            spare_gate.allow(2)
            text = connection.getresponse().read().decode()
            connection.close()
            status, content = whole.result(30)
        assert (status, content["error"]["code"]) == (503, "timeout")
        *pieces, last, rest = text.split("\n\n")
        assert len(pieces) >= 2
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert rest == ""
        spare_gate.allow(1)
        until(lambda: server.service.taken == 0)


def test_the_key_is_asked_for_everywhere_but_for_health(model, spare):
    with running(model, spare, keys=[KEY]) as server:
        assert server.client(KEY).models.list().data
        assert server.client(KEY).completions.create(**fields()).choices
        for wrong in ("", "sesam", "sesame2", "Sesame", "\u00e9"):
            header = {"Authorization": f"Bearer {wrong}"}
            for path in ("/v1/models", "/metrics", "/v1/completions", "/nothing"):
                status, content = server.send("GET", path, **header)
                assert (status, content["error"]["code"]) == (401, "invalid_api_key")
        assert server.send("GET", "/v1/models", Authorization=f"Basic {KEY}")[0] == 401
        assert server.send("POST", "/v1/completions", fields())[0] == 401
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").completions.create(**fields())
        assert server.send("GET", "/health")[0] == 200


def test_clients_with_different_keys_share_no_stored_prompt(model, spare):
    with running(model, spare, keys=["sesame", "tahini"]) as server:
        cached = []
        for key in ("sesame", "sesame", "tahini"):
            usage = server.client(key).completions.create(**fields(prompt="a shared start")).usage
            cached.append(usage.prompt_tokens_details.cached_tokens > 0)
        assert cached == [False, True, False]
        assert server.send("GET", "/metrics", Authorization="Bearer tahini")[0] == 200


def test_a_signal_lets_requests_finish_and_takes_no_more(model, spare, spare_gate):
    with running(model, spare) as server, ThreadPoolExecutor(4) as pool:
        idle = server.connect()
        idle.request("GET", "/health")
        idle.getresponse().read()
        answers = [
            pool.submit(server.client().completions.create, **fields(max_tokens=NEW))
            for _ in range(ROWS + 1)
        ]
        until(lambda: spare.alive == ROWS + 1)
        spare_gate.allow(1)
        server.stop()
        until(lambda: server.service._closed is not None)
        spare_gate.open()
        for answer in answers:
            assert answer.result(30).usage.completion_tokens == NEW
        server.thread.join(30)
        assert not server.thread.is_alive()


def test_what_does_not_finish_in_time_fails_explicitly(model, spare, spare_gate):
    with running(model, spare, shutdown_seconds=1.0) as server:
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(server.send, "POST", "/v1/completions", fields(max_tokens=NEW))
            until(lambda: spare.alive == 1)
            connection = stream_of(server, fields(max_tokens=NEW, stream=True))
            half = server.connect()  # its body never comes
            half.putrequest("POST", "/v1/completions")
            half.putheader("Content-Type", "application/json")
            half.putheader("Content-Length", "100")
            half.endheaders()
            until(lambda: server.service.taken == 2)
            spare_gate.allow(2)
            begun = connection.getresponse()
            assert begun.readline().startswith(b"data: ")
            server.stop()
            status, content = whole.result(30)
            assert (status, content["error"]["code"]) == (503, "shutting_down")
            last = begun.read().decode().strip().split("\n\n")[-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
            connection.close()
            spare_gate.open()
            assert half.getresponse().status == 503
            half.close()
        server.thread.join(30)
        assert not server.thread.is_alive()
        assert spare.alive == 0


def test_a_second_signal_waits_for_nobody(model, spare, spare_gate):
    with running(model, spare, shutdown_seconds=600.0) as server, ThreadPoolExecutor(1) as pool:
        waits = pool.submit(server.send, "POST", "/v1/completions", fields())
        until(lambda: spare.alive == 1)
        server.stop()
        assert not waits.done()
        server.stop()
        status, content = waits.result(30)
        assert (status, content["error"]["code"]) == (503, "shutting_down")
        spare_gate.open()


def test_a_dead_engine_fails_everything_and_says_so(model, spare, monkeypatch, caplog):
    release = threading.Event()

    def fail():
        release.wait(30)
        raise RuntimeError("no device")

    monkeypatch.setattr(spare, "step", fail)
    with running(model, spare) as server, ThreadPoolExecutor(2) as pool:
        waits = pool.submit(server.send, "POST", "/v1/completions", fields())
        until(lambda: spare.alive == 1)
        release.set()
        status, content = waits.result(30)
        assert (status, content["error"]["code"]) == (503, "engine_failed")
        assert server.send("GET", "/health")[0] == 503
        assert server.send("POST", "/v1/completions", fields())[0] == 503
    assert "no device" in caplog.text
    monkeypatch.undo()
    spare.step()  # the cancelled request leaves the engine, which other tests use
    assert spare.alive == 0


def test_an_error_of_one_request_is_its_own(model, server, monkeypatch, caplog):
    engine = server.engine
    read, (bang,) = engine._reader.read, model.tokenizer.encode("!")

    def moody(requests):
        if requests[0].tokens[0] == bang:
            raise RuntimeError("secret detail")
        return (yield from read(requests))

    monkeypatch.setattr(engine._reader, "read", moody)
    status, content = server.send("POST", "/v1/completions", fields(prompt="!a"))
    assert status == 500
    assert content["error"]["type"] == "server_error"
    assert "secret" not in content["error"]["message"]
    assert "secret detail" in caplog.text
    assert server.send("POST", "/v1/completions", fields(prompt=["a", "!a"]))[0] == 500
    assert server.send("POST", "/v1/completions", fields())[0] == 200
    until(lambda: server.service.taken == 0)
