"""int8 weights and caches, held against NumPy restatements and runs with rounded floats."""

import dataclasses
import functools
from functools import partial
from pathlib import Path

import int8_figures
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lookahead_jax as lk
from lookahead_jax.checkpoints.load import GenerationDefaults, Model, save_params
from lookahead_jax.kernels.attention import block_attention
from lookahead_jax.kernels.common import Own
from lookahead_jax.model import params as P
from lookahead_jax.model.cache import Entries, commit, empty_cache
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.model.layers import linear
from lookahead_jax.model.parameter_specs import parameter_specs, shape
from lookahead_jax.model.quantization import (
    FINGERPRINT_SAMPLES,
    QuantizedWeight,
    dequantize_entries,
    multiply_table,
    quantize,
    quantize_entries,
    rows_of,
)
from lookahead_jax.model.sharding import make_mesh, param_shardings
from lookahead_jax.modules.definition import LookaheadConfig, init_modules
from lookahead_jax.modules.files import save_modules
from lookahead_jax.prefilling.layer_pass import hidden_states
from lookahead_jax.prefilling.prefill import compress
from lookahead_jax.train.batches import Batch
from lookahead_jax.train.step import compile_step, init_state
from tests import kernel_cases, tiny
from tests.drafted import Shared
from tests.test_attention import case, causal, expected

MODELS = Path(__file__).parent / "fixtures" / "models"
MATRICES = {"embed", "lm_head", "q", "k", "v", "o", "gate", "up", "down"}


@functools.cache
def load(name, **options):
    """A model of the fixtures, read once for all tests."""
    return lk.load(MODELS / name, **options)


def is_quantized(leaf):
    return isinstance(leaf, QuantizedWeight)


def rounded(params, config, dtype=jnp.float32):
    """The same parameters as floats: values times scales, channel by channel."""
    floats = {}
    for path, spec in parameter_specs(config).items():
        weight = P.leaf(params, path)
        if is_quantized(weight):
            inputs = tuple(spec.axes.index(axis) for axis in spec.columns)
            scale = np.expand_dims(np.asarray(weight.scale), inputs)
            weight = jnp.asarray(np.asarray(weight.values, np.float32) * scale, dtype)
        floats[path] = weight
    return P.tree(floats)


@pytest.mark.parametrize("name", ["llama3", "phi3"])  # phi3 stores fused tensors
def test_values_and_scales_are_those_of_every_channel_by_itself(name):
    model, floats = load(name, weights="int8"), load(name)
    found = {path for path in parameter_specs(model.config)}
    for path in found:
        weight, matrix = P.leaf(model.params, path), np.asarray(P.leaf(floats.params, path))
        assert is_quantized(weight) == (path.split(".")[-1] in MATRICES)
        if not is_quantized(weight):
            np.testing.assert_array_equal(weight, matrix)
            continue
        spec = parameter_specs(model.config)[path]
        order = [spec.axes.index(a) for a in (*spec.output_axes, *spec.columns)]
        channels = matrix.transpose(order).reshape(weight.scale.size, -1).astype(np.float64)
        values = np.asarray(weight.values).transpose(order).reshape(channels.shape)
        scale = np.asarray(weight.scale).reshape(-1)
        assert values.dtype == np.int8
        assert scale.dtype == np.float32
        np.testing.assert_allclose(scale, np.abs(channels).max(1) / 127, rtol=1e-6)
        assert (np.abs(values).max(1) == 127).all()
        assert np.abs(channels - values * scale[:, None]).max(1).max() <= scale.max() * 0.5001
        assert (np.abs(channels - values * scale[:, None]) <= scale[:, None] * 0.5001).all()


