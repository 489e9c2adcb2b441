"""Mixtures of experts: the sum over experts, its placement, its files, and all that runs on it.

tests/test_parity.py compares the logits of each family with transformers.
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from lookahead_jax.checkpoints.hf_config import config_from_hf
from lookahead_jax.checkpoints.load import first_layers, load, save_params
from lookahead_jax.decoding.sampling import GREEDY, Sampling
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.generation.generate import generate
from lookahead_jax.model import experts
from lookahead_jax.model.config import ExpertsConfig
from lookahead_jax.model.sharding import make_mesh, param_shardings
from lookahead_jax.modules.definition import LookaheadConfig, init_modules
from lookahead_jax.policies.registry import POLICIES, make_policy
from lookahead_jax.policies.wrapper import PolicyWrapper
from lookahead_jax.train.batches import Batch
from lookahead_jax.train.lookahead import MeshConfig
from lookahead_jax.train.step import compile_step, init_state, train_step
from tests import tiny

MODELS = Path(__file__).parent / "fixtures" / "models"
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")
D, F = 8, 12


def mixture(count, per_token, *, normalise=True, clamped=False):
    """A model with small experts; the clamped ones have biases."""
    config = load_config("mixtral")
    mixed = ExpertsConfig(
        count=count, per_token=per_token, normalise=normalise, bias=clamped,
        clamp=(1.7, 2.0) if clamped else None,
    )  # fmt: skip
    return dataclasses.replace(config, hidden_size=D, mlp_dim=F, experts=mixed)


def load_config(name):
    return config_from_hf(json.loads((MODELS / name / "config.json").read_text()))


def weights(count, *, biased=False):
    rng = np.random.default_rng(0)
    shapes = {"router": (D, count), "gate": (count, D, F), "up": (count, D, F)}
    shapes["down"] = (count, F, D)
    if biased:
        shapes |= {f"{name}_bias": (*s[:-2], s[-1]) for name, s in shapes.items()}
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}


def restated(p, x, config):
    """Each row by itself, in float64."""
    p = {name: np.asarray(a, np.float64) for name, a in p.items()}
    rows, out = np.asarray(x, np.float64).reshape(-1, D), []

    def linear(name, x, *at):
        return x @ p[name][at] + (p[f"{name}_bias"][at] if f"{name}_bias" in p else 0.0)

    for row in rows:
        share = np.exp(linear("router", row))
        share /= share.sum()
        chosen = np.argsort(-share)[: config.experts.per_token]
        scale = share[chosen].sum() if config.experts.normalise else 1.0
        total = np.zeros(D)
        for e in chosen:
            gate, up = linear("gate", row, e), linear("up", row, e)
            if config.experts.clamp is None:
                hidden = gate / (1 + np.exp(-gate)) * up
            else:
                alpha, limit = config.experts.clamp
                gate = np.where(gate > limit, limit, gate)
                up = np.where(abs(up) > limit, np.sign(up) * limit, up)
                hidden = gate / (1 + np.exp(-alpha * gate)) * (up + 1)
            total += share[e] / scale * linear("down", hidden, e)
        out.append(total)
    return np.reshape(out, x.shape)


def rows(shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*shape, D)), jnp.float32)


MIXTURES = [(5, 2, True, False), (6, 1, False, False), (3, 3, True, True)]
SHAPES = [(1, 1), (2, 1), (3, 40)]
PLATFORMS = ["cpu", "tpu"]  # "tpu": the form with ragged_dot


@pytest.mark.parametrize(  # all pairs
    ("platform", "shape", "sizes"),
    [
        pytest.param(
            PLATFORMS[(i + j) % 2], shape, sizes, id=f"{PLATFORMS[(i + j) % 2]}-{shape}-{sizes}"
        )
        for i, shape in enumerate(SHAPES)
        for j, sizes in enumerate(MIXTURES)
    ],
)
def test_the_sum_over_experts(monkeypatch, platform, shape, sizes):
    """Float32 against float64: 1e-5 of the largest value."""
    count, per_token, normalise, clamped = sizes
    monkeypatch.setattr(experts, "target_platform", lambda: platform)
    config = mixture(count, per_token, normalise=normalise, clamped=clamped)
    p, x = weights(count, biased=clamped), rows(shape)
    (got,) = jax.jit(lambda x: experts.experts_mlp(p, [x], [None], config=config))(x)
    expected = restated(p, x, config)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_streams_are_computed_together():
    config, p, xs = mixture(5, 2), weights(5), [rows((2, 4)), rows((2, 1), seed=2)]
    run = jax.jit(lambda xs: experts.experts_mlp(p, xs, [None] * 2, config=config))
    for got, x in zip(run(xs), xs, strict=True):
        np.testing.assert_allclose(got, restated(p, x, config), atol=1e-4)


def test_a_row_does_not_depend_on_its_neighbours():
    """All of them the same expert's, NaN, or others: the same bits, wherever the row stands."""
    config, p, x = mixture(5, 2), weights(5), rows((3, 40))
    run = jax.jit(lambda x: experts.experts_mlp(p, [x], [None], config=config)[0])
    alone = np.asarray(run(x))[1, 7]
    for others in (jnp.broadcast_to(x[:1, :1], x.shape), jnp.full(x.shape, jnp.nan), x[::-1, ::-1]):
        np.testing.assert_array_equal(run(others.at[1, 7].set(x[1, 7]))[1, 7], alone)
    moved = run(x[:, ::-1])[1, -8]
    np.testing.assert_allclose(moved, alone, rtol=1e-6)


