"""A cache that runs out of slots, or was donated, is refused by name; under jit a flag says so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.decoding.step import decode
from lookahead_jax.model.growth import check_fit
from lookahead_jax.model.jit import program
from lookahead_jax.policies.full import Full
from lookahead_jax.prefilling.prefill import extend
from tests import tiny
from tests.test_prefill import read

MODEL = tiny.config()
TOKENS = tiny.batch((110, 60), MODEL)
FREE = 128 - 110  # slots that row 0 has left


@functools.cache
def document():
    result = read(tiny.params(MODEL), TOKENS, MODEL, Full(), new_tokens=0)
    return jax.block_until_ready(result)


def copy():
    return document().cache.fork(1)


def question(*lengths):
    rows = np.full((2, 32), -1, np.int32)
    for row, n in zip(rows, lengths, strict=True):
        row[:n] = np.arange(n)
    return jnp.asarray(rows)


def test_free_slots_and_the_flag():
    cache = copy()
    np.testing.assert_array_equal(cache.free, [FREE, 68])
    assert not cache.overflowed.any()
    longer = cache.replace(length=cache.length.at[1, 0, 1].add(FREE + 1))
    np.testing.assert_array_equal(longer.free, [-1, 68])
    np.testing.assert_array_equal(longer.overflowed, [True, False])
    check_fit("f", cache, FREE)
    check_fit("f", cache, jnp.asarray([FREE, 68]))
    with pytest.raises(ValueError, match="f: row 1 has 68 free slots of 128 and needs 69"):
        check_fit("f", cache, jnp.asarray([FREE, 69]))


def test_extend_refuses_what_does_not_fit():
    params, cache = tiny.params(MODEL), copy()
    with pytest.raises(
        ValueError, match=f"extend: row 0 has {FREE} free slots .* needs {FREE + 1}"
    ):
        extend(params, question(FREE + 1, 3), cache, config=MODEL)
    longer, logits = extend(params, question(FREE, 30), cache, config=MODEL)  # it was not donated
    np.testing.assert_array_equal(longer.free, [0, 38])
    assert np.isfinite(logits).all()


def test_extend_under_jit_flags_what_does_not_fit():
    params = tiny.params(MODEL)
    run = jax.jit(functools.partial(extend, config=MODEL))
    longer, logits = run(params, question(FREE + 1, 30), copy())
    np.testing.assert_array_equal(longer.overflowed, [True, False])
    assert np.isnan(logits[0]).all()
    _, alone = extend(params, question(FREE, 30), copy(), config=MODEL)
    np.testing.assert_array_equal(logits[1], alone[1])


def test_decode_refuses_what_does_not_fit():
    params, result, cache = tiny.params(MODEL), document(), copy()
    with pytest.raises(
        ValueError, match=f"decode: row 0 has {FREE} free slots .* needs {FREE + 1}"
    ):
        decode(params, cache, result.logits, config=MODEL, max_new_tokens=FREE + 2)
    # The last token stays out of the cache.
    done = decode(params, cache, result.logits, config=MODEL, max_new_tokens=FREE + 1)
    np.testing.assert_array_equal(done.count, FREE + 1)
    assert not done.overflowed.any()
    assert done.finite.all()
    assert not done.cache.overflowed.any()


def test_decode_under_jit_ends_a_full_row():
    params, result = tiny.params(MODEL), document()
    new = FREE + 8
    roomy = read(params, TOKENS, MODEL, Full(), new_tokens=new)
    want = decode(params, roomy.cache, roomy.logits, config=MODEL, max_new_tokens=new)
    run = jax.jit(functools.partial(decode, config=MODEL, max_new_tokens=new))
    found = run(params, copy(), result.logits)
    np.testing.assert_array_equal(found.overflowed, [True, False])
    np.testing.assert_array_equal(found.count, [FREE + 1, new])
    np.testing.assert_array_equal(found.tokens[1], want.tokens[1])
    np.testing.assert_array_equal(found.tokens[0, : FREE + 1], want.tokens[0, : FREE + 1])
    assert (np.asarray(found.tokens[0, FREE + 1 :]) == -1).all()
    assert not found.cache.overflowed.any()
    # A row that ended by itself in time lost nothing.
    eos = int(want.tokens[0, 2])
    run = jax.jit(functools.partial(decode, config=MODEL, max_new_tokens=new, eos_ids=(eos,)))
    assert not run(params, copy(), result.logits).overflowed[0]


def test_a_cache_that_lost_entries_is_not_continued():
    params, result = tiny.params(MODEL), document()
    lost = copy()
    lost = lost.replace(length=lost.length.at[0, 0, 0].set(129))
    run = jax.jit(functools.partial(decode, config=MODEL, max_new_tokens=4, eos_ids=(0,)))
    found = run(params, lost, result.logits)
    np.testing.assert_array_equal(found.overflowed, [True, False])
    assert (np.asarray(found.tokens[0]) == -1).all()


def test_a_donated_cache_is_named():
    params, result, cache = tiny.params(MODEL), document(), copy()
    decode(params, cache, result.logits, config=MODEL, max_new_tokens=4)
    asked = question(3, 3)
    block = lk.Block(lk.embed(params, asked, config=MODEL), asked, jnp.full(2, 128, jnp.int32))
    uses = {
        "decode": lambda: lk.decode(params, cache, result.logits, config=MODEL, max_new_tokens=4),
        "extend": lambda: lk.extend(params, asked, cache, config=MODEL),
        "forward": lambda: lk.forward(params, block, cache, config=MODEL),
        "fork": lambda: cache.fork(2),
    }
    for name, use in uses.items():
        with pytest.raises(ValueError, match=rf"{name}: .* donated to an earlier call.*fork\(1\)"):
            use()


def test_a_program_names_a_donated_argument_and_passes_other_errors_on():
    double = program(donate_argnames=("x",))(lambda x: 2 * x)
    x = jnp.ones(3)
    double(x)
    with pytest.raises(ValueError, match="donated to an earlier call"):
        double(x)
    with pytest.raises(TypeError):
        double("text")