def test_channels_of_zeros_and_of_numbers_that_are_not_finite():
    matrix = np.ones((4, 3), np.float32)
    matrix[:, 0], matrix[1, 2] = 0.0, np.nan
    values, scale = quantize(matrix, (0,))
    np.testing.assert_array_equal(scale, np.float32([0, 1 / 127, np.nan]))
    np.testing.assert_array_equal(values, [[0, 127, 0]] * 4)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_a_product_is_that_of_the_rounded_matrix(rows, dtype):
    """Restated in float64; the sum is in float32, the result in the dtype of x."""
    rng = np.random.default_rng(rows)
    matrix = rng.normal(size=(4, 8, 6)).astype(np.float32)  # heads, head_dim, embed, as `o`
    values, scale = quantize(matrix, (0, 1))
    weight = QuantizedWeight(jnp.asarray(values), jnp.asarray(scale), jnp.zeros(256, dtype))
    x = jnp.asarray(rng.normal(size=(1, rows, 4, 8)), dtype)
    got = jax.jit(partial(linear, name="o", inputs=2))({"o": weight}, x=x)
    assert got.dtype == dtype
    exact = np.einsum("bpnh,nhd->bpd", np.asarray(x, np.float64), values * scale.astype(np.float64))
    tolerance = 1e-6 if dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=0, atol=tolerance * 40)


def test_the_head_multiplies_a_table_in_blocks():
    """On CPU two blocks of 1,024 rows are converted one after the other; float64 restatement."""
    rng = np.random.default_rng(0)
    values, scale = quantize(rng.normal(size=(2048, 8)).astype(np.float32), (1,))
    table = QuantizedWeight(jnp.asarray(values), jnp.asarray(scale), jnp.zeros(256, jnp.float32))
    x = jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32)
    exact = np.asarray(x, np.float64) @ (values * scale.astype(np.float64)[:, None]).T
    program = jax.jit(multiply_table).lower(x, table).compile()
    np.testing.assert_allclose(program(x, table), exact, rtol=0, atol=2e-5)
    assert "f32[2048,8]" not in program.as_text()
    # Spread over devices, each multiplies its own rows. The largest blocks that fit, of 1,002 rows,
    # would not divide evenly.
    mesh = jax.make_mesh((4,), ("tensor",))
    rows = NamedSharding(mesh, PartitionSpec("tensor"))
    spread = QuantizedWeight(
        jax.ShapeDtypeStruct((8 * 1002, 8), jnp.int8, sharding=rows),
        jax.ShapeDtypeStruct((8 * 1002,), jnp.float32, sharding=rows),
        table.sample,
    )
    with jax.set_mesh(mesh):
        assert "all-gather" not in jax.jit(multiply_table).lower(x, spread).compile().as_text()

    ids = jnp.asarray([[7], [2047]])
    rows = np.asarray(rows_of(table, ids))
    np.testing.assert_allclose(rows, values[[[7], [2047]]] * scale[[[7], [2047]]][..., None])
    np.testing.assert_array_equal(rows_of(table, ids[:1]), rows[:1])  # one row: another way


@pytest.mark.parametrize("name", ["gemma3", "llama_own_head"])  # a tied table, and two
def test_logits_are_those_of_the_rounded_weights(name):
    """Float32 sums in another order: the tolerance of the parity test."""
    model = load(name, weights="int8")
    with np.load(MODELS / name / "golden.npz") as file:
        tokens = jnp.asarray(file["tokens"])
    got = lk.token_logits(model.params, tokens, config=model.config)
    floats = rounded(model.params, model.config)
    expected = np.asarray(lk.token_logits(floats, tokens, config=model.config))
    valid = np.asarray(tokens) >= 0
    assert np.abs(np.asarray(got) - expected)[valid].max() <= 1e-5 * np.abs(expected[valid]).max()


def test_no_stack_of_weights_becomes_floats():
    """A layer's matrix is converted where it is multiplied, the stack of all layers never."""
    config = tiny.config()
    params = P.abstract_params(config, jnp.float32, "int8")
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    text = hidden_states.lower(params, tokens, config=config).compile().as_text()
    stacks = [w for w in params["layers"].values() if is_quantized(w)]
    assert len(stacks) == 7
    for weight in stacks:
        sizes = ",".join(map(str, weight.shape))
        assert f"s8[{sizes}]" in text
        assert f"f32[{sizes}]" not in text