@pytest.mark.parametrize("axes", [{"expert": 2, "tensor": 2}, {"fsdp": 2, "expert": 2}], ids=str)
def test_values_and_gradients_over_a_mesh(axes):
    """As on one device, up to the order of float32 sums."""
    config, p, x = mixture(4, 2, clamped=True), weights(4, biased=True), rows((4, 6))

    def total(p, x):
        (out,) = experts.experts_mlp(p, [x], [None], config=config)
        return (out * jnp.arange(D, dtype=jnp.float32)[None, None]).sum(), out

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, expected), expected_grads = run(p, x)
    with jax.set_mesh(make_mesh(**axes)):
        (_, got), grads = run(p, x)
        text = run.lower(p, x).as_text()
    assert "shmap_body" in text or "manual" in text
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
    for one, other in zip(*map(jax.tree.leaves, (grads, expected_grads)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_of_a_checkpoint_are_spread_over_the_mesh(name):
    """Each device holds its experts alone, and the logits are those of one device."""
    from tests.test_parity import error, full_logits, golden

    mesh = make_mesh(expert=4)
    single = load(MODELS / name)
    count = len(single.params["layers"]["gate"][0])
    if count % 4:
        with pytest.raises(ValueError, match=f"expert has size {count}, not a multiple of 4"):
            param_shardings(single.config, mesh)
        mesh = make_mesh(expert=1, tensor=2, data=2)
    model = load(MODELS / name, mesh=mesh)
    gate = model.params["layers"]["gate"]
    assert len(gate.sharding.device_set) == 4
    assert {shard.data.shape[1] for shard in gate.addressable_shards} == {
        count // mesh.shape["expert"]
    }
    tokens, expected = golden(name)
    with jax.set_mesh(mesh):
        got = full_logits(model.params, tokens, config=model.config)
    for row, logits in enumerate(expected):
        assert error(got[row, : len(logits)], logits) <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_checkpoints_have_the_published_names(name, tmp_path):
    model = load(MODELS / name)
    save_params(tmp_path, model.params, model.config)
    original = {}
    for file in sorted((MODELS / name).glob("*.safetensors")):
        original |= load_file(file)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == original.keys()
    for tensor, values in saved.items():
        np.testing.assert_array_equal(values, original[tensor], err_msg=tensor)


@pytest.fixture
def fused(tmp_path):
    """A checkpoint whose experts are in one tensor per layer, and its tensors."""
    shutil.copy(MODELS / "mixtral_window" / "config.json", tmp_path)
    tensors = load_file(MODELS / "mixtral_window" / "model.safetensors")
    return tmp_path, tensors


def test_fused_experts_of_a_wrong_shape_are_refused(fused):
    folder, tensors = fused
    name = "model.layers.1.mlp.experts.gate_up_proj"
    save_file({**tensors, name: tensors[name][:3]}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"gate_up_proj has shape \(3, 96, 32\)"):
        load(folder)


def test_experts_that_are_there_twice_are_refused(fused):
    folder, tensors = fused
    twice = "model.layers.0.block_sparse_moe.gate.weight"
    tensors[twice] = tensors["model.layers.0.mlp.gate.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="are the same"):
        load(folder)


def mxfp4(folder, change):
    """The MXFP4 checkpoint with a changed layer 0; `change` edits its tensors."""
    shutil.copy(MODELS / "gpt_oss_mxfp4" / "config.json", folder)
    tensors = load_file(MODELS / "gpt_oss_mxfp4" / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_mxfp4_values_in_any_slice_and_type(tmp_path):
    """Every code and scale against a table in exact arithmetic, on a mesh that cuts blocks."""
    codes = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    tensors = load_file(MODELS / "gpt_oss_mxfp4" / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
    expected = np.zeros((*blocks.shape[:2], 64))
    for e, row, group, byte in np.ndindex(blocks.shape):
        scale = 2.0 ** (int(scales[e, row, group]) - 127)
        for half in (0, 1):
            code = blocks[e, row, group, byte] >> 4 if half else blocks[e, row, group, byte] & 15
            expected[e, row, group * 32 + 2 * byte + half] = codes[code] * scale
    expected = expected.swapaxes(1, 2)
    mesh = make_mesh(fsdp=4)  # 16 columns of D on each device: half a block
    layers = load(MODELS / "gpt_oss_mxfp4", mesh=mesh, dtype="bfloat16").params["layers"]
    assert layers["gate"].dtype == jnp.bfloat16
    for part, stored in enumerate(("gate", "up")):
        np.testing.assert_array_equal(
            np.asarray(layers[stored][0], np.float64), expected[:, :, part::2]
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.0.mlp.experts.down_proj_scales"), "is there without"),
        (
            lambda t: t.update(
                {"model.layers.0.mlp.experts.down_proj": np.zeros((3, 32, 64), "f4")}
            ),
            "are the same",
        ),
        (
            lambda t: t.update(
                {"model.layers.0.mlp.experts.down_proj_scales": np.zeros((3, 64, 2), np.uint8)}
            ),
            r"down_proj_scales has shape \(3, 64, 2\) and type U8, config.json calls for",
        ),
        (
            lambda t: t.update(
                {"model.layers.0.mlp.experts.down_proj_blocks": np.zeros((3, 64, 1, 16), "i4")}
            ),
            "type I32, config.json calls for .* and U8",
        ),
    ],
)
def test_malformed_mxfp4_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load(mxfp4(tmp_path, change))


def test_fused_experts_without_a_prefix_are_read(fused):
    """As a model without its head is saved; then the embedding serves as the head."""
    folder, tensors = fused
    tensors = {k.removeprefix("model."): v for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    whole = load(MODELS / "mixtral_window").params
    np.testing.assert_array_equal(load(folder).params["layers"]["up"], whole["layers"]["up"])


def test_a_lora_on_experts_is_left_out_or_refused():
    model = load_config("mixtral")
    wanted = LookaheadConfig(tokens=2, rank=2, alpha=2.0, targets=("q", "o", "gate"), init="normal")
    with pytest.warns(UserWarning, match="experts of a mixtral model take no LoRA: gate are left"):
        modules = init_modules(jax.random.key(0), wanted, model)
    assert modules.config.targets == ("q", "o") == tuple(modules.lora)
    with pytest.raises(ValueError, match=r"LoRA targets up, down: .* choose out of q, k, v, o"):
        init_modules(jax.random.key(0), dataclasses.replace(wanted, targets=("up", "down")), model)
    with pytest.raises(ValueError, match="experts take no LoRA"):
        experts.experts_mlp(weights(5), [rows((1, 1))], [{"down": {}}], config=mixture(5, 2))


# Every policy and every drafter on each family.
DRAFTERS = ("prompt_lookup", "recycling", "trie", "suffix", "draft_model")
SAMPLING = {"greedy": GREEDY, "sampled": Sampling(temperature=1.2, top_p=0.95)}
SMALL = {"window": 4, "chunk": 16, "tokens": 4, "lag_size": 4, "chunk_size": 4}
NEW = 10


# A family has one way to sample, so that its policies share the programs that decode.
CASES = [
    (family, policy, DRAFTERS[(i + j) % len(DRAFTERS)], tuple(SAMPLING)[i % len(SAMPLING)])
    for i, family in enumerate(FAMILIES)
    for j, policy in enumerate(
        name for name in POLICIES if name not in ("oracle", *tiny.NEEDS_SETTINGS)
    )
]
QUICK = ("gpt_oss", "lookaheadkv")  # sinks, biases and windows; the others compile for minutes


def marks_of(number, case):
    """The slow tests take each drafter with each family, and --full takes all.

    What experts compute does not depend on the policy, and the slow tests of test_families.py have
    every policy.
    """
    if case[:2] == QUICK:
        return []
    family, policy = divmod(number, len(CASES) // len(FAMILIES))
    return pytest.mark.full if (policy - family) % (len(DRAFTERS) + 1) else pytest.mark.slow


def test_slow_cases_cover_families_with_drafters():
    slow = [case for number, case in enumerate(CASES) if marks_of(number, case) != pytest.mark.full]
    assert {(case[0], case[2]) for case in slow} == {(f, d) for f in FAMILIES for d in DRAFTERS}


@functools.cache
def model_of(family):
    model = load(MODELS / family)
    sizes = LookaheadConfig(tokens=3, rank=2, alpha=2.0, targets=("q", "v"), init="table")
    modules = init_modules(jax.random.key(0), sizes, model.config, params=model.params)
    return model, modules


def policy_of(name):
    kind = POLICIES[name]
    fields = {field.name for field in dataclasses.fields(kind)}
    if issubclass(kind, PolicyWrapper):  # around snapkv
        fields.add("window")
    return make_policy(name, **{key: value for key, value in SMALL.items() if key in fields})


@functools.cache
def undrafted(family, policy, sampling):
    return continued(family, policy, sampling, "none")


def continued(family, policy, sampling, drafter):
    model, modules = model_of(family)
    if drafter == "draft_model":  # a level of its trees is a forward that is compiled
        drafter = make_drafter(drafter, model=first_layers(model, 1), depth=2)
    return generate(
        model, tiny.prompts((29, 20), vocab=95), policy=policy_of(policy), budget=12,
        max_new_tokens=NEW, sampling=SAMPLING[sampling], seeds=[3, 4], eos_ids=(),
        lookahead=modules if policy == "lookaheadkv" else None,
        drafts=model if policy == "speckv" else None, drafter=drafter,
        draft_nodes=None if drafter == "none" else 8, burst=NEW,
    ).tokens  # fmt: skip


@pytest.mark.parametrize(
    ("family", "policy", "drafter", "sampling"),
    [
        pytest.param(*case, marks=marks_of(number, case), id="-".join(case))
        for number, case in enumerate(CASES)
    ],
)
def test_drafted_tokens_are_undrafted_tokens(family, policy, drafter, sampling):
    drafted = continued(family, policy, sampling, drafter)
    assert drafted == undrafted(family, policy, sampling)
    assert all(len(set(row)) > 2 for row in drafted)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES],
)
def test_a_training_step(family):
    model, modules = model_of(family)
    optimizer = optax.sgd(0.02)
    prompts = tiny.batch((25, 16), model.config, seed=2)[None]
    responses = tiny.batch((4, 4), model.config, seed=3)[None, :, :4]
    step = jax.jit(functools.partial(train_step, config=model.config, optimizer=optimizer))
    state, values = step(model.params, init_state(modules, optimizer), Batch(prompts, responses))
    assert 0 < values["loss"] < np.inf
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.modules, modules)
    assert 0 < moved.embeddings < np.inf
    assert 0 < moved.lora["q"]["b"] < np.inf
    again = step(model.params, state, Batch(prompts, responses))[1]
    assert again["loss"] < values["loss"]


@pytest.mark.slow
def test_training_over_a_mesh_with_an_axis_of_experts():
    """--mesh.expert: the values of one device, up to the order of float32 sums."""
    one = load(MODELS / "gpt_oss")
    modules = LookaheadConfig(tokens=3, rank=2, alpha=4.0, targets=("q", "v"), init="table")
    optimizer = optax.sgd(0.5)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 90, (1, 4, 16)), jnp.int32)
    batch = Batch(tokens, tokens[..., :4])
    state = init_state(
        init_modules(jax.random.key(0), modules, one.config, params=one.params), optimizer
    )
    step = functools.partial(train_step, config=one.config, optimizer=optimizer)
    expected = jax.jit(step)(one.params, state, batch)[1]
    mesh = make_mesh(**dataclasses.asdict(MeshConfig(expert=2, tensor=2)))
    params = load(MODELS / "gpt_oss", mesh=mesh).params
    with jax.set_mesh(mesh):
        replicated = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
        run = compile_step(mesh, config=one.config, optimizer=optimizer)
        values = run(params, replicated, batch)[1]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(values[name], expected[name], rtol=1e-5)
