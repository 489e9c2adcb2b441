"""Drafts by the target's first layers, against restatements: what is drafted, chosen, learned."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.checkpoints.load import first_layers
from lookahead_jax.decoding.constraints import everything
from lookahead_jax.decoding.device_drafter import Target
from lookahead_jax.decoding.drafted import Drafting
from lookahead_jax.decoding.grammar import GrammarRow
from lookahead_jax.drafters.early_exit import Agreement, EarlyExit, choose
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.model.params import unstack
from tests import reference, tiny
from tests.drafted import BATCHES, NEW, PROMPTS, decision, draft_model, opened, undrafted

EXITS = (1, 2)  # of the three layers


def said(layers, text):
    """What a model of the first layers says after every token of a text."""
    model = first_layers(draft_model().model, layers)
    _, hidden = reference.run(model.params, model.config, text)
    return (hidden @ np.asarray(model.params["embed"], np.float64).T).argmax(-1).tolist()


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


def test_agreement_is_that_of_the_first_layers_with_the_emitted_tokens():
    """After drafted and plain steps; a row's earlier steps fade at its own steps only."""
    model, rows = tiny.config(), BATCHES[8]
    state, tokens = opened("full", rows)
    drafting = Drafting(EarlyExit(), 8, config=model, batch=len(rows), room=64 + NEW)
    state = drafting.begin(state, [PROMPTS[r] for r in rows], tokens)
    counts = [np.array(state.count)]
    while not np.asarray(state.done).all():
        state = drafting.advance(tiny.params(model), state, 1)
        counts.append(np.array(state.count))
    for i, row in enumerate(rows):
        count = counts[-1][i]
        emitted = np.asarray(state.tokens[i, :count]).tolist()
        text = PROMPTS[row] + emitted
        same = [
            [a == b for a, b in zip(said(layers, text)[-count - 1 : -1], emitted, strict=True)]
            for layers in EXITS
        ]
        agreed, read = np.zeros(2), 0.0
        for before, after in itertools.pairwise(counts):
            if after[i] > before[i]:
                agreed = 0.95 * agreed + [sum(s[before[i] : after[i]]) for s in same]
                read = 0.95 * read + after[i] - before[i]
        np.testing.assert_allclose(state.draft.agreed[i], agreed, rtol=1e-5)
        np.testing.assert_allclose(state.draft.read[i], read, rtol=1e-5)


class Anything(GrammarRow):
    """A grammar that allows everything."""

    def __init__(self):
        pass

    def observe(self, tokens):
        pass

    def masks(self, tokens, parents):
        return everything(1, len(tokens), vocab_size=97)[0], np.ones(len(tokens), bool)


def test_drafts_are_proposed_before_a_step_that_follows_a_grammar():
    model, (row,) = tiny.config(), BATCHES[1]
    state, tokens = opened("full", [row])
    drafting = Drafting(EarlyExit(), 8, config=model, batch=1, room=64 + NEW)
    state = drafting.begin(state, [PROMPTS[row]], tokens)
    drafting.constrain(0, Anything())
    full = jnp.ones_like(state.draft.agreed)
    while not np.asarray(state.done).all():
        draft = dataclasses.replace(state.draft, agreed=full, read=full[:, 0])
        state = drafting.advance(tiny.params(model), dataclasses.replace(state, draft=draft), 1)
    emitted = np.asarray(state.tokens[0, : int(state.count[0])]).tolist()
    tiny.same_tokens(emitted, undrafted("full")[0][row], partial(decision, "full", row))


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