def test_sharded_loading_gives_the_same_arrays():
    mesh = make_mesh(fsdp=2, tensor=2)
    one, config = load("llama3", weights="int8").params, load("llama3").config
    four = load("llama3", weights="int8", mesh=mesh).params
    jax.tree.map(np.testing.assert_array_equal, one, four)
    places = param_shardings(config, mesh, "int8")
    assert jax.tree.all(jax.tree.map(lambda a, place: a.sharding == place, four, places))
    tokens = tiny.batch((9, 16, 3, 12), config)
    single = lk.token_logits(one, tokens, config=config)
    split = lk.token_logits(four, tokens, config=config)
    valid = np.asarray(tokens) >= 0
    error = np.abs(np.asarray(single) - np.asarray(split))[valid].max()
    assert error <= 1e-5 * np.abs(np.asarray(single)[valid]).max()


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_the_fingerprint_is_that_of_the_model_before_rounding(dtype, tmp_path):
    """So lookahead modules trained on floats load, and so do those trained on int8."""
    options = {} if dtype is None else {"dtype": dtype}
    floats, model = load("llama3", **options), load("llama3", **options, weights="int8")
    assert model.params["embed"].dtype == floats.params["embed"].dtype
    assert fingerprint(model.params) == fingerprint(floats.params)
    assert fingerprint(P.unstack(model.params)) == fingerprint(floats.params)
    if dtype is None:
        sizes = LookaheadConfig(tokens=2, rank=2, alpha=4.0, targets=("q",), init="table")
        modules = init_modules(jax.random.key(0), sizes, model.config, params=model.params)
        save_modules(tmp_path, modules, params=model.params)
        for params in (model.params, floats.params):
            lk.load_modules(tmp_path, params=params, config=model.config)
        half = load("llama3", dtype="float16", weights="int8")
        lk.load_modules(tmp_path, params=half.params, config=model.config)


def test_the_benchmark_reads_its_text_once(tmp_path, monkeypatch):
    """A text that is edited while a model loads is not mistaken for a loss of int8."""
    tiny.save_bytes_model(tmp_path, num_hidden_layers=2)
    text, load, edits = (
        tmp_path / "text",
        lk.load,
        iter(("0" * 30, "other words of thirty letters.")),
    )
    text.write_text("a text of some thirty letters.")

    def load_and_edit(*args, **options):
        text.write_text(next(edits))
        return load(*args, **options)

    monkeypatch.setattr(lk, "load", load_and_edit)
    options = int8_figures.Options(texts=(str(text),), pieces=2, tokens=15, whole=True)
    found = int8_figures.quality(options, str(tmp_path))
    row = found["weights_int8_cache_float32"]
    assert found["scored_tokens"] == 28
    assert len(row["piece_losses"]) == 2
    assert 0 < abs(row["relative"]) < 0.1
    assert row["interval"][0] < row["relative"] < row["interval"][1]


def test_generate_is_that_of_the_rounded_weights(tmp_path):
    tiny.save_bytes_model(tmp_path, num_hidden_layers=2)
    model = lk.load(tmp_path, weights="int8")
    floats = dataclasses.replace(model, params=rounded(model.params, model.config))
    prompts = tiny.prompts((60, 33), vocab=256)
    settings = dict(budget=24, max_new_tokens=12)
    run = lk.generate(model, prompts, drafter="prompt_lookup", draft_nodes=8, **settings)
    expected = lk.generate(floats, prompts, **settings)
    for prompt, got, other in zip(prompts, run.tokens, expected.tokens, strict=True):
        tiny.same_tokens(
            got, other,
            lambda before, prompt=prompt: tiny.decision(
                floats.params, floats.config, prompt, before, policy=lk.make_policy("snapkv"),
                budget=24, sampling=lk.Sampling(), seed=0, new_tokens=12,
            ),
        )  # fmt: skip


