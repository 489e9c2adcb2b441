"""Causal attention of whole texts: the XLA form against one masked softmax, and who runs where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.kernels.causal_attention import causal_attention
from lookahead_jax.model.sharding import make_mesh


def inputs(tokens, head_dim=16, dtype=np.float32):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, tokens, 4, head_dim)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 2, tokens, head_dim)).astype(np.float32)
    return tuple(jnp.asarray(a, dtype) for a in (q, k, v))


def plain(q, k, v, scale, softcap, window, sinks=None):
    """One softmax over the whole square, and the sinks if there are any, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[2] // a.shape[1], axis=1) for a in (k, v))
    logits = np.einsum("btnh,bnsh->bnts", q, k) * scale
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    i, j = np.arange(q.shape[1])[:, None], np.arange(q.shape[1])[None]
    seen = (j <= i) & (j > i - (window or np.inf))
    p = np.exp(np.where(seen, logits - logits.max(), -np.inf))
    beside = 0.0 if sinks is None else np.exp(sinks[None, :, None, None] - logits.max())
    return np.einsum("bnts,bnsh->btnh", p / (p.sum(-1, keepdims=True) + beside), v)


@pytest.mark.parametrize("tokens", [1, 40, 512, 1100])  # a chunk is 512
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (3.0, None), (None, 100)])
def test_xla_form_is_a_masked_softmax(tokens, softcap, window):
    q, k, v = inputs(tokens)
    settings = dict(scale=0.25, softcap=softcap, window=window)
    out = jax.jit(lambda *a: causal_attention(*a, **settings))(q, k, v)
    # float32 sums of up to 1100 terms: a few 1e-6 of values that are of order 1.
    np.testing.assert_allclose(out, plain(q, k, v, **settings), rtol=0, atol=5e-6)


def test_sinks_take_a_share():
    q, k, v = inputs(600)
    settings = dict(scale=0.25, softcap=None, window=100, sinks=np.float32([-2.0, 0.0, 3.0, 9.0]))
    out = causal_attention(q, k, v, **{**settings, "sinks": jnp.asarray(settings["sinks"])})
    np.testing.assert_allclose(out, plain(q, k, v, **settings), rtol=0, atol=5e-6)


def test_a_named_form_never_falls_back():
    settings = dict(scale=0.25, softcap=None, window=None)
    with pytest.raises(NotImplementedError, match="100 tokens are not a multiple of 128"):
        causal_attention(*inputs(100), implementation="splash", **settings)
    with pytest.raises(NotImplementedError, match="head dim 16"):
        causal_attention(*inputs(128), implementation="splash", **settings)
    with pytest.raises(NotImplementedError, match="no CUDA device"):
        causal_attention(*inputs(128), implementation="cudnn", **settings)


@pytest.mark.parametrize(("window", "sinks"), [(None, None), (200, None), (200, [0.0] * 4)])
def test_tpus_get_splash_attention(window, sinks):
    """Lowered for TPU on any machine: the program holds the kernel, and only where it fits."""

    def program(tokens, head_dim):
        def attend(*a):
            beside = None if sinks is None else jnp.asarray(sinks)
            return causal_attention(*a, scale=0.1, softcap=None, window=window, sinks=beside)

        arrays = inputs(tokens, head_dim, jnp.bfloat16)
        return jax.jit(attend).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()

    with jax.set_mesh(make_mesh()):
        assert "tpu_custom_call" in program(512, 128)
        assert "tpu_custom_call" not in program(500, 128)
    assert "tpu_custom_call" not in program(512, 128)  # four devices, and nobody says how split
