"""Requests that name their own policy, and whether they are drafted for."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import pytest

from lookahead_jax.checkpoints.load import load
from lookahead_jax.engine.engine import Engine
from lookahead_jax.engine.requests import Request, RequestError
from lookahead_jax.generation.generate import generate
from lookahead_jax.policies.full import Full
from lookahead_jax.policies.knorm import KNorm
from lookahead_jax.policies.snapkv import SnapKV
from tests import tiny
from tests.compilations import compilations
from tests.drafted import Shared
from tests.serving import chat_model, running

CHECKPOINT = Path(__file__).parent / "fixtures" / "models" / "llama3"
BUDGET, NEW = 12, 12
PROMPTS = tiny.prompts((30, 25, 29, 20), vocab=320)
OWN, OTHERS = SnapKV(window=4), {"knorm": KNorm(), "full": Full(), "snapkv": SnapKV(window=4)}
SIZES = dict(policy=OWN, budget=BUDGET, rows=4, max_new_tokens=NEW, max_prompt_tokens=32)


@pytest.fixture(scope="module")
def model():
    return load(CHECKPOINT, dtype=jnp.float32)


def test_each_prompt_is_cut_by_the_policy_that_its_request_names(model):
    names = [None, "knorm", "full", "snapkv"]
    expected = [
        generate(
            model, [PROMPTS[0]], policy=OTHERS.get(name, OWN), budget=BUDGET, max_new_tokens=NEW,
            eos_ids=(),
        ).tokens[0]
        for name in names
    ]  # fmt: skip
    engine = Engine(model, **SIZES, policies=OTHERS, eos_ids=(), prompt_store_bytes=2**20)
    engine.warm_up([32])
    before = len(compilations)
    requests = [Request(prompt=PROMPTS[0], max_new_tokens=NEW, policy=name) for name in names]
    results = engine.run(requests)
    assert [result.tokens for result in results] == expected
    assert len({tuple(result.tokens) for result in results}) == 3
    assert [result.kept_entries for result in results] == [BUDGET, BUDGET, 30, BUDGET]
    # Only the last has what is stored: under the policy of the first.
    assert [result.reused_tokens for result in results] == [0, 0, 0, 30]
    # Three that wait are one reading if they name one policy, and none waits for another's.
    fresh = [Request(prompt=p, max_new_tokens=NEW, policy="full") for p in PROMPTS[1:]]
    mixed = [fresh[0], dataclasses.replace(fresh[1], policy=None), fresh[2]]
    for group in (fresh, mixed):
        engine._store.clear()
        assert [r.tokens for r in engine.run(group)] == [engine.run([r])[0].tokens for r in group]
    assert len(compilations) == before
    with pytest.raises(RequestError, match="no policy 'h2o' here: the engine's are knorm, full"):
        engine.submit(Request(prompt=[1], max_new_tokens=1, policy="h2o"))


def test_one_policy_evicts_while_decoding(model):
    with pytest.raises(ValueError, match="several policies and evict_every exclude each other"):
        Engine(model, **SIZES, policies=OTHERS, evict_every=4)
    Engine(model, **SIZES, policies={"mine": OWN}, evict_every=4)


@pytest.mark.parametrize("drafter", ["trie", "prompt_lookup"])
def test_a_request_may_do_without_drafts(model, drafter, monkeypatch):
    engine = Engine(model, **SIZES, eos_ids=(), drafter=drafter, draft_nodes=Shared(8))
    prompt = [7, 8, 9] * 8
    requests = [Request(prompt=prompt, max_new_tokens=NEW, draft=d) for d in (True, False, True)]
    engine.run(requests[:1])  # the trie learns the answer
    drafted, plain, again = engine.run(requests)
    assert drafted.tokens == plain.tokens == again.tokens
    assert plain.steps == NEW - 1
    assert max(drafted.steps, again.steps) < NEW - 1
    # Steps have as many nodes as drafts need: one where nobody takes any.
    nodes, run = [], engine._drafting._run

    def noted(params, state, count, *rest, **options):
        nodes.append(count)
        return run(params, state, count, *rest, **options)

    monkeypatch.setattr(engine._drafting, "_run", noted)
    assert engine.run(requests[1:2])[0].tokens == plain.tokens
    assert set(nodes) == {1}
    engine.run(requests[:2])
    assert 8 in nodes


def test_the_server_takes_what_it_was_started_for(tmp_path):
    model = chat_model(tmp_path, "{{ messages[0].content }}")
    sizes = dict(SIZES, max_prompt_tokens=16, rows=1)
    engine = Engine(model, **sizes, policies=OTHERS, drafter="trie", draft_nodes=8)
    body = {"model": "tiny", "prompt": "one two one two", "max_tokens": 4}
    with running(model, engine, drafter="trie") as server:
        for choice in ({"policy": "full"}, {"drafter": "none"}, {"drafter": "trie"}):
            assert server.send("POST", "/v1/completions", body | choice)[0] == 200
        messages = {"policy": "knorm, full, snapkv", "drafter": 'give "trie" or "none"'}
        for field, message in messages.items():
            wrong = body | {field: "h2o"}
            status, answer = server.send("POST", "/v1/completions", wrong)
            assert status == 400
            assert answer["error"]["param"] == field
            assert message in answer["error"]["message"]
        _, entry = server.send("GET", "/v1/models/tiny")
        assert entry["policies"] == ["knorm", "full", "snapkv"]
        assert entry["drafters"] == ["none", "trie"]