def test_modules_train_on_an_int8_base():
    """The gradients are those of the rounded weights."""
    config = tiny.config(num_hidden_layers=2, vocab_size=96)
    weights = {}
    for path, spec in parameter_specs(config).items():
        matrix = P.leaf(tiny.params(config), path)
        if spec.columns:
            inputs = tuple(spec.axes.index(axis) for axis in spec.columns)
            values, scale = quantize(np.asarray(matrix), inputs)
            samples = (*shape(spec.sample_axes, config), FINGERPRINT_SAMPLES)
            matrix = QuantizedWeight(
                jnp.asarray(values), jnp.asarray(scale), jnp.zeros(samples, jnp.float32)
            )
        weights[path] = matrix
    params = P.tree(weights)
    sizes = LookaheadConfig(tokens=3, rank=2, alpha=4.0, targets=("q", "down"), init="normal")
    optimizer = optax.sgd(0.5)
    mesh = make_mesh(fsdp=2, tensor=2)
    prompts = tiny.batch((30, 20, 16, 25), config).reshape(1, 4, -1)
    responses = tiny.batch((4,) * 4, config, seed=1)[:, :4].reshape(1, 4, -1)
    after = []
    for base, kind in ((params, "int8"), (rounded(params, config), None)):
        step = compile_step(mesh, config=config, optimizer=optimizer, weights=kind)
        state = init_state(init_modules(jax.random.key(0), sizes, config), optimizer)
        base = jax.device_put(base, param_shardings(config, mesh, kind))
        with jax.set_mesh(mesh):
            state, metrics = step(base, state, Batch(prompts, responses))
        assert metrics["grad_norm"] > 0
        assert metrics["skipped"] == 0
        after.append(jax.tree.map(np.asarray, state.modules))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *after)


def test_what_int8_weights_cannot_do_is_refused(tmp_path, monkeypatch):
    model = load("llama3", weights="int8")
    with pytest.raises(ValueError, match="int8 weights cannot be saved"):
        save_params(tmp_path, model.params, model.config)
    with pytest.raises(ValueError, match="weights='int4' is unknown"):
        lk.load(MODELS / "llama3", weights="int4")
    monkeypatch.setattr(P, "_QUANTIZED_AXES", P._QUANTIZED_AXES - {"mlp"})
    with pytest.raises(ValueError, match=r"int8 weights do not cover layers\.gate, layers\.up"):
        lk.load(MODELS / "llama3", weights="int8")


CONFIG = tiny.config(num_hidden_layers=2)


def tiny_model():
    defaults = GenerationDefaults(
        eos_ids=(), bos_id=None, pad_id=None, temperature=None, top_k=None, top_p=None
    )
    return Model(
        params=tiny.params(CONFIG), config=CONFIG, tokenizer=None, generation=defaults, path=Path()
    )


@functools.cache
def read(policy, budget, cache_dtype="int8"):
    """Prompts of the tiny model, read with the policy, once for all tests."""
    model = tiny_model()
    return lk.prefill(
        model.params, tiny.batch((60, 33, 17), model.config), config=model.config, slots=128,
        policy=lk.make_policy(policy), budget=budget, cache_dtype=cache_dtype, with_scores=True,
    )  # fmt: skip


def test_entries_are_rounded_by_slot_and_head():
    rng = np.random.default_rng(0)
    entries = rng.normal(size=(2, 3, 5, 8)).astype(np.float32)
    entries[0, 0, 0] = 0.0
    spoiled = entries.copy()
    spoiled[1, 0, 2, 3], spoiled[1, 1, 0, 0] = np.nan, np.inf
    bad = np.isnan(np.asarray(quantize_entries(jnp.asarray(spoiled))[1]))
    assert np.argwhere(bad).tolist() == [[1, 0, 2], [1, 1, 0]]
    values, scale = map(np.asarray, quantize_entries(jnp.asarray(entries)))
    assert values.dtype == np.int8
    np.testing.assert_allclose(scale, np.abs(entries).max(-1) / 127, rtol=1e-6)
    wanted = np.rint(entries.astype(np.float64) / np.where(scale > 0, scale, 1)[..., None])
    assert np.abs(values - wanted).max() <= 1  # halves may round the other way in float32
    assert (values == wanted).mean() > 0.99
    back = np.asarray(dequantize_entries(*map(jnp.asarray, (values, scale)), jnp.float32))
    np.testing.assert_array_equal(back[0, 0, 0], 0.0)
    assert (np.abs(back - entries) <= 0.5001 * scale[..., None]).all()


