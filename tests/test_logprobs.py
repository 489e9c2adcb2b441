"""Log-probabilities of emitted tokens, against float64 ones of whole texts.

tests/test_drafting.py holds them with every drafter, tests/test_server_logprobs.py in answers.
"""

import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.policies.full import Full
from tests.test_engine import CHECKPOINT, NEW, PROMPTS, make_engine

PLAIN_AND_NOT = lk.Sampling(
    temperature=0.9, top_k=9, repetition_penalty=1.2, presence_penalty=0.5, logit_bias={7: 3.0}
)
TOLERANCE = 1e-4  # of float32 logits up to 10


@pytest.fixture(scope="module")
def model():
    return lk.load(CHECKPOINT, dtype=jnp.float32)


def reference(model, prompt, tokens):
    """Float64 log-probabilities [n, V] in the place of each token, whatever the sampling."""
    text = jnp.asarray([[*prompt, *tokens]], jnp.int32)
    logits = np.asarray(lk.token_logits(model.params, text, config=model.config))[0]
    logits = logits[len(prompt) - 1 : -1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def check(model, prompt, tokens, logprobs, alternatives):
    expected = reference(model, prompt, tokens)
    places = np.arange(len(tokens))
    assert logprobs.chosen.shape == (len(tokens),)
    assert logprobs.top.shape == logprobs.top_ids.shape == (len(tokens), alternatives)
    np.testing.assert_allclose(logprobs.chosen, expected[places, tokens], rtol=0, atol=TOLERANCE)
    best = np.sort(expected, axis=-1)[:, ::-1][:, :alternatives]
    np.testing.assert_allclose(logprobs.top, best, rtol=0, atol=TOLERANCE)
    of_ids = np.take_along_axis(expected, logprobs.top_ids, axis=-1)
    np.testing.assert_allclose(of_ids, best, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("drafter", "nodes"), [("none", None), ("prompt_lookup", 8)])
def test_they_are_the_models_own_before_any_setting_of_sampling(model, drafter, nodes):
    prompts = [PROMPTS[0], PROMPTS[1] * 3]
    result = lk.generate(
        model, prompts, policy=Full(), max_new_tokens=NEW, sampling=PLAIN_AND_NOT, seeds=[3, 4],
        eos_ids=(), logprobs=4, drafter=drafter, draft_nodes=nodes,
    )  # fmt: skip
    for prompt, tokens, logprobs in zip(prompts, result.tokens, result.logprobs, strict=True):
        check(model, prompt, tokens, logprobs, 4)


def test_rows_of_an_engine_that_ask_get_them_beside_others_that_do_not(model):
    engine = make_engine(model, policy=Full())
    asked = {0: 3, 1: None, 2: 0, 3: 20, 4: None}
    ids = engine.submit_all(
        [
            lk.Request(prompt=PROMPTS[i], max_new_tokens=NEW, sampling=PLAIN_AND_NOT, logprobs=n)
            for i, n in asked.items()
        ]
    )
    fetched, fetch = [], engine._batch.logprobs
    engine._batch.logprobs = lambda row: fetched.append(engine._rows[row].id) or fetch(row)
    events = []
    while engine.alive:
        events += engine.step()
    assert set(fetched) == {ids[0], ids[2], ids[3]}
    for id, (i, n) in zip(ids, asked.items(), strict=True):
        mine = [event for event in events if event.id == id]
        result = mine[-1].result
        assert [token for event in mine for token in event.tokens] == result.tokens
        if n is None:
            assert result.logprobs is None
            assert all(event.logprobs is None for event in mine)
            continue
        check(model, PROMPTS[i], result.tokens, result.logprobs, n)
        for name in ("chosen", "top", "top_ids"):
            parts = [getattr(event.logprobs, name) for event in mine]
            np.testing.assert_array_equal(np.concatenate(parts), getattr(result.logprobs, name))


def test_who_does_not_ask_pays_no_memory_and_gets_none(model):
    result = lk.generate(model, [PROMPTS[0]], policy=Full(), max_new_tokens=2, eos_ids=())
    assert result.logprobs is None


@pytest.mark.parametrize("wrong", [-1, 21, True])
def test_numbers_of_alternatives_that_cannot_be(model, wrong):
    with pytest.raises(ValueError, match="logprobs must be"):
        lk.generate(model, [PROMPTS[0]], logprobs=wrong)
    with pytest.raises(ValueError, match="logprobs must be"):
        make_engine(model).submit(lk.Request(prompt=[1], max_new_tokens=1, logprobs=wrong))
