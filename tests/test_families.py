"""Policies, drafters and training on each model family that computes something of its own.

tests/test_parity.py compares the plain forward with transformers. Here policies and the training
loss are compared with the float64 restatement, and drafted tokens with undrafted ones. One model
with the arithmetic of all families runs in the fast tests.
"""

import dataclasses
import functools
import itertools
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lookahead_jax.checkpoints.load import GenerationDefaults, Model
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.generation.generate import generate
from lookahead_jax.model.layers import add_residual, rms_norm
from lookahead_jax.policies.registry import POLICIES, make_policy
from lookahead_jax.train.batches import Batch
from lookahead_jax.train.step import init_state, train_step
from tests import reference, tiny
from tests.test_policies import CASES, check_case, lookahead_modules, weights

OWN = {
    "olmo2": tiny.config(model_type="olmo2", num_hidden_layers=2),
    "smollm3": tiny.config(
        model_type="smollm3", num_hidden_layers=2, no_rope_layer_interval=2,
        use_sliding_window=True, sliding_window=44,
    ),
    "granite": tiny.config(
        model_type="granite", num_hidden_layers=2, embedding_multiplier=3.0,
        residual_multiplier=0.6, attention_multiplier=0.5, logits_scaling=1.5,
    ),
    "glm4": tiny.config(model_type="glm4", num_hidden_layers=2, head_dim=8),
}  # fmt: skip
# All of them in one model, as far as they can be combined.
MIXED = dataclasses.replace(
    OWN["olmo2"],
    ropes=tuple(dataclasses.replace(rope, dim=4) for rope in OWN["smollm3"].ropes),
    rope_interleaved=True,
    qkv_bias=True,
    layer_rope=OWN["smollm3"].layer_rope,
    embed_scale=3.0,
    residual_scale=0.6,
    attn_scale=0.5,
    logit_divisor=1.5,
)
FAMILIES = {"mixed": MIXED} | OWN
# Policies with small sizes, so that they cut prompts of 40 tokens to BUDGET entries.
SIZES = {
    "laq": {"draft_tokens": 4},
    "laq++": {"draft_tokens": 4},
    "oracle": {"response_tokens": 4},
    "kvzip": {"chunk": 16},
    "lagkv": {"lag_size": 4},
}
DRAFTERS = ("trie", "suffix", "trie+suffix", "prompt_lookup", "recycling", "draft_model")
BUDGET, NEW = 24, 12


@functools.cache
def model_of(family):
    config = FAMILIES[family]
    generation = GenerationDefaults(
        eos_ids=(), bos_id=None, pad_id=None, temperature=None, top_k=None, top_p=None
    )
    return Model(
        params=weights(config), config=config, tokenizer=None, generation=generation, path=Path()
    )


