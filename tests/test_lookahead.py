"""Lookahead modules: what they start as, what they touch, and the files they live in."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lookahead_jax.modules.definition import (
    TARGETS,
    LookaheadConfig,
    init_modules,
    lora_shapes,
    observer_block,
)
from lookahead_jax.modules.files import CONFIG_FILE, TENSOR_FILE, load_modules, save_modules
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.prefilling.batching import slots_for
from lookahead_jax.prefilling.prefill import prefill
from tests import tiny

MODEL = tiny.config()
PARAMS = tiny.params(MODEL)
SIZES = LookaheadConfig(tokens=4, rank=2, alpha=6.0, targets=tuple(TARGETS), init="table")
LENGTHS = (40, 23)


def modules(seed=0, config=SIZES):
    """Modules as they could be after training: nothing is zero."""
    made = init_modules(jax.random.key(seed), config, MODEL, params=PARAMS)
    rng = np.random.default_rng(seed)
    shake = lambda w: w + jnp.asarray(0.3 * rng.standard_normal(w.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(shake, made)


def read(modules, budget):
    tokens, policy = tiny.batch(LENGTHS, MODEL), make_policy("lookaheadkv")
    length = jnp.asarray(LENGTHS, jnp.int32)
    return prefill(
        PARAMS, tokens, config=MODEL, policy=policy, budget=budget,
        slots=slots_for(policy, tokens.shape[1], budget, 8, config=MODEL), new_tokens=8, chunk=16,
        observer=observer_block(modules, length, length + 8), with_scores=True,
    )  # fmt: skip


def test_initial_modules_are_plain_rows():
    made = init_modules(jax.random.key(0), SIZES, MODEL, params=PARAMS)
    for name, (inputs, outputs) in lora_shapes(MODEL).items():
        assert made.lora[name]["a"].shape == (3, inputs, 2)
        assert made.lora[name]["b"].shape == (3, 2, outputs)
        assert (np.asarray(made.lora[name]["b"]) == 0).all()
        assert 0.5 < np.abs(np.asarray(made.lora[name]["a"])).max() * inputs**0.5 <= 1
    without = LookaheadConfig(tokens=4, rank=0, alpha=1.0, targets=(), init="table")
    plain = init_modules(jax.random.key(0), without, MODEL, params=PARAMS)
    assert not plain.lora
    np.testing.assert_array_equal(plain.embeddings, made.embeddings)
    np.testing.assert_array_equal(read(plain, 8).scores, read(made, 8).scores)


def test_tokens_start_where_the_embedding_table_lies():
    many = dataclasses.replace(SIZES, tokens=4000)
    table = np.asarray(PARAMS["embed"])
    rows = np.asarray(init_modules(jax.random.key(0), many, MODEL, params=PARAMS).embeddings)
    # 4000 draws: the mean is off by spread / 63, five times that is never seen.
    assert (np.abs(rows.mean(0) - table.mean(0)) < 5 * table.std(0) / 63).all()
    np.testing.assert_allclose(rows.std(0), table.std(0), rtol=0.07)
    scaled = dataclasses.replace(MODEL, embed_scale=3.0)
    larger = init_modules(jax.random.key(0), many, scaled, params=PARAMS).embeddings
    np.testing.assert_allclose(larger, 3 * rows, rtol=0, atol=1e-4)
    normal = dataclasses.replace(many, init="normal")
    spread = np.asarray(init_modules(jax.random.key(0), normal, MODEL).embeddings).std()
    assert abs(spread - 0.02) < 0.001
    with pytest.raises(ValueError, match="params"):
        init_modules(jax.random.key(0), SIZES, MODEL)


def test_the_observer_block_stands_behind_each_row():
    block = observer_block(modules(), jnp.asarray([5, 9], jnp.int32), jnp.asarray([7, 11]))
    np.testing.assert_array_equal(block.positions, [[5, 6, 7, 8], [9, 10, 11, 12]])
    np.testing.assert_array_equal(block.x[1], modules().embeddings)
    assert block.lora is not None
    for name, pair in modules().lora.items():
        np.testing.assert_array_equal(block.lora[name]["a"], pair["a"])
        np.testing.assert_array_equal(block.lora[name]["b"], 3.0 * pair["b"])
    length = jnp.asarray([5], jnp.int32)
    half = observer_block(modules(), length, length, dtype=jnp.bfloat16)
    assert {a.dtype for a in jax.tree.leaves((half.x, half.lora))} == {jnp.dtype(jnp.bfloat16)}


def test_other_modules_change_no_bit_of_the_prompt():
    """One executable, two sets of modules: the prompt's rows and logits are bit-equal."""
    compilations = prefill.compiled()
    one, two = read(modules(0), 64), read(modules(1), 64)
    assert prefill.compiled() <= compilations + 1
    for name in ("k", "v", "pos"):
        np.testing.assert_array_equal(getattr(one.cache, name), getattr(two.cache, name))
    np.testing.assert_array_equal(one.logits, two.logits)
    assert (np.asarray(one.scores) != np.asarray(two.scores)).mean() > 0.4  # half is padding
    few, other = read(modules(0), 8), read(modules(1), 8)
    np.testing.assert_array_equal(few.logits, other.logits)
    assert (np.asarray(few.cache.pos) != np.asarray(other.cache.pos)).any()


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_files_hold_the_modules(tmp_path, dtype):
    saved = modules()
    save_modules(tmp_path / "new" / "folder", saved, params=PARAMS)
    loaded = load_modules(tmp_path / "new" / "folder", params=PARAMS, config=MODEL, dtype=dtype)
    assert loaded.config == saved.config
    for mine, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(saved), strict=True):
        np.testing.assert_array_equal(mine, other.astype(dtype or jnp.float32))


