"""Rotary embeddings against their formulas; parity with transformers is in test_parity.py."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.checkpoints.hf_config import config_from_hf
from lookahead_jax.model.config import RopeConfig
from lookahead_jax.model.rope import apply_rope, inverse_frequencies, rope_tables

DIM, THETA = 8, 100.0
PLAIN = np.array([THETA ** (-2 * i / DIM) for i in range(DIM // 2)])
SPANS = jnp.array([10, 16, 17, 64], jnp.int32)
# Float32 rounds constants and one power: a few units of 2^-24.
CLOSE = {"rtol": 1e-6}


def rope(kind, **fields):
    return RopeConfig(kind=kind, theta=THETA, dim=DIM, max_position=16, **fields)


def factors(config):
    frequencies, attention_factor = inverse_frequencies(config, SPANS)
    assert frequencies.dtype == attention_factor.dtype == jnp.float32
    assert frequencies.shape == (4, DIM // 2)
    return np.asarray(frequencies), np.asarray(attention_factor)


def test_default_and_linear():
    for config, expected in (
        (rope("default"), PLAIN),
        (rope("linear", factor=4.0), PLAIN / 4),
    ):
        frequencies, attention_factor = factors(config)
        np.testing.assert_allclose(frequencies, np.tile(expected, (4, 1)), **CLOSE)
        np.testing.assert_array_equal(attention_factor, 1.0)


def test_dynamic_grows_theta_per_row():
    frequencies, attention_factor = factors(rope("dynamic", factor=2.0))
    for row, span in enumerate(SPANS.tolist()):
        length = max(span, 16)
        theta = THETA * (2.0 * length / 16 - 1.0) ** (DIM / (DIM - 2))
        expected = [theta ** (-2 * i / DIM) for i in range(DIM // 2)]
        np.testing.assert_allclose(frequencies[row], expected, **CLOSE)
    np.testing.assert_array_equal(attention_factor, 1.0)


def test_llama3_by_wavelength():
    config = rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64
    )
    expected = []
    for frequency in PLAIN:
        wavelength = 2 * math.pi / frequency
        if wavelength < 64 / 4.0:
            expected.append(frequency)
        elif wavelength > 64 / 1.0:
            expected.append(frequency / 8.0)
        else:
            smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
            expected.append((1 - smooth) * frequency / 8.0 + smooth * frequency)
    # The case has all three kinds of frequency.
    ratios = np.array(expected) / PLAIN
    assert ratios.max() == 1.0
    assert 1 / 8 < np.sort(ratios)[1] < 1
    frequencies, attention_factor = factors(config)
    np.testing.assert_allclose(frequencies, np.tile(expected, (4, 1)), **CLOSE)
    np.testing.assert_array_equal(attention_factor, 1.0)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn(truncate):
    fields = {"factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0, "original_max_position": 128}

    def pair(turns):
        """The pair index whose frequency makes `turns` turns over the original context."""
        return DIM / 2 * math.log(128 / (2 * math.pi * turns), THETA)

    low, high = pair(8.0), pair(1.0)
    assert 0 < low < high < DIM / 2
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    expected = []
    for i, frequency in enumerate(PLAIN):
        blend = min(max((i - low) / (high - low), 0), 1)
        expected.append(frequency * (1 - blend) + frequency / 4.0 * blend)
    frequencies, attention_factor = factors(rope("yarn", truncate=truncate, **fields))
    np.testing.assert_allclose(frequencies, np.tile(expected, (4, 1)), **CLOSE)
    np.testing.assert_allclose(attention_factor, 0.1 * math.log(4.0) + 1, **CLOSE)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"mscale": 1.2, "mscale_all_dim": 0.7},
            (0.12 * math.log(4) + 1) / (0.07 * math.log(4) + 1),
        ),
        ({"mscale": 1.2}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 0.8, "mscale": 1.2, "mscale_all_dim": 0.7}, 0.8),
    ],
)
def test_yarn_attention_factor(fields, expected):
    base = {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    config = rope("yarn", original_max_position=16, **base, **fields)
    np.testing.assert_allclose(factors(config)[1], expected, **CLOSE)


def test_longrope_switches_per_row():
    short, long = (1.0, 1.5, 2.0, 3.0), (1.0, 4.0, 8.0, 16.0)
    config = rope(
        "longrope", factor=4.0, short_factor=short, long_factor=long, original_max_position=16
    )
    frequencies, attention_factor = factors(config)
    for row, span in enumerate(SPANS.tolist()):
        expected = PLAIN / np.array(long if span > 16 else short)
        np.testing.assert_allclose(frequencies[row], expected, **CLOSE)
    np.testing.assert_allclose(attention_factor, math.sqrt(1 + math.log(4) / math.log(16)), **CLOSE)


def test_tables_under_jit_with_padding_and_two_ropes():
    hf = {"model_type": "gemma3_text", "num_hidden_layers": 6, "head_dim": DIM}
    config = config_from_hf(hf)
    positions = jnp.array([[0, 5, -1], [7, 100, 3]], jnp.int32)
    cos, sin = jax.jit(rope_tables, static_argnums=0)(config, positions, SPANS[:2])
    assert cos.shape == sin.shape == (2, 2, 3, DIM // 2)
    assert cos.dtype == sin.dtype == jnp.float32
    assert np.isfinite(cos).all()
    for index, theta in enumerate((1e6, 1e4)):
        angles = np.asarray(positions)[..., None] * theta ** (-np.arange(0, DIM, 2) / DIM)
        # Angles up to 100 are rounded to float32 before the cosine: 100 * 2^-24.
        np.testing.assert_allclose(cos[index], np.cos(angles), atol=1e-5)
        np.testing.assert_allclose(sin[index], np.sin(angles), atol=1e-5)


def rotate(x, position, dim=DIM, interleaved=False):
    config = RopeConfig(kind="default", theta=THETA, dim=dim, max_position=64)
    frequencies, _ = inverse_frequencies(config, SPANS[:1])
    angles = jnp.float32(position) * frequencies[:, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return apply_rope(x[None, None, None], cos, sin, interleaved=interleaved)[0, 0, 0]


def test_apply_rope_rotates_pairs_and_keeps_the_rest():
    x = jax.random.normal(jax.random.key(0), (DIM + 4,), jnp.float32)
    rotated = rotate(x, 3)
    np.testing.assert_array_equal(rotated[DIM:], x[DIM:])
    angles = 3 * PLAIN
    first, second = np.asarray(x[:DIM]).reshape(2, DIM // 2)
    pairs = (first + 1j * second) * np.exp(1j * angles)
    np.testing.assert_allclose(rotated[: DIM // 2], pairs.real, atol=1e-6)
    np.testing.assert_allclose(rotated[DIM // 2 : DIM], pairs.imag, atol=1e-6)


def test_interleaved_pairs_are_neighbours():
    x = jax.random.normal(jax.random.key(0), (DIM + 4,), jnp.float32)
    rotated = np.asarray(rotate(x, 3, interleaved=True))
    np.testing.assert_array_equal(rotated[DIM:], x[DIM:])
    pairs = np.asarray(x[:DIM]).reshape(DIM // 2, 2)
    turned = (pairs[:, 0] + 1j * pairs[:, 1]) * np.exp(3j * PLAIN)
    np.testing.assert_allclose(rotated[:DIM:2], turned.real, atol=1e-6)
    np.testing.assert_allclose(rotated[1:DIM:2], turned.imag, atol=1e-6)


def test_scores_depend_on_distance_only():
    q, k = jax.random.normal(jax.random.key(1), (2, DIM), jnp.float32)
    scores = [float(rotate(q, m) @ rotate(k, m - 7)) for m in (7, 20, 50)]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-5)


def test_apply_rope_keeps_bfloat16_but_computes_in_float32():
    x = jax.random.normal(jax.random.key(2), (DIM,), jnp.float32).astype(jnp.bfloat16)
    expected = rotate(x.astype(jnp.float32), 5).astype(jnp.bfloat16)
    assert rotate(x, 5).dtype == jnp.bfloat16
    np.testing.assert_array_equal(rotate(x, 5), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 7}, "cannot rotate 7"),
        ({"kind": "dynamic", "dim": 2, "factor": 2.0}, "cannot rotate 2"),
        ({"kind": "spiral"}, "unknown rope_type 'spiral'"),
        ({"kind": "yarn", "factor": 2.0}, "needs beta_fast"),
        ({"theta": 0.0}, "out of range"),
        (
            {
                "kind": "longrope",
                "factor": 2.0,
                "original_max_position": 4,
                "short_factor": (1.0,),
                "long_factor": (1.0,) * 4,
            },
            "short_factor has 1 entries, expected 4",
        ),
    ],
)
def test_impossible_ropes_are_refused(fields, message):
    base = {"kind": "default", "theta": THETA, "dim": DIM, "max_position": 16}
    with pytest.raises(ValueError, match=message):
        RopeConfig(**base | fields)
