"""Prompts cut while they are read: from any stored state on, the result is that of reading all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lookahead_jax.checkpoints.load import Model, load
from lookahead_jax.decoding.eviction import DecodeEviction
from lookahead_jax.engine.engine import Engine
from lookahead_jax.engine.requests import Request
from lookahead_jax.generation.generate import generate
from lookahead_jax.policies.base import CutByTokens
from lookahead_jax.policies.knorm import KNorm
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.prefilling.prefill import prefill
from lookahead_jax.prompts.cut_reading import CutReading, empty_state, read_on, spacing
from lookahead_jax.prompts.read import read_prompt
from tests import tiny
from tests.compilations import compilations
from tests.test_kvzap import surrogate_of

EVERY, BUDGET, NEW = 64, 24, 70  # some of the new tokens cross a cut
SMALL = tiny.config(num_hidden_layers=1, max_position_embeddings=2048)
PREFIX, FIRST, SECOND = tiny.prompts((1024, 150, 60))


STATE = 2 * 128 * (2 * 8 + 2) * 4  # bytes: k, v, positions and scores of 128 slots of two heads


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_reading_on_is_reading_whole():
    """Rows of unequal length, one of which ends with the first part; scores add up."""
    policy = make_policy("incremental:h2o", every=8, window=3)
    reading = CutReading.of(policy, config=SMALL, budget=10, slots=128, cache_dtype=None)
    tokens, weights = tiny.batch((45, 16, 29), SMALL), tiny.params(SMALL)
    empty = empty_state(weights, (tokens >= 0).sum(1, dtype=jnp.int32), reading=reading)
    whole = read_on(weights, tokens, empty, None, reading=reading)
    state = empty
    for first in (0, 16, 32, 48):
        state = read_on(weights, tokens[:, first : first + 16], state, None, reading=reading)
        assert int(state.cache.length.max()) <= 10 + 8
    assert_equal(state, whole)
    np.testing.assert_array_equal(whole.cache.next_pos, [45, 16, 29])
    np.testing.assert_array_equal(whole.cache.length[0, :, 0], [10 + 5, 10, 10 + 5])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuts") / "model"
    tiny.model_folder(folder, num_hidden_layers=1, max_position_embeddings=2048)
    return load(folder, dtype=jnp.float32)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    path = tmp_path_factory.mktemp("cuts") / "surrogate.safetensors"
    safetensors.numpy.save_file(surrogate_of(SMALL, 0), path)
    return make_policy("incremental:kvzap", every=EVERY, file=str(path), window=4)


def make_engine(model: Model, policy, **options):
    options = {"prefix_store_bytes": 10**8, "evict_every": EVERY, **options}
    return Engine(
        model, policy=policy, budget=BUDGET, rows=2, max_new_tokens=NEW, max_prompt_tokens=1500,
        eos_ids=(), prompt_store_bytes=10**8, **options,
    )  # fmt: skip


def asked(prompt, **options):
    return Request(prompt=prompt, max_new_tokens=NEW, **options)


def last_stored(engine):
    return next(reversed(engine._store._prompts.values()))


def test_prompts_that_begin_alike_share_cut_states_exactly(model, policy):
    """The longest stored beginning is taken over, without compiling; nothing else changes."""
    warm, cold = make_engine(model, policy), make_engine(model, policy, prefix_store_bytes=0)
    texts = [PREFIX + FIRST, PREFIX + SECOND, PREFIX[:600] + FIRST, PREFIX]
    results, stored, compiled = [], [], []
    for text in texts:
        results += warm.run([asked(text)])
        stored.append(last_stored(warm))
        compiled.append((read_on.compiled(), len(compilations)))
    assert compiled[1] == compiled[0]
    assert compiled[3][0] == compiled[0][0]  # of prompts of another padded length too
    assert [r.reused_tokens for r in results] == [0, 1024, 512, 1024]
    use = warm.prefix_store
    assert (use.hits, use.misses) == (2 + 1 + 2, 2)
    assert STATE < use.bytes / 2 < STATE + 1000
    for text, result, known in zip(texts, results, stored, strict=True):
        (alone,) = cold.run([asked(text)])
        assert alone.reused_tokens == 0
        assert result.tokens == alone.tokens
        assert_equal(last_stored(cold), known)
    together = warm.run([asked(SECOND + FIRST), asked(texts[1])])
    assert together[1].tokens == results[1].tokens
    whole = generate(
        model, texts[:3], policy=policy, budget=BUDGET, max_new_tokens=NEW, eos_ids=(),
        evict_every=EVERY,
    )  # fmt: skip
    assert whole.tokens == [result.tokens for result in results[:3]]


def test_the_store_is_bounded_and_pins_and_tenants_have_their_own(model, policy):
    limit = 2 * STATE - 1  # one state
    engine = make_engine(model, policy, prefix_store_bytes=limit)
    assert engine.run([asked(PREFIX + FIRST)])[0].reused_tokens == 0
    assert 0 < engine.prefix_store.bytes <= limit
    for options, reused in (({}, 512), ({"pin": [(3, 5)]}, 0), ({"tenant": "a"}, 0)):
        (result,) = engine.run([asked(PREFIX + SECOND, **options)])
        assert result.reused_tokens == reused
        assert engine.prefix_store.bytes <= limit


def test_a_head_that_gets_the_share_of_others_fits():
    """The threshold empties one of two heads; the other holds no more than its slots allow."""
    weights = tiny.params(SMALL)
    k = weights["layers"]["k"]
    weights["layers"]["k"] = k.at[:, :, k.shape[2] // 2 :].multiply(0.1)
    policy = make_policy("incremental:threshold:ada:knorm", every=28, alpha=1, least=-1.0)
    read = read_prompt(
        weights, tiny.batch((468,), SMALL), config=SMALL, policy=policy, budget=100, new_tokens=0
    )
    np.testing.assert_array_equal(read.cache.length[0, 0], [20, 100 + 20])
    assert not read.cache.overflowed.any()


def test_a_question_may_use_up_the_tokens_before_the_next_cut():
    policy = make_policy("incremental:knorm", every=200)
    eviction = DecodeEviction(policy=policy, budget=24, interval=200)
    assert eviction.room(512, 190, SMALL) == 0
    assert eviction.room(512, 190, SMALL, question=True) == 190
    assert eviction.room(512, 400, SMALL, question=True) == 200


def test_parts_are_multiples_of_the_interval():
    for every, tokens in ((1, 512), (64, 512), (100, 600), (513, 513), (2000, 2000)):
        assert spacing(make_policy("incremental:knorm", every=every).reading) == tokens


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("incremental:knorm", {}, "incremental needs every: give every="),
        ("incremental:knorm", {"every": 0}, "every must be at least 1, not 0"),
        ("incremental:knorm", {"every": 1 << 21}, "every=2097152 must be at most 1048576 tokens"),
        ("incremental", {"every": 8}, "Incremental cannot wrap SnapKV: the last tokens observe"),
        ("incremental:tova", {"every": 8}, "cannot wrap Tova: it cannot evict while decoding"),
        ("incremental:lookaheadkv", {"every": 8}, "LookaheadKV: lookahead modules are placed"),
        ("ada:incremental:knorm", {"every": 8}, "Ada cannot wrap Incremental: .* put it in front"),
    ],
)
def test_impossible_settings_are_named(name, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_policy(name, **settings)


def test_what_does_not_go_together_is_refused(model):
    policy = make_policy("incremental:knorm", every=8)
    with pytest.raises(ValueError, match="evict_every=16 is not every=8, at which prompts"):
        generate(model, [[1]], policy=policy, evict_every=16)
    with pytest.raises(ValueError, match="Incremental cuts a prompt while it is read: use read_"):
        prefill(
            model.params, jnp.ones((1, 16), jnp.int32), config=model.config, policy=policy,
            budget=8, slots=128,
        )  # fmt: skip
    assert policy.decode_cut == KNorm().decode_cut
    assert make_policy("incremental:h2o", every=8).decode_cut == CutByTokens(adds_up=True)