def rounded_case(rows, slots):
    """The arguments of an attention case in int8, and the floats that they stand for."""
    q, k, v, ctx, pos, q_pos = case(rows, slots)
    four = [quantize_entries(a) for a in (k, v, *ctx)]
    return q, four, [dequantize_entries(*a, jnp.float32) for a in four], pos, q_pos


@pytest.mark.parametrize("key_block", [None, 7])
def test_attention_over_int8_is_that_over_the_rounded_entries(key_block):
    """Float64 NumPy; dead slots have NaN as scale. Tolerance as in test_attention."""
    q, four, floats, pos, q_pos = rounded_case(5, 20)
    (k, k_by), (v, v_by), (ctx_k, ctx_k_by), (ctx_v, ctx_v_by) = four
    dead = pos < 0
    scales = tuple(jnp.where(dead, jnp.nan, a) for a in (ctx_k_by, ctx_v_by))
    own = causal(q_pos)
    attend = partial(
        block_attention, q, Own(k, v, jnp.asarray(own), (k_by, v_by)), jnp.asarray(q_pos),
        (ctx_k, ctx_v, jnp.asarray(pos)), scales=scales, scale=0.3, softcap=4.0, window=30,
        key_block=key_block, implementation="xla",
    )  # fmt: skip
    out, lse = jax.jit(attend)()
    want_out, want_lse = expected(q, *floats[:2], own, q_pos, tuple(floats[2:]), pos, 0.3, 4.0, 30)
    seen = np.isfinite(want_lse)
    assert seen.any()
    np.testing.assert_allclose(out, want_out, rtol=0, atol=2e-5)
    np.testing.assert_allclose(np.asarray(lse)[seen], want_lse[seen], rtol=0, atol=2e-5)


@pytest.mark.parametrize("dim", [64, 128])  # keys of 64 are stored transposed
def test_the_tpu_kernel_reads_int8(dim):
    """In interpret mode, with a stack of layers; every dead slot has NaN as scale."""
    pltpu = pytest.importorskip("jax.experimental.pallas.tpu")
    a = kernel_cases.arguments(9, 256, 3, dim)
    q, own_k, own_v, k, v, visible, q_pos, pos, ends = a
    (own_k, own_k_by), (own_v, own_v_by), (k, k_by), (v, v_by) = (
        quantize_entries(x) for x in (own_k, own_v, k, v)
    )
    assert np.isnan(np.asarray(k_by)).any()
    stack = tuple(jnp.zeros((3, *x.shape), x.dtype).at[2].set(x) for x in (k, v))

    def run(implementation):
        return block_attention(
            q, Own(own_k, own_v, visible, (own_k_by, own_v_by)), q_pos, (*stack, pos),
            scales=(k_by, v_by), scale=0.2, softcap=None, window=None, slots=(0, ends),
            layer=jnp.asarray(2, jnp.int32), key_block=128, implementation=implementation,
        )  # fmt: skip

    want = jax.jit(partial(run, "xla"))()
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        got = jax.jit(partial(run, "pallas_tpu"))()
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=kernel_cases.TOLERANCE)


def test_kernels_that_do_not_read_int8_refuse_it():
    q, four, _, pos, q_pos = rounded_case(4, 64)
    (k, k_by), (v, v_by), (ctx_k, ctx_k_by), (ctx_v, ctx_v_by) = four
    run = partial(
        block_attention, q, q_pos=jnp.asarray(q_pos), scale=1.0, softcap=None, window=None,
        context=(ctx_k, ctx_v, jnp.asarray(pos)), own=Own(k, v, jnp.asarray(causal(q_pos))),
    )  # fmt: skip
    with pytest.raises(ValueError, match="need the scales"):
        run(scales=(ctx_k_by, ctx_v_by))
    with pytest.raises(NotImplementedError, match="pallas_gpu"):
        run(
            own=Own(k, v, jnp.asarray(causal(q_pos)), (k_by, v_by)),
            scales=(ctx_k_by, ctx_v_by), implementation="pallas_gpu",
        )  # fmt: skip