def test_bfloat16_is_rounded_where_transformers_rounds():
    """Granite's products with Python numbers and OLMo 2's norms are rounded once, at their end."""
    x, out = jax.random.normal(jax.random.key(0), (2, 1, 64, 32), jnp.float32).astype(jnp.bfloat16)
    weight = jax.random.normal(jax.random.key(1), (32,), jnp.float32).astype(jnp.bfloat16)
    granite = dataclasses.replace(OWN["granite"], residual_scale=0.22)  # has no exact bfloat16
    scaled = (np.float32(0.22) * np.asarray(out, np.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(add_residual(x, out, config=granite), x + jnp.asarray(scaled))
    x32, w32 = np.asarray(x, np.float32), np.asarray(weight, np.float32)
    normed = x32 / np.sqrt((x32**2).mean(-1, keepdims=True) + np.float32(1e-5))
    once = (normed * w32).astype(jnp.bfloat16)
    twice = normed.astype(jnp.bfloat16).astype(np.float32) * w32
    assert (once != twice.astype(jnp.bfloat16)).mean() > 0.05  # the orders do differ
    for family, expected in ("olmo2", once), ("granite", twice.astype(jnp.bfloat16)):
        got = rms_norm(x, weight, config=OWN[family])
        # A float32 value next to a border may fall on its other side.
        assert (np.asarray(got) != expected).mean() < 0.002


def slow_or_full(place):
    """Of a table families x policies the slow tests take each policy once, and --full takes all."""
    return pytest.mark.full if place % len(OWN) else pytest.mark.slow


# The cases of tests/test_policies.py with default settings: one per policy.
SCORED = [case for case in CASES if case in POLICIES]
FAST_SCORES = ("expected_attention", "keydiff", "lookaheadkv")


@pytest.mark.parametrize(
    ("family", "case"),
    [pytest.param("mixed", case) for case in FAST_SCORES]
    + [
        pytest.param(family, case, marks=slow_or_full(i + j))
        for (i, family), (j, case) in itertools.product(enumerate(OWN), enumerate(SCORED))
    ],
)
def test_policies_score_as_restated(family, case):
    check_case(case, FAMILIES[family])


class Row(NamedTuple):
    family: str
    policy: str
    drafter: str


READY = [name for name in POLICIES if name not in tiny.NEEDS_SETTINGS]
# Every policy on every family; the drafters alternate, so that each family meets each of them.
ROWS = [
    Row(family, policy, DRAFTERS[(i + j) % len(DRAFTERS)])
    for i, family in enumerate(OWN)
    for j, policy in enumerate(READY)
]
FAST_ROWS = [
    Row("mixed", "laq", "recycling"),
    Row("mixed", "expected_attention", "prompt_lookup"),
]


def test_rows_cover_families_with_policies_and_drafters():
    assert {row[:2] for row in ROWS} == {(f, p) for f in OWN for p in READY}
    assert {(row[0], row[2]) for row in ROWS} == {(f, d) for f in OWN for d in DRAFTERS}


def drafter_of(name, model):
    if name == "draft_model":  # the model itself: its drafts are accepted unless it was cut
        return make_drafter(name, model=model)
    return make_drafter(name)


@pytest.mark.filterwarnings("ignore:.*window .* exceeds budget")
@pytest.mark.parametrize(
    "row",
    FAST_ROWS
    + [
        pytest.param(row, marks=slow_or_full(i // len(READY) + i % len(READY)))
        for i, row in enumerate(ROWS)
    ],
    ids="-".join,
)
def test_drafting_changes_no_token(row):
    model = model_of(row.family)
    patterns = tiny.prompts((8, 5))
    prompts = [pattern * (40 // len(pattern)) for pattern in patterns]  # repeats to draft from
    run = partial(
        generate, model, prompts, policy=make_policy(row.policy, **SIZES.get(row.policy, {})),
        budget=BUDGET, max_new_tokens=NEW, lookahead=lookahead_modules(model.config),
        drafts=[pattern[:4] for pattern in patterns] if row.policy == "speckv" else None,
        eos_ids=(),
    )  # fmt: skip
    plain = run()
    assert [len(tokens) for tokens in plain.tokens] == [NEW, NEW]
    kept = (plain.kept >= 0).sum(-1)  # some policies give heads and layers unequal shares
    assert kept.mean() == (40 if row.policy == "full" else BUDGET)
    drafted = run(drafter=drafter_of(row.drafter, model), draft_nodes=8)
    assert drafted.tokens == plain.tokens


def restated_loss(model, modules, prompt, response):
    """Mean over layers and heads of KL(response's attention || lookahead rows' attention)."""
    params, length = weights(model), len(prompt)
    scale = modules.config.alpha / modules.config.rank
    told, _ = reference.run(params, model, [*prompt, *response])
    seen, _ = reference.run(params, model, prompt, modules.embeddings, modules.lora, scale)
    losses = []
    for truth, guess in zip(told, seen, strict=True):
        t, p = (layer.probs[:, length:, :length].mean(1) for layer in (truth, guess))
        t, p = (scores / scores.sum(-1, keepdims=True) for scores in (t, p))
        logs = np.log(np.maximum(t, 1e-20)) - np.log(np.maximum(p, 1e-20))
        losses.append((t * logs).sum(-1).mean())
    return np.mean(losses)


@pytest.mark.parametrize(
    "family", ["mixed", *(pytest.param(f, marks=pytest.mark.slow) for f in OWN)]
)
def test_a_training_step(family):
    """The loss is the restated one, and a small step lowers it by rate * |gradient|^2."""
    model, rate = FAMILIES[family], 1e-4
    modules, optimizer = lookahead_modules(model), optax.sgd(rate)
    prompts, responses = tiny.batch((30, 22), model), tiny.batch((6, 4), model, seed=5)
    step = jax.jit(partial(train_step, config=model, optimizer=optimizer))
    batch = Batch(prompts[None], responses[None])
    state, before = step(weights(model), init_state(modules, optimizer), batch)
    _, after = step(weights(model), state, batch)
    expected = [
        restated_loss(model, modules, *(np.asarray(a)[np.asarray(a) >= 0] for a in rows))
        for rows in zip(prompts, responses, strict=True)
    ]
    # As in tests/test_policies.py: float32 against float64.
    assert float(before["loss"]) == pytest.approx(np.mean(expected), rel=1e-4)
    drop = float(before["loss"] - after["loss"])
    # The rest of the Taylor series is a few percent at this rate.
    assert drop == pytest.approx(rate * float(before["grad_norm"]) ** 2, rel=0.1)
