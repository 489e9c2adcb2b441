"""The training loss and its gradients against a plain restatement with two full passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.model.layers import linear, mlp, rms_norm
from lookahead_jax.model.rope import apply_rope, rope_tables
from lookahead_jax.modules.definition import LookaheadConfig, LookaheadModules, init_modules
from lookahead_jax.train.objective import (
    PAPER,
    LossConfig,
    base_forward,
    divergence,
    lookahead_loss,
    losses_behind,
)
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
    maps, x = [], x[None]
    for i in range(model.num_layers):
        p = jax.tree.map(lambda a, i=i: a[i], params["layers"])
        lora = {
            name: {"a": pair["a"][i], "b": scale * pair["b"][i]}
            for name, pair in modules.lora.items()
        }

        def both(f, p=p, lora=lora):
            plain, changed = f(p, None), f(p, lora)
            chosen = rows_with_lora.reshape((1, -1) + (1,) * (plain.ndim - 2))
            return jnp.where(chosen, changed, plain)

        h = rms_norm(x, p["attn_norm"], config=model)
        q, k, v = (both(lambda p, lo, n=n, h=h: linear(p, n, h, lora=lo)) for n in "qkv")
        q, k = (apply_rope(a, cos[0], sin[0], interleaved=False) for a in (q, k))
        groups = model.num_heads // model.num_kv_heads
        k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) * model.attn_scale
        weights = jax.nn.softmax(jnp.where(mask[None, None], scores, -jnp.inf), axis=-1)
        maps.append(weights[0])
        out = jnp.einsum("bnts,bsnh->btnh", weights, v)
        x = x + both(lambda p, lo, out=out: linear(p, "o", out, inputs=2, lora=lo))
        h = rms_norm(x, p["mlp_norm"], config=model)
        x = x + both(lambda p, lo, h=h: mlp(p, [h], [lo], config=model)[0])
    return jnp.stack(maps)


def plain_loss(modules, params, prompt, response, model, loss=PAPER):
    """Two full passes of the whole model, one row, gradients through everything."""
    table, t = params["embed"], len(prompt)
    prompt_x = table[jnp.asarray(prompt)]

    def scores(tail, lora_rows, reduce):
        x = jnp.concatenate([prompt_x, tail])
        rows = jnp.arange(len(x)) >= t
        maps = attention_maps(params, x, rows & lora_rows, modules, model)
        reduced = reduce(maps[:, :, t:, loss.skip : t], axis=2)
        return reduced / reduced.sum(-1, keepdims=True)

    reduce = {"mean": jnp.mean, "max": jnp.max}[loss.response]
    target = jax.lax.stop_gradient(scores(table[jnp.asarray(response)], False, reduce))
    predicted = scores(modules.embeddings, True, jnp.mean)
    seen = target > 0  # a logarithm of 0 would turn the gradient of `where` into NaN
    logs = jnp.log(jnp.where(seen, target, 1.0)) - jnp.log(jnp.where(seen, predicted, 1.0))
    return jnp.where(seen, target * logs, 0.0).sum(-1).mean()


@pytest.mark.parametrize(
    ("family", "loss", "known"),
    [
        ("llama", PAPER, False),
        ("mistral", PAPER, False),
        ("mistral", LossConfig(skip=1, response="max"), False),
        ("llama", LossConfig(skip=3), True),
        ("mistral", LossConfig(response="max"), True),
    ],
)
def test_loss_and_gradients_match_two_plain_passes(family, loss, known):
    """float32 on both sides; sums in another order differ by a few 1e-6 of their size.

    `known`: after the base forward, which is computed first.
    """
    model = tiny.config(**({} if family == "llama" else tiny.MISTRAL))
    params, modules = tiny.params(model), modules_for(model)
    prompts, responses = tiny.prompts((37, 20)), tiny.prompts((7, 4), seed=3)

    def ours(modules):
        def pad(rows):
            width = max(map(len, rows))
            return jnp.asarray([r + [-1] * (width - len(r)) for r in rows], jnp.int32)

        rows = pad(prompts), pad(responses)
        if not known:
            return lookahead_loss(modules, params, *rows, config=model, loss=loss, chunk=16)
        forward = base_forward(params, *rows, config=model, dtype=jnp.float32, chunk=16)
        assert forward.k.shape[3] == rows[0].shape[1]
        return losses_behind([modules], params, forward, config=model, losses=[loss])[0]

    def plain(modules):
        rows = [
            plain_loss(modules, params, prompt, response, model, loss)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return jnp.stack(rows)

    value, expected = jax.jit(ours)(modules), jax.jit(plain)(modules)
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    mine = jax.jit(jax.grad(lambda m: ours(m).sum()))(modules)
    theirs = jax.jit(jax.grad(lambda m: plain(m).sum()))(modules)
    for path, gradient in jax.tree.leaves_with_path(theirs):
        got = dict(jax.tree.leaves_with_path(mine))[path]
        size = np.abs(np.asarray(gradient)).max()
        assert size > 0, path
        np.testing.assert_allclose(got, gradient, rtol=0, atol=1e-4 * size, err_msg=str(path))


def test_a_row_without_response_costs_nothing():
    model = tiny.config(num_hidden_layers=1)
    params, modules = tiny.params(model), modules_for(model)
    prompts = tiny.batch((20, 20), model)
    responses = jnp.asarray([[3, 4], [-1, -1]], jnp.int32)
    loss, gradient = jax.value_and_grad(
        lambda m: lookahead_loss(m, params, prompts, responses, config=model)[1]
    )(modules)
    assert loss == 0
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("own", [0.0, 40.0, 86.0, 120.0])
def test_a_token_that_looks_at_little_but_itself_has_a_finite_gradient(own):
    """The prompt's share of its attention falls to 1e-37, and below what float32 can hold."""
    logits, key = jax.random.normal(jax.random.key(0), (2, 24)), jax.random.key(1)
    target = jax.nn.softmax(3 * jax.random.normal(key, (1, 1, 24)), axis=-1)

    def loss(logits, own):
        everything = jnp.concatenate([logits, jnp.full((2, 1), own)], axis=1)
        shares = jax.nn.softmax(everything, axis=-1)[:, :-1]
        return divergence(target, shares.mean(0)[None, None])[0, 0]

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(logits, own)
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
