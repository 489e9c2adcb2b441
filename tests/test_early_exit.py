"""Drafts by the target's first layers, against restatements: what is drafted, chosen, learned."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.decoding.device_drafter import Target, Verified
from lookahead_jax.decoding.tree import accept, layout, root_only
from lookahead_jax.drafters.early_exit import Agreement, EarlyExit, choose
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.model.params import unstack
from tests import tiny
from tests.drafted import BATCHES, PROMPTS, opened, said


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "per layer"])
def test_a_chain_is_greedy_decoding_of_the_first_layers(stacked):
    model, rows = tiny.config(), BATCHES[3]
    state, _ = opened("full", rows)
    params = tiny.params(model) if stacked else unstack(tiny.params(model))
    drafter, target = EarlyExit(), Target(params, state.cache, model)
    propose = jax.jit(drafter.propose, static_argnums=3)
    ones = jnp.ones(len(rows))
    for shares, layers, length in [
        ((1, 1), 1, 7),
        ((0, 1), 2, 7),
        ((0.6, 0), 1, 1),
        ((0, 0), 1, 0),
    ]:
        agreed = jnp.broadcast_to(jnp.asarray(shares, jnp.float32), (len(rows), 2))
        _, tree = propose(target, Agreement(agreed, ones, ones > 0), state.token, 16)
        np.testing.assert_array_equal(tree.parents, [range(-1, 15)] * len(rows))
        for i, row in enumerate(rows):
            chain, begin = np.asarray(tree.tokens[i]).tolist(), len(PROMPTS[row])
            assert chain[0] == state.token[i]
            assert chain[length + 1 :] == [-1] * (15 - length)
            # Each token is what the layers say after the text up to it.
            assert chain[1 : length + 1] == said(layers, PROMPTS[row] + chain[:length])[begin:]


def test_exit_and_length_have_the_most_tokens_per_layer():
    rng, exits, whole, most = np.random.default_rng(0), (7, 15, 22), 30, 7
    chosen = jax.jit(partial(choose, exits=exits, most=most, whole=whole))
    found = set()
    for _ in range(60):
        read = rng.integers(0, 4, 5) * rng.uniform(1, 20)
        agreed = read[:, None] * rng.choice([0.0, 0.3, 0.6, 0.9, 1.0], (5, 3))
        running = rng.random(5) < 0.7
        which, length = chosen(
            Agreement(
                jnp.asarray(agreed, jnp.float32), jnp.asarray(read, jnp.float32),
                jnp.asarray(running),
            )
        )  # fmt: skip
        value = np.zeros((3, most + 1))
        for i, d in np.ndindex(*value.shape):
            for row in np.flatnonzero(running):
                a = agreed[row, i] / read[row] if read[row] else 0.0
                tokens = d + 1 if a == 1 else (1 - a ** (d + 1)) / (1 - a)
                value[i, d] += tokens / (d * exits[i] + whole)
        assert value[which, length] == pytest.approx(value.max(), rel=1e-5)
        found.add((int(which), int(length)))
    assert {0, most} < {length for _, length in found}
    assert {which for which, _ in found} == {0, 1, 2}


def test_agreement_is_a_moving_average_over_a_rows_own_steps():
    """Of two rows, the second takes no part in the step. Every eighth plain step counts."""
    model, drafter = tiny.config(), EarlyExit(memory=0.5)
    cache = opened("full", BATCHES[3])[0].cache
    tree = root_only(jnp.asarray([5, 6], jnp.int32))
    laid = layout(tree, vocab_size=97, most=jnp.asarray([1, 0]), ends=jnp.full((1, 1), -1))
    accepted = accept(tree, laid, jnp.asarray([[8], [9]], jnp.int32))
    # The first exit says 8, the second 7: a token's own embedding is the likeliest after it.
    exits = tuple(tiny.params(model)["embed"][jnp.asarray([[t], [t]])] for t in (8, 7))
    before = Agreement(jnp.full((2, 2), 4.0), jnp.full(2, 6.0), jnp.ones(2, bool))
    verified = Verified(tree, laid, jnp.zeros((2, 1, 97)), accepted, exits[0], exits)
    update = jax.jit(drafter.update)
    for position in (40, 41):
        target = Target(
            tiny.params(model), cache.replace(next_pos=jnp.asarray([position, 43])), model
        )
        state = update(target, before, verified)
        due = position == 40
        np.testing.assert_array_equal(state.agreed, [[3.0, 2.0] if due else [4.0, 4.0], [4.0, 4.0]])
        np.testing.assert_array_equal(state.read, [4.0 if due else 6.0, 6.0])
        np.testing.assert_array_equal(state.running, [True, False])


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"layers=\(2, 3\) must be .* from 1 to 2 .* of 3 layers"):
        make_drafter("early_exit", layers=(2, 3)).init(1, 8, tiny.config())
    with pytest.raises(ValueError, match="two layers or more"):
        EarlyExit().init(1, 8, tiny.config(num_hidden_layers=1))
    with pytest.raises(ValueError, match="early_exit cannot be combined"):
        make_drafter("early_exit+recycling")
    for wrong in ({"depth": 0}, {"memory": 1.5}, {"layers": ()}):
        with pytest.raises(ValueError, match=f"drafter early_exit: {next(iter(wrong))}"):
            make_drafter("early_exit", **wrong)
