"""A prompt that begins as an earlier one is read from there on, with the same result."""

import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.checkpoints.load import Model, load
from lookahead_jax.engine.engine import Engine
from lookahead_jax.engine.prefix_store import PrefixStore
from lookahead_jax.engine.requests import Request
from lookahead_jax.generation.generate import generate
from lookahead_jax.policies.h2o import H2O
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.prefilling.layer_pass import CHUNK
from lookahead_jax.prefilling.pieces import ChunkEntries
from tests import tiny
from tests.compilations import compilations

BUDGET, NEW = 24, 6
POLICY = SnapKV(window=8, pool="avg", kernel=3)
PREFIX, FIRST, SECOND = tiny.prompts((2 * CHUNK, 150, 60))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefix") / "model"
    tiny.model_folder(folder, max_position_embeddings=2048)
    return load(folder, dtype=jnp.float32)


def make_engine(model: Model, policy=POLICY, **options):
    return Engine(
        model, policy=policy, budget=BUDGET, rows=2, max_new_tokens=NEW, max_prompt_tokens=1500,
        eos_ids=(), prefix_store_bytes=10**8, **options,
    )  # fmt: skip


def asked(prompt, **options):
    return Request(prompt=prompt, max_new_tokens=NEW, **options)


def alone(model, prompt, policy=POLICY):
    return generate(
        model, [prompt], policy=policy, budget=BUDGET, max_new_tokens=NEW, eos_ids=()
    ).tokens[0]


def test_later_prompts_take_over_the_first_chunks_without_compiling(model):
    engine = make_engine(model)
    engine.warm_up([1100, 1300])
    assert engine.prefix_store.bytes == 0
    before = engine.prefix_store
    prompts = [PREFIX + FIRST, PREFIX + SECOND, PREFIX[:CHUNK] + SECOND + FIRST + PREFIX[:CHUNK]]
    compiled = len(compilations)
    results = [engine.run([asked(prompt)])[0] for prompt in prompts]
    assert len(compilations) == compiled
    assert [r.reused_tokens for r in results] == [0, 2 * CHUNK, CHUNK]
    for prompt, result in zip(prompts, results, strict=True):
        assert result.tokens == alone(model, prompt)
    use = engine.prefix_store
    assert (use.hits - before.hits, use.misses - before.misses) == (3, 2 + 1)
    # Two chunks, and the second of the last prompt.
    config = model.config
    chunk = 2 * config.num_layers * config.num_kv_heads * config.head_dim * CHUNK * 4
    assert use.bytes == 3 * chunk


def test_the_tokens_that_observe_are_read(model):
    """The window of a prompt that ends with its second chunk lies in that chunk."""
    engine = make_engine(model)
    for prompt, reused in ((PREFIX + FIRST, 0), (PREFIX, CHUNK), (PREFIX + FIRST[:4], CHUNK)):
        (result,) = engine.run([asked(prompt)])
        assert result.reused_tokens == reused
        assert result.tokens == alone(model, prompt)


def test_tenants_and_statistics_share_nothing(model):
    engine = make_engine(model, prompt_store_bytes=10**8)
    for tenant, reused in (("a", 0), ("b", 0), ("a", len(PREFIX + FIRST))):
        (result,) = engine.run([asked(PREFIX + FIRST, tenant=tenant)])
        assert result.reused_tokens == reused
    (result,) = engine.run([asked(PREFIX + SECOND, tenant="c")])
    assert result.reused_tokens == 0
    summing = make_engine(model, policy=H2O(window=8))
    for prompt in (PREFIX + FIRST, PREFIX + SECOND):
        (result,) = summing.run([asked(prompt)])
        assert result.reused_tokens == 0
        assert result.tokens == alone(model, prompt, H2O(window=8))
    assert summing.prefix_store.bytes == 0


def entries(value):
    """Of 64 bytes."""
    return ChunkEntries(*(jnp.full((1, 1, 1, 8, 1), value, jnp.float32) for _ in "kv"))


def values(found):
    return [float(each.k.ravel()[0]) for each in found]


def test_the_least_recently_used_chunks_make_room():
    store = PrefixStore(3 * 64)
    store.put("r", [b"a", b"b"], [entries(1), entries(2)])
    store.put("r", [b"a", b"c"], [entries(3)])
    assert values(store.find("r", [b"a", b"b", b"x"])) == [1, 2]
    assert store.find("other", [b"a"]) == []
    store.put("r", [b"a", b"d"], [entries(4)])  # b was used after c
    assert values(store.find("r", [b"a", b"c"])) == [1]
    assert values(store.find("r", [b"a", b"b"])) == [1, 2]
    store.put("r", [b"a", b"b", b"e", b"f"], [entries(5), entries(6)])  # the bound holds three
    assert values(store.find("r", [b"a", b"b", b"e", b"f"])) == [1, 2, 5]
    assert store.use.bytes == 3 * 64
    store.put("r", [b"gone", b"g"], [entries(7)])  # what it follows is not stored
    assert store.find("r", [b"gone", b"g"]) == []
    store.clear()
    assert store.use.bytes == 0
    assert store.find("r", [b"a"]) == []
    with pytest.raises(ValueError, match="cannot have -1 bytes"):
        PrefixStore(-1)


def test_a_store_agrees_with_a_plain_dictionary():
    """Random use: what is found are chunks that were put there, and the bytes are bounded."""
    rng, store, put = np.random.default_rng(0), PrefixStore(5 * 64), {}
    for step in range(300):
        path = [bytes([token]) for token in rng.integers(0, 3, rng.integers(1, 5))]
        found = values(store.find("r", path))
        for depth, value in enumerate(found, 1):
            assert put[tuple(path[:depth])] == value
        fresh = [float(step * 10 + i) for i in range(len(found), len(path))]
        store.put("r", path, [entries(value) for value in fresh])
        for depth in range(len(found), len(path)):
            put[tuple(path[: depth + 1])] = fresh[depth - len(found)]
        assert store.use.bytes <= 5 * 64
        assert len(values(store.find("r", path))) == min(len(path), 5)