def test_a_prompt_is_rounded_at_the_cut():
    """It reads itself in floats: scores, kept entries and logits are those of a float cache."""
    floats, found = read("snapkv", 24, None), read("snapkv", 24)
    np.testing.assert_array_equal(found.scores, floats.scores)
    np.testing.assert_array_equal(found.logits, floats.logits)
    np.testing.assert_array_equal(found.cache.pos, floats.cache.pos)
    for name in ("k", "v"):
        values, scale = quantize_entries(getattr(floats.cache, name))
        assert np.abs(np.asarray(values, int) - np.asarray(getattr(found.cache, name))).max() <= 1
        np.testing.assert_allclose(getattr(found.cache, f"{name}_scale"), scale, rtol=1e-6)


def test_a_cut_of_a_cut_keeps_entries_as_they_are():
    full = read("full", 1)
    model = tiny_model()
    cut = compress(
        model.params, full.cache, None, config=model.config, policy=lk.make_policy("keydiff"),
        budget=8, slots=128,
    ).cache  # fmt: skip
    assert cut.k.dtype == jnp.int8
    assert np.asarray(cut.length).max() == 8
    for layer, row, head in np.ndindex(*cut.length.shape):
        pos = np.asarray(cut.pos)[layer, row, head, :8]
        for name in ("k", "v", "k_scale", "v_scale"):
            before, after = (np.asarray(getattr(c, name)) for c in (full.cache, cut))
            np.testing.assert_array_equal(
                after[layer, row, head, :8], before[layer, row, head, pos]
            )


def test_rows_of_a_block_see_each_other_as_the_cache_will_hold_them():
    """A chain of four rows at once, and one after the other; floats beside it as a control."""
    model = tiny_model()
    tokens = tiny.batch((4, 4, 4), model.config, seed=5)[:, :4]

    @jax.jit
    def run(cache, tokens):
        steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        positions = cache.next_pos[:, None] + steps
        block = lk.Block(
            lk.embed(model.params, tokens, config=model.config), positions, cache.rope_span
        )
        out = lk.forward(model.params, block, cache, config=model.config)
        path = jnp.broadcast_to(steps, tokens.shape)
        count = jnp.full(len(tokens), tokens.shape[1], jnp.int32)
        entries = Entries(out.k, out.v, positions, path, count, out.k_scale, out.v_scale)
        return out.hidden, commit(cache, entries)

    together, after = run(read("snapkv", 24).cache, tokens)
    cache, apart = read("snapkv", 24).cache, []
    for i in range(4):
        hidden, cache = run(cache, tokens[:, i : i + 1])
        apart.append(hidden)
    assert after.k.dtype == cache.k.dtype == jnp.int8
    np.testing.assert_array_equal(after.pos, cache.pos)
    # A sum in another order may round a number at a boundary to the neighbour: rarely.
    assert (np.asarray(after.k) != np.asarray(cache.k)).mean() < 1e-3
    errors = np.abs(np.asarray(together) - np.asarray(jnp.concatenate(apart, axis=1)))
    size = np.abs(np.asarray(together)).max()
    floats, _ = run(read("snapkv", 24, None).cache, tokens)
    rounding = np.abs(np.asarray(together) - np.asarray(floats)).max()
    assert rounding > 1e-3 * size
    assert np.median(errors) < 1e-6 * size
    assert errors.max() < 0.2 * rounding


