"""The server under nonsense and under load: everything is answered or refused, nothing is left."""

import gc
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor

import jax
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lookahead_jax.checkpoints.load import load
from lookahead_jax.engine.engine import Engine
from lookahead_jax.engine.requests import ActiveRequest, Event
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.server.schema import ChatBody, CompletionBody
from lookahead_jax.server.service import Call
from tests import tiny
from tests.serving import NAME, running, until

ROWS, NEW, PROMPT, STORED = 4, 40, 32, 600_000
CLIENTS, ROUNDS = 64, 3


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save_bytes_model(folder, num_hidden_layers=1)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    model = load(folder)
    engine = Engine(
        model, policy=SnapKV(window=4, pool="avg", kernel=3), budget=16, rows=ROWS,
        max_new_tokens=NEW, max_prompt_tokens=PROMPT, burst=4, prompt_store_bytes=STORED,
    )  # fmt: skip
    engine.warm_up()
    with running(model, engine, max_queue=24, max_body_bytes=20_000) as server:
        yield server


# Beartype, which checks every call in the tests, rolls global dice in the server's threads.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=9)}))
LIKELY = {
    "model": st.just(NAME),
    "prompt": st.text(max_size=9) | st.lists(st.integers(-1, 300), max_size=9),
    "messages": MESSAGES,
    "max_tokens": st.integers(0, 4),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(0, 5),
    "n": st.integers(0, 3),
    "seed": st.integers(),
    "stop": st.text(max_size=2) | st.lists(st.text(max_size=2), max_size=2),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
}
NAMES = sorted({*CompletionBody.model_fields, *ChatBody.model_fields, "logprobs", "tools", "x"})
NONSENSE = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), ANYTHING, max_size=3)


@st.composite
def bodies(draw):
    """Mostly a body that makes sense, with some of its fields replaced by anything."""
    names = draw(st.sets(st.sampled_from(sorted(LIKELY))))
    body = {name: draw(LIKELY[name]) for name in sorted(names | {"model"})}
    return body | (draw(NONSENSE) if draw(st.booleans()) else {})


SLOW_IS_FINE = settings(
    max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


def check_refusal(status, content):
    assert status in (400, 404, 405, 413, 415, 429), (status, content)
    assert set(content) == {"error"}
    assert set(content["error"]) == {"message", "type", "param", "code"}
    assert content["error"]["message"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_bodies_of_any_shape_are_answered_or_refused(server, path):
    kind = ChatBody if path.startswith("chat") else CompletionBody
    needed, seen = ("messages" if kind is ChatBody else "prompt"), set()

    @SLOW_IS_FINE
    @given(bodies(), LIKELY[needed])
    def ask(body, content):
        body.setdefault(needed, content)
        status, answer = server.send("POST", f"/v1/{path}", body)
        seen.add(status)
        if status != 200:
            check_refusal(status, answer)
            param = answer["error"]["param"]
            known = {*body, "model", "max_tokens"}
            assert param is None or {param, param.partition(".")[0]} & known
            return
        asked = {name for name, value in body.items() if value is not None}
        assert asked & set(LIKELY) <= set(kind.model_fields)
        if body.get("stream"):
            *pieces, done, rest = answer.split("\n\n")
            assert (done, rest) == ("data: [DONE]", "")
            assert all("error" not in json.loads(p.removeprefix("data: ")) for p in pieces)
        else:
            assert answer["usage"]["completion_tokens"] >= len(answer["choices"]) >= 1

    ask()
    assert {200, 400} <= seen
    until(lambda: server.service.taken == 0)


PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/v1/x"]


@SLOW_IS_FINE
@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]),
    st.sampled_from(PATHS),
    st.binary(max_size=40) | ANYTHING.map(json.dumps).map(str.encode),
    st.sampled_from(["application/json", "text/plain", "application/json; charset=utf-8", ""]),
)
def test_requests_of_any_kind_are_answered_or_refused(server, method, path, body, kind):
    status, content = server.send(method, path, body, Content_Type=kind)
    if status != 200:
        check_refusal(status, content)
    else:
        assert method == "GET"
        assert path in ("/v1/models", "/health", "/metrics")


def one_client(server, seed, outcomes):
    """Requests one after the other, each with an outcome; some leave in the middle.

    Every fourth client asks for one token at a time, as clients that classify do.
    """
    dice, most = random.Random(seed), NEW if seed % 4 else 1
    client = server.client()
    for _ in range(ROUNDS):
        body = dict(
            model=NAME,
            prompt="".join(dice.choices("abcdefgh ", k=dice.randint(1, PROMPT + 2))),
            max_tokens=dice.randint(1, most),
            temperature=dice.choice([0, 1]),
            seed=seed,
            n=dice.choice([1, 1, 1, 2]),
        )
        leaves = dice.random() < 0.3
        try:
            if leaves or dice.random() < 0.5:
                text = [""] * body["n"]
                stream = client.completions.create(**body, stream=True)
                for number, chunk in enumerate(stream):
                    if leaves and number == 2:
                        break
                    for choice in chunk.choices:
                        text[choice.index] += choice.text
                else:
                    leaves = False
                stream.close()
            else:
                answer = client.completions.create(**body)
                text = [choice.text for choice in answer.choices]
            outcomes.append((200, body, None if leaves else text))
        except openai.APIStatusError as error:
            outcomes.append((error.status_code, body, None))
    client.close()


def load_once(server, seed):
    outcomes = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(one_client, server, seed + i, outcomes) for i in range(CLIENTS)]
    for client in clients:
        client.result()
    until(lambda: server.service.taken == 0)
    return outcomes


def holdings(engine):
    """What a leak would add to: bytes and number of arrays, descriptors, objects of requests.

    The bytes are those besides the stored prompts, which have several lengths.
    """
    gc.collect()
    arrays = jax.live_arrays()
    # Not isinstance: it asks objects for __class__, and those of other packages may answer oddly.
    ours = [type(o).__name__ for o in gc.get_objects() if type(o) in (ActiveRequest, Call, Event)]
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    size = sum(array.nbytes for array in arrays) - engine.prompt_store.bytes
    return {"bytes": size, "arrays": len(arrays), "ours": ours, "files": files}


@pytest.mark.slow
def test_64_clients_of_whom_some_leave_get_an_answer_or_a_refusal(server):
    engine = server.engine
    load_once(server, 0)
    before = holdings(engine)
    outcomes = load_once(server, 1000)
    assert len(outcomes) == CLIENTS * ROUNDS
    count = {status: sum(s == status for s, *_ in outcomes) for status in {s for s, *_ in outcomes}}
    assert set(count) <= {200, 400, 429}
    assert count[200] > 20
    assert count[429] > 0  # 28 places
    assert engine.alive == engine.waiting == 0
    assert engine._rows == [None] * ROWS
    until(lambda: not server.service._calls)
    until(lambda: holdings(engine) == before)
    assert before["ours"] == []
    assert STORED * 0.9 < engine.prompt_store.bytes <= STORED
    assert any(body["max_tokens"] == 1 for status, body, _ in outcomes if status == 200)
    finished = [(body, text) for status, body, text in outcomes if text is not None]
    for body, text in finished[:12]:  # alone, each gets what it got in the crowd
        quiet = server.client().completions.create(**body)
        assert [choice.text for choice in quiet.choices] == text
