"""Log-probabilities, bias and penalties through the server, in the forms of OpenAI's API."""

import json

import numpy as np
import pytest

from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.generation.generate import generate
from tests.serving import chat_model, running
from tests.test_server import BUDGET, NEW, POLICY, TEMPLATE, WARM, chat, fields, make_engine

TOP = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("model"), TEMPLATE)


@pytest.fixture(scope="module")
def server(model):
    engine = make_engine(model)
    engine.warm_up()
    with running(model, engine) as server:
        yield server


@pytest.fixture(scope="module")
def expected(model):
    """Tokens and log-probabilities of the chat and of the prompt below, by `generate`."""
    result = generate(
        model, ["u:abc;a:", "stream me"], policy=POLICY, budget=BUDGET, max_new_tokens=NEW,
        sampling=Sampling(**WARM), seeds=[3, 3], logprobs=TOP,
    )  # fmt: skip
    return [
        (tokens, text, logprobs)
        for tokens, text, logprobs in zip(result.tokens, result.text, result.logprobs, strict=True)
    ]


ASKED = dict(seed=3, max_tokens=NEW, **WARM)


def test_a_chats_log_probabilities_are_those_of_generate(model, server, expected):
    tokens, _, logprobs = expected[0]
    body = chat(logprobs=True, top_logprobs=TOP, **ASKED)
    status, whole = server.send("POST", "/v1/chat/completions", body)
    assert status == 200
    content = whole["choices"][0]["logprobs"]["content"]
    assert len(content) == whole["usage"]["completion_tokens"] == NEW
    assert [entry["bytes"] for entry in content] == [
        list(model.tokenizer.token_bytes(t)) for t in tokens
    ]
    values = [entry["logprob"] for entry in content]
    np.testing.assert_allclose(values, logprobs.chosen, rtol=0, atol=1e-3)
    top = [[other["logprob"] for other in entry["top_logprobs"]] for entry in content]
    np.testing.assert_allclose(top, logprobs.top, rtol=0, atol=1e-3)
    parts = [entry for entry in content if entry["bytes"][0] >= 0x80]
    assert all(entry["token"] == f"\\x{entry['bytes'][0]:02x}" for entry in parts)
    assert all(entry["token"].encode() == bytes(entry["bytes"]) for entry in content
               if entry not in parts)  # fmt: skip


def test_streams_have_the_same_log_probabilities(server):
    for path, body, field in (
        ("chat/completions", chat(logprobs=True, top_logprobs=2, **ASKED), "content"),
        ("completions", fields(logprobs=2, **ASKED), "tokens"),
    ):
        whole = server.send("POST", f"/v1/{path}", body)[1]["choices"][0]
        counting = {"stream": True, "stream_options": {"include_usage": True}}
        lines = server.send("POST", f"/v1/{path}", body | counting)[1].split("\n\n")[:-2]
        *chunks, counts = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert all(chunk["usage"] is None for chunk in chunks)
        assert counts["usage"]["completion_tokens"] == len(whole["logprobs"][field])
        parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        parts = [part for part in parts if part is not None]
        assert len(parts) > 3
        for name, values in whole["logprobs"].items():
            streamed = [value for part in parts for value in part[name] or []]
            assert streamed == (values or [])


def test_a_completions_log_probabilities_name_the_places_of_its_tokens(server, expected):
    _, text, logprobs = expected[1]
    body = fields(prompt="stream me", logprobs=3, stop=text[20:22], **ASKED)
    choice = server.send("POST", "/v1/completions", body)[1]["choices"][0]
    given = choice["logprobs"]
    count = len(given["tokens"])
    assert choice["text"] == text[: text.find(text[20:22])]
    np.testing.assert_allclose(given["token_logprobs"], logprobs.chosen[:count], atol=1e-3)
    ends = [*given["text_offset"][1:], len(text)]
    for token, begin, end in zip(given["tokens"], given["text_offset"], ends, strict=True):
        if not token.startswith("bytes:"):
            assert text[begin:end].endswith(token) or end == len(text)
    for name, chosen, named, top in zip(
        given["tokens"], given["token_logprobs"], given["top_logprobs"], logprobs.top, strict=False
    ):
        assert named[name] == chosen
        assert len(named) in (3, 4)  # the chosen token among them
        best = sorted(named.values(), reverse=True)[:3]
        np.testing.assert_allclose(best, top[:3], rtol=0, atol=1e-3)


def test_who_does_not_ask_gets_none_and_nothing_is_fetched_for_it(server, monkeypatch):
    def fetched(row):
        raise AssertionError("log-probabilities were fetched for a row that did not ask")

    monkeypatch.setattr(server.engine._batch, "logprobs", fetched)
    for path, body in (("completions", fields()), ("chat/completions", chat(max_tokens=2))):
        status, content = server.send("POST", f"/v1/{path}", body)
        assert (status, content["choices"][0]["logprobs"]) == (200, None)


def test_a_bias_forces_a_token_and_leaves_its_log_probability(server):
    body = fields(logit_bias={"65": 100}, max_tokens=6, logprobs=0)
    content = server.send("POST", "/v1/completions", body)[1]
    token = content["choices"][0]["logprobs"]["tokens"][0]
    assert content["choices"][0]["text"] == token * 6
    assert content["choices"][0]["logprobs"]["token_logprobs"][0] < -1  # the model's own


WRONG = [
    ("completions", fields(logprobs=6), "logprobs"),
    ("completions", fields(logprobs=True), "logprobs"),
    ("completions", fields(top_logprobs=1), "top_logprobs"),
    ("completions", fields(frequency_penalty=2.5), "frequency_penalty"),
    ("completions", fields(presence_penalty="1"), "presence_penalty"),
    ("completions", fields(logit_bias={"a": 1}), "logit_bias"),
    ("completions", fields(logit_bias={"1": 101}), "logit_bias"),
    ("completions", fields(logit_bias={"1": True}), "logit_bias"),
    ("completions", fields(logit_bias={"256": 1}), "logit_bias"),
    ("completions", fields(logit_bias={str(i): 1 for i in range(301)}), "logit_bias"),
    ("completions", fields(best_of=2, n=2), "best_of"),
    ("chat/completions", chat(logprobs=1), "logprobs"),
    ("chat/completions", chat(top_logprobs=1), "top_logprobs"),
    ("chat/completions", chat(logprobs=True, top_logprobs=21), "top_logprobs"),
]


@pytest.mark.parametrize(("path", "body", "param"), WRONG)
def test_what_is_wrong_is_refused_by_name(server, path, body, param):
    status, content = server.send("POST", f"/v1/{path}", body)
    assert (status, content["error"]["param"]) == (400, param)