@pytest.mark.parametrize(
    ("drafter", "options"),
    [
        ("trie", {"policy": "snapkv", "sampling": lk.Sampling(temperature=0.8, top_k=20)}),
        ("early_exit", {"policy": "h2o", "evict_every": 4}),
    ],
    ids=["sampled", "greedy and evicted"],
)
def test_drafting_changes_nothing(drafter, options):
    """Near-ties of int8 are wider: at a boundary a different order of a sum moves a number by 1."""
    model, prompts = tiny_model(), tiny.prompts((60, 33, 17))
    options = {**options, "policy": lk.make_policy(options["policy"])}
    run = partial(
        lk.generate, model, prompts, budget=24, max_new_tokens=12, seeds=[7, 8, 9],
        cache_dtype="int8", **options,
    )  # fmt: skip
    plain, drafted = run(), run(drafter=drafter, draft_nodes=Shared(8))
    assert drafted.cache.bytes == plain.cache.bytes
    for row, (mine, theirs) in enumerate(zip(drafted.tokens, plain.tokens, strict=True)):
        if "evict_every" in options:
            assert mine == theirs
            continue
        decision = partial(
            tiny.decision, model.params, model.config, prompts[row], policy=options["policy"],
            budget=24, sampling=options.get("sampling", lk.Sampling()), seed=7 + row,
            new_tokens=12, cache_dtype="int8",
        )  # fmt: skip
        tiny.same_tokens(mine, theirs, decision, tie=1e-3)


@pytest.mark.slow
def test_an_engine_answers_as_generate_does():
    """Rows of several requests, a document after which questions are read, and the store."""
    model, prompts = tiny_model(), tiny.prompts((60, 33, 17))
    policy, settings = lk.make_policy("snapkv"), dict(budget=24, cache_dtype="int8")
    engine = lk.Engine(
        model, policy=policy, rows=2, max_new_tokens=24, max_prompt_tokens=64,
        max_question_tokens=16, prompt_store_bytes=10**6, **settings,
    )  # fmt: skip
    results = engine.run([lk.Request(prompt=p, max_new_tokens=24) for p in prompts])
    alone = lk.generate(model, prompts, policy=policy, max_new_tokens=24, **settings)
    for result, tokens in zip(results, alone.tokens, strict=True):
        assert result.tokens == tokens
    document = [lk.Request(prompt=prompts[2][:9], document=prompts[0], max_new_tokens=5)] * 2
    first, second = engine.run(document)
    asked = lk.generate(
        model, prompts[:1], questions=[prompts[2][:9]], policy=policy, max_new_tokens=5, **settings
    )
    assert first.tokens == second.tokens == asked.tokens[0]


def test_files_forks_and_bytes(tmp_path):
    cache, floats = read("snapkv", 24).cache, read("snapkv", 24, None)
    config, params = CONFIG, tiny.params(CONFIG)
    entries = config.num_layers * 3 * config.num_kv_heads * 128
    assert cache.bytes == entries * (2 * (config.head_dim + 4) + 4)
    assert floats.cache.bytes == entries * (2 * 4 * config.head_dim + 4)
    empty = empty_cache(config, 3, 128, jnp.int8, jnp.zeros(3, jnp.int32))
    assert jax.tree.map(jnp.shape, empty) == jax.tree.map(jnp.shape, cache)
    path = tmp_path / "cache.safetensors"
    lk.save_cache(path, cache, params=params)
    loaded = lk.load_cache(path, params=params, config=config)
    jax.tree.map(np.testing.assert_array_equal, loaded, cache)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        lk.load_cache(path, params=params, config=config)
    forked = cache.fork(2)
    np.testing.assert_array_equal(forked.k_scale[:, 1], cache.k_scale[:, 0])
    np.testing.assert_array_equal(forked.v[:, 3], cache.v[:, 1])


def test_what_an_int8_cache_cannot_do_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="cache_dtype='int4' is unknown"):
        lk.generate(model, [[1, 2]], cache_dtype="int4")
    with pytest.raises(ValueError, match="a reader chooses the type of its cache"):
        lk.generate(model, [[1, 2]], cache_dtype="int8", reader=lambda *a, **k: None)
