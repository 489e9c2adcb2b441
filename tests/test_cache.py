"""The cache as a data structure: commit, fork, files."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lookahead_jax.checkpoints.cache_files import load_cache, save_cache
from lookahead_jax.model.cache import Entries, KVCache, commit, empty_cache
from lookahead_jax.model.context import stored_layer
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.prefilling.prefill import extend
from lookahead_jax.prompts.read import read_prompt
from tests import tiny
from tests.test_prefill import assert_close, last_logits, plain_logits

L, B, K, S, H, P = 2, 3, 2, 128, 4, 5


def filled(length: np.ndarray) -> KVCache:
    """A cache whose heads hold different numbers of random entries."""
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, L, B, K, S, H)).astype(np.float32)
    occupied = np.arange(S) < length[..., None]
    pos = np.where(occupied, np.arange(S), -1).astype(np.int32)
    k, v = (np.where(occupied[..., None], a, 0) for a in (k, v))
    return KVCache(
        k=jnp.asarray(k), v=jnp.asarray(v), pos=jnp.asarray(pos),
        length=jnp.asarray(length, jnp.int32), next_pos=jnp.full(B, S, jnp.int32),
        rope_span=jnp.full(B, 2 * S, jnp.int32),
    )  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_commit_writes_accepted_rows_and_nothing_else(data):
    numbers = st.integers(0, S - 1)
    length = np.array(data.draw(st.lists(numbers, min_size=L * B * K, max_size=L * B * K)))
    length = length.reshape(L, B, K)
    count = np.array(data.draw(st.lists(st.integers(0, P), min_size=B, max_size=B)))
    path = np.array([data.draw(st.permutations(range(P))) for _ in range(B)])
    rng = np.random.default_rng(1)
    k, v = rng.normal(size=(2, L, B, K, P, H)).astype(np.float32)
    positions = rng.integers(S, 2 * S, (B, P)).astype(np.int32)
    before = filled(length)
    after = commit(
        before,
        Entries(
            jnp.asarray(k), jnp.asarray(v), jnp.asarray(positions),
            jnp.asarray(path, jnp.int32), jnp.asarray(count, jnp.int32),
        ),
    )  # fmt: skip

    expected = {name: np.array(getattr(before, name)) for name in ("k", "v", "pos")}
    for at in np.ndindex(L, B, K):
        row = at[1]
        for step in range(count[row]):
            slot = length[at] + step
            if slot < S:  # rows beyond the last slot are dropped, never clamped onto it
                expected["k"][at][slot] = k[at][path[row, step]]
                expected["v"][at][slot] = v[at][path[row, step]]
                expected["pos"][at][slot] = positions[row, path[row, step]]
    for name, value in expected.items():
        np.testing.assert_array_equal(getattr(after, name), value)
    np.testing.assert_array_equal(after.length, length + count[None, :, None])
    np.testing.assert_array_equal(after.next_pos, S + count)


def test_empty_cache_rounds_its_slots_and_counts_its_bytes():
    model = tiny.config()
    cache = empty_cache(model, 2, 130, jnp.bfloat16, jnp.zeros(2, jnp.int32))
    assert cache.slots == 256
    entries = model.num_layers * 2 * model.num_kv_heads * 256
    assert cache.bytes == entries * (2 * model.head_dim * 2 + 4)


def test_an_empty_cache_can_be_extended():
    model = tiny.config()
    params, tokens = tiny.params(model), tiny.batch((40, 23), model)
    cache = empty_cache(model, 2, 64, jnp.float32, jnp.full(2, 64, jnp.int32))
    cache, result = extend(params, tokens, cache, config=model, chunk=16)
    np.testing.assert_array_equal(cache.next_pos, [40, 23])
    assert_close(result, last_logits(plain_logits(params, tokens, model), tokens))


def test_fork_repeats_rows_in_place():
    cache = filled(np.full((L, B, K), 7)).replace(next_pos=jnp.arange(B, dtype=jnp.int32))
    forked = cache.fork(2)
    np.testing.assert_array_equal(forked.next_pos, [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(forked.k[:, 1], cache.k[:, 0])
    np.testing.assert_array_equal(forked.k[:, 2], cache.k[:, 1])
    with pytest.raises(ValueError, match="copies must be at least 1"):
        cache.fork(0)


@pytest.mark.parametrize(
    ("overrides", "cache_dtype"),
    [({}, None), ({}, "int8"), (tiny.MISTRAL, None)],
    ids=["llama", "int8", "window"],
)
def test_branches_read_their_prompt_in_place(overrides, cache_dtype):
    """As a fork does, which copies it; the cut prompt has heads that keep different entries."""
    model = tiny.config(**overrides)
    params, tokens = tiny.params(model), tiny.batch((40, 23), model)
    read = read_prompt(
        params, tokens, config=model, policy=SnapKV(window=8), budget=16, new_tokens=40,
        cache_dtype=cache_dtype,
    )  # fmt: skip
    more = tiny.batch((9, 3, 6, 7, 1, 5), model, seed=1)
    forked = read.cache.fork(3)
    spare = read.cache.slots - int(read.cache.length.max())
    dead = read.cache.replace(
        k=read.cache.k.at[..., -spare:, :].set(jnp.nan) if cache_dtype is None else read.cache.k
    )
    branched = dead.branch(3, slots=20)
    assert branched.slots == S
    assert branched.bytes == dead.bytes + 6 * dead.bytes // 2 // dead.slots * S
    np.testing.assert_array_equal(branched.next_pos, forked.next_pos)
    copied, expected = extend(params, more, forked, config=model)
    shared, result = extend(params, more, branched, config=model)
    # float32: two sums of keys that are joined by their log-sum-exp, instead of one
    assert_close(result, np.asarray(expected))
    np.testing.assert_array_equal(shared.next_pos, copied.next_pos)
    again = shared.fork(1)
    assert again.shared is shared.shared


def test_a_branch_is_neither_cut_nor_saved_nor_branched(tmp_path):
    cache = filled(np.full((L, B, K), 7))
    branched = cache.branch(2, slots=1)
    with pytest.raises(ValueError, match="branches from another one: fork it"):
        branched.branch(2, slots=1)
    with pytest.raises(ValueError, match="copies must be at least 1"):
        cache.branch(0, slots=1)
    with pytest.raises(ValueError, match="save that one"):
        save_cache(tmp_path / "cache", branched, fingerprint="model-a")
    with pytest.raises(ValueError, match="cut before branching"):
        stored_layer(branched, jnp.int32(0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_cache_survives_a_file(tmp_path, dtype):
    cache = filled(np.arange(L * B * K).reshape(L, B, K))
    cache = cache.replace(k=cache.k.astype(dtype), v=cache.v.astype(dtype))
    path = tmp_path / "document.safetensors"
    save_cache(path, cache, fingerprint="model-a")
    loaded = load_cache(path, fingerprint="model-a")
    for name in ("k", "v", "pos", "length", "next_pos", "rope_span"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(cache, name))
    assert loaded.k.dtype == dtype
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def saved(path):
    """A cache that has been saved for "model-a"."""
    cache = filled(np.full((L, B, K), 7))
    save_cache(path, cache, fingerprint="model-a")
    return cache


def test_a_cache_that_lost_entries_or_is_gone_is_not_saved(tmp_path):
    path = tmp_path / "cache"
    cache = filled(np.full((L, B, K), 7))
    lost = cache.replace(length=cache.length.at[0, 1, 0].set(cache.slots + 1))
    with pytest.raises(ValueError, match="row 1 has lost entries"):
        save_cache(path, lost, fingerprint="model-a")
    cache.k.delete()
    with pytest.raises(ValueError, match=r"save_cache: .* was donated"):
        save_cache(path, cache, fingerprint="model-a")
    assert not path.exists()


def old_file(path, arrays):
    """A file of version 1, which had no checksum."""
    save_file(arrays, path, {"format": "lookahead_jax.kv_cache.1", "model": "model-a"})


def test_a_cache_of_another_model_is_refused(tmp_path):
    path = tmp_path / "cache"
    saved(path)
    with pytest.raises(ValueError, match="made with another model"):
        load_cache(path, fingerprint="model-b")
    with pytest.raises(ValueError, match="give fingerprint= or params="):
        load_cache(path)
    model = tiny.config()
    params = tiny.params(model)
    own = empty_cache(model, 1, 128, jnp.float32, jnp.zeros(1, jnp.int32))
    save_cache(path, own, params=params)
    loaded = load_cache(path, params=params, config=model, fingerprint=fingerprint(params))
    np.testing.assert_array_equal(loaded.pos, own.pos)
    with pytest.raises(ValueError, match="is not that of params"):
        load_cache(path, params=params, fingerprint="model-b")
    with pytest.raises(ValueError, match="3 layers, 2 KV heads of 8, the model has 3 layers, 4"):
        load_cache(path, params=params, config=tiny.config(num_key_value_heads=4))
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    with pytest.raises(ValueError, match="holds float32, the model bfloat16; load the model with"):
        load_cache(path, params=rounded)


def test_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "cache"
    saved(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    places = [*rng.integers(0, 8 * header, 100), *rng.integers(8 * header, 8 * len(whole), 200)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(path)):
            load_cache(path, fingerprint="model-a")
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_cache(path, fingerprint="model-a")


def test_files_without_a_checksum_load_with_a_warning(tmp_path):
    path = tmp_path / "cache"
    cache = saved(path)
    old_file(path, load_file(path))
    with pytest.warns(UserWarning, match="has no checksum: damage goes unnoticed"):
        loaded = load_cache(path, fingerprint="model-a")
    np.testing.assert_array_equal(loaded.k, cache.k)
    # A damaged new file does not pass for an old one.
    metadata = {"format": "lookahead_jax.kv_cache.1", "model": "model-a", "sha256": "0"}
    save_file(load_file(path), path, metadata)
    with pytest.raises(ValueError, match="not a cache"):
        load_cache(path, fingerprint="model-a")


@pytest.mark.filterwarnings("ignore:.*has no checksum:UserWarning")
def test_inconsistent_cache_files_are_refused(tmp_path):
    path = tmp_path / "cache"
    saved(path)
    arrays = load_file(path)
    for name, change in {
        "length": lambda a: a + 1,  # counts a slot that is empty
        "pos": lambda a: np.where(a == 3, 999, a),  # a position nobody has read
        "v": lambda a: a[..., :-1],
        "next_pos": lambda a: a.astype(np.float32),
    }.items():
        old_file(path, {**arrays, name: np.ascontiguousarray(change(arrays[name]))})
        with pytest.raises(ValueError, match="damaged"):
            load_cache(path, fingerprint="model-a")
    integers = {name: arrays[name].astype(np.int8) for name in ("k", "v")}
    old_file(path, arrays | integers)
    with pytest.raises(ValueError, match="do not fit together"):
        load_cache(path, fingerprint="model-a")
    # Every slot is filled, so more of them contradict no position.
    full = {**arrays, "pos": np.broadcast_to(np.arange(128, dtype=np.int32), arrays["pos"].shape)}
    full = {n: np.ascontiguousarray(a) for n, a in full.items()}
    full["next_pos"] = np.full_like(full["next_pos"], 600)
    for length, refused in ((128, False), (500, True), (-1, True)):
        full["length"] = np.full_like(full["length"], length)
        old_file(path, full)
        with pytest.raises(ValueError, match="lengths") if refused else contextlib.nullcontext():
            load_cache(path, fingerprint="model-a")
    save_file({"k": arrays["k"]}, path)
    with pytest.raises(ValueError, match="not a cache"):
        load_cache(path, fingerprint="model-a")