def test_files_of_half_the_size_hold_the_rounded_modules(tmp_path):
    saved = modules()
    save_modules(tmp_path / "whole", saved, params=PARAMS)
    save_modules(tmp_path / "half", saved, params=PARAMS, dtype=np.float16)
    sizes = [(tmp_path / name / TENSOR_FILE).stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.8 * sizes[1]
    loaded = load_modules(tmp_path / "half", params=PARAMS, config=MODEL)
    for mine, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(saved), strict=True):
        np.testing.assert_array_equal(mine, other.astype(jnp.float16).astype(jnp.float32))
    with pytest.raises(ValueError, match="dtype int8: modules are stored as float32 or float16"):
        save_modules(tmp_path / "int8", saved, params=PARAMS, dtype=np.int8)
    assert not (tmp_path / "int8").exists()


def test_tensors_have_peft_names_and_orientation(tmp_path):
    saved = modules()
    save_modules(tmp_path, saved, params=PARAMS)
    tensors = safetensors.numpy.load_file(tmp_path / TENSOR_FILE)
    assert len(tensors) == 1 + 3 * 7 * 2
    prefix = "base_model.model.model.layers.2"
    a = tensors[f"{prefix}.self_attn.q_proj.lora_A.weight"]
    b = tensors[f"{prefix}.self_attn.q_proj.lora_B.weight"]
    assert (a.shape, b.shape) == ((2, 32), (32, 2))
    np.testing.assert_array_equal(a, np.asarray(saved.lora["q"]["a"])[2].T)
    np.testing.assert_array_equal(b, np.asarray(saved.lora["q"]["b"])[2].T)
    # PEFT's update: y += alpha / r * lora_B(lora_A(x)).
    assert tensors[f"{prefix}.mlp.down_proj.lora_A.weight"].shape == (2, 64)
    described = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (described["tokens"], described["rank"], described["alpha"]) == (4, 2, 6.0)


def test_another_base_model_is_refused(tmp_path):
    save_modules(tmp_path, modules(), params=PARAMS)
    with pytest.raises(ValueError, match="another base model"):
        load_modules(tmp_path, params=tiny.params(MODEL, 1), config=MODEL)
    # The same model in bfloat16 is the same base.
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    loaded = load_modules(tmp_path, params=half, config=MODEL)
    assert loaded.embeddings.dtype == jnp.bfloat16


def rewrite(folder, **changes):
    described = json.loads((folder / CONFIG_FILE).read_text()) | changes
    (folder / CONFIG_FILE).write_text(json.dumps(described))


def damage_tensors(folder, content):
    import hashlib

    (folder / TENSOR_FILE).write_bytes(content)
    rewrite(folder, tensors_sha256=hashlib.sha256(content).hexdigest())


DAMAGE = {
    "truncated": lambda d: (d / TENSOR_FILE).write_bytes((d / TENSOR_FILE).read_bytes()[:-9]),
    "other tensors": lambda d: (d / TENSOR_FILE).write_bytes(
        safetensors.numpy.save({"x": np.zeros(3, np.float32)})
    ),
    "not safetensors": lambda d: damage_tensors(d, b"no"),
    "missing tensor": lambda d: damage_tensors(
        d, safetensors.numpy.save({"lookahead.embeddings": np.zeros((4, 32), np.float32)})
    ),
    "not json": lambda d: (d / CONFIG_FILE).write_text("{"),
    "a list": lambda d: (d / CONFIG_FILE).write_text("[]"),
    "no digest": lambda d: rewrite(d, tensors_sha256=None),
    "wrong sizes": lambda d: rewrite(d, tokens=5),
    "fewer targets": lambda d: rewrite(d, targets=["q"]),
    "unknown target": lambda d: rewrite(d, targets=["q", "z"]),
    "target that is no text": lambda d: rewrite(d, targets=[["q"]]),
    "text as number": lambda d: rewrite(d, rank="2"),
    "true as number": lambda d: rewrite(d, rank=True),
    "unknown init": lambda d: rewrite(d, init="zeros"),
    "later format": lambda d: rewrite(d, format=2),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_files_are_refused_in_one_line(tmp_path, how):
    save_modules(tmp_path, modules(), params=PARAMS)
    DAMAGE[how](tmp_path)
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        load_modules(tmp_path, params=PARAMS, config=MODEL)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "dtype"), [(np.nan, None), (-np.inf, jnp.bfloat16), (1e6, jnp.float16)]
)
def test_modules_that_are_not_finite_are_refused(tmp_path, value, dtype):
    bad = modules()
    bad.lora["q"]["a"] = bad.lora["q"]["a"].at[1, 0, 0].set(value)
    save_modules(tmp_path, bad, params=PARAMS)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.lora_A.* NaN, infinite"):
        load_modules(tmp_path, params=PARAMS, config=MODEL, dtype=dtype)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=CONFIG_FILE):
        load_modules(tmp_path, params=PARAMS, config=MODEL)
    save_modules(tmp_path, modules(), params=PARAMS)
    (tmp_path / TENSOR_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=TENSOR_FILE):
        load_modules(tmp_path, params=PARAMS, config=MODEL)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(tokens=0), dict(rank=-1), dict(rank=0), dict(targets=()), dict(alpha=0.0),
        dict(alpha=float("nan")), dict(targets=("q", "q")), dict(targets=("x",)), dict(init="no"),
    ],
)  # fmt: skip
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"lookahead tokens|LoRA|init"):
        dataclasses.replace(SIZES, **wrong)
