"""The training loss and its gradients against a plain restatement with two full passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.model.layers import linear, mlp, rms_norm
from lookahead_jax.model.rope import apply_rope, rope_tables
from lookahead_jax.modules.definition import LookaheadConfig, LookaheadModules, init_modules
from lookahead_jax.train.loss import PAPER, LossConfig
from lookahead_jax.train.objective import base_forward, lookahead_losses, parts_behind
from lookahead_jax.train.observers import divergence
from tests import tiny

CONFIG = LookaheadConfig(
    tokens=5, rank=3, alpha=8.0, targets=("q", "k", "v", "o", "gate", "up", "down"), init="normal"
)


def modules_for(model, seed=0):
    modules = init_modules(jax.random.key(seed), CONFIG, model)
    key = jax.random.key(seed + 1)
    lora = jax.tree.map(lambda a: jax.random.normal(key, a.shape, a.dtype) * 0.1, modules.lora)
    return modules.replace(embeddings=modules.embeddings * 50, lora=lora)


def attention_maps(params, x, rows_with_lora, modules: LookaheadModules, model):
    """Plain full-sequence forward: softmax probabilities of every layer, [L, N, T, T]."""
    length = x.shape[0]
    steps = jnp.arange(length, dtype=jnp.int32)
    window = model.layer_window[0]
    mask = steps[None, :] <= steps[:, None]
    if window is not None:
        mask &= steps[:, None] - steps[None, :] < window
    span = jnp.full(1, length, jnp.int32)  # default RoPE: it changes nothing
    cos, sin = rope_tables(model, steps[None], span)
    scale = CONFIG.alpha / CONFIG.rank

    def layer(x, inputs):
        p, pairs = inputs
        lora = {name: {"a": pair["a"], "b": scale * pair["b"]} for name, pair in pairs.items()}

        def both(f):
            plain, changed = f(None), f(lora)
            chosen = rows_with_lora.reshape((1, -1) + (1,) * (plain.ndim - 2))
            return jnp.where(chosen, changed, plain)

        h = rms_norm(x, p["attn_norm"], config=model)
        q, k, v = (both(lambda lo, n=n: linear(p, n, h, lora=lo)) for n in "qkv")
        q, k = (apply_rope(a, cos[0], sin[0], interleaved=False) for a in (q, k))
        groups = model.num_heads // model.num_kv_heads
        k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) * model.attn_scale
        weights = jax.nn.softmax(jnp.where(mask[None, None], scores, -jnp.inf), axis=-1)
        out = jnp.einsum("bnts,bsnh->btnh", weights, v)
        x = x + both(lambda lo: linear(p, "o", out, inputs=2, lora=lo))
        h = rms_norm(x, p["mlp_norm"], config=model)
        return x + both(lambda lo: mlp(p, [h], [lo], config=model)[0]), weights[0]

    return jax.lax.scan(layer, x[None], (params["layers"], modules.lora))[1]


def plain_losses(modules, params, prompt, response, model, losses):
    """Two full passes of the whole model, one row, gradients through everything: [V]."""
    table, t = params["embed"], len(prompt)
    prompt_x = table[jnp.asarray(prompt)]

    def attention(tail, with_lora):
        x = jnp.concatenate([prompt_x, tail])
        rows = jnp.arange(len(x)) >= t
        return attention_maps(params, x, rows & with_lora, modules, model)[:, :, t:, :t]

    def shares(attention, reduce, skip):
        reduced = reduce(attention, axis=2)[..., skip:]
        return reduced / reduced.sum(-1, keepdims=True)

    answer = jax.lax.stop_gradient(attention(table[jnp.asarray(response)], False))
    lookahead = attention(modules.embeddings, True)

    def divergence(loss):
        reduce = {"mean": jnp.mean, "max": jnp.max}[loss.response]
        target = shares(answer, reduce, loss.skip)
        predicted = shares(lookahead, jnp.mean, loss.skip)
        seen = target > 0  # a logarithm of 0 would turn the gradient of `where` into NaN
        logs = jnp.log(jnp.where(seen, target, 1.0)) - jnp.log(jnp.where(seen, predicted, 1.0))
        return jnp.where(seen, target * logs, 0.0).sum(-1).mean()

    return jnp.stack([divergence(loss) for loss in losses])


def pad(rows):
    width = max(map(len, rows))
    return jnp.asarray([r + [-1] * (width - len(r)) for r in rows], jnp.int32)


# The third row has no response.
PROMPTS, RESPONSES = tiny.prompts((37, 20, 24)), [*tiny.prompts((7, 4), seed=3), []]
LOSSES = {  # by family, and whether the base forward is computed first
    ("llama", False): [PAPER],
    ("llama", True): [LossConfig(skip=3)],
    ("mistral", False): [PAPER, LossConfig(skip=1, response="max")],
    ("mistral", True): [LossConfig(response="max")],
}


@functools.cache
def expected(family):
    """A family's model, weights and modules; for each of its losses the values and the gradient."""
    model = tiny.config(**({} if family == "llama" else tiny.MISTRAL))
    params, modules = tiny.params(model), modules_for(model)
    wanted = [*LOSSES[family, False], *LOSSES[family, True]]

    @jax.jit
    def plain(modules):
        def losses(modules):
            rows = [
                plain_losses(modules, params, prompt, response, model, wanted)
                for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
                if response
            ]
            return jnp.stack(rows, axis=1)

        values, backward = jax.vjp(losses, modules)
        one_each = jnp.eye(len(wanted))[..., None] * jnp.ones_like(values)[None]
        return values, jax.vmap(backward)(one_each)[0]

    values, gradients = jax.tree.map(np.asarray, plain(modules))
    by_loss = [jax.tree.map(lambda g, i=i: g[i], gradients) for i in range(len(wanted))]
    return model, params, modules, dict(zip(wanted, zip(values, by_loss, strict=True), strict=True))


@pytest.mark.parametrize(("family", "known"), LOSSES)
def test_losses_and_gradients_match_two_plain_passes(family, known):
    """float32 on both sides; sums in another order differ by a few 1e-6 of their size.

    `known`: after the base forward, which is computed first. A row without a response costs
    nothing.
    """
    model, params, modules, theirs = expected(family)
    rows, losses = (pad(PROMPTS), pad(RESPONSES)), LOSSES[family, known]

    @jax.jit
    def ours(variants):
        def run(variants):
            shared = dict(config=model, losses=losses)
            if not known:
                return lookahead_losses(variants, params, *rows, chunk=16, **shared)
            forward = base_forward(params, *rows, config=model, dtype=jnp.float32, chunk=16)
            assert forward.k.shape[3] == rows[0].shape[1]
            return parts_behind(variants, params, forward, **shared).importance

        values, backward = jax.vjp(run, variants)
        answered = jnp.broadcast_to(jnp.asarray([1.0, 1.0, 0.0]), values.shape)
        return values, jax.vmap(backward)(jnp.stack([answered, 1.0 - answered]))[0]

    values, gradients = ours([modules] * len(losses))
    assert not np.asarray(values[:, 2]).any()
    for loss, value, gradient in zip(losses, values, gradients, strict=True):
        expected_value, expected_gradient = theirs[loss]
        np.testing.assert_allclose(value[:2], expected_value, rtol=2e-5)
        for (path, wanted), got in zip(
            jax.tree.leaves_with_path(expected_gradient), jax.tree.leaves(gradient), strict=True
        ):
            of_answered, of_the_other = np.asarray(got)
            size = np.abs(wanted).max()
            assert size > 0, path
            np.testing.assert_allclose(
                of_answered, wanted, rtol=0, atol=1e-4 * size, err_msg=str(path)
            )
            assert not of_the_other.any(), path


@pytest.mark.parametrize("own", [0.0, 40.0, 86.0, 120.0])
def test_a_token_that_looks_at_little_but_itself_has_a_finite_gradient(own):
    """The prompt's share of its attention falls to 1e-37, and below what float32 can hold."""
    logits, key = jax.random.normal(jax.random.key(0), (2, 24)), jax.random.key(1)
    target = jax.nn.softmax(3 * jax.random.normal(key, (1, 1, 24)), axis=-1)

    def loss(logits, own):
        everything = jnp.concatenate([logits, jnp.full((2, 1), own)], axis=1)
        shares = jax.nn.softmax(everything, axis=-1)[:, :-1]
        return divergence(target, shares.mean(0)[None, None])[0, 0]

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(logits, own)
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
