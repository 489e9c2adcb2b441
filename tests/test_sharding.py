"""Placement rules, and the same logits from four devices as from one."""

import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as PS

from lookahead_jax.checkpoints.hf_config import config_from_hf
from lookahead_jax.checkpoints.load import load
from lookahead_jax.model import decoder as lm
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.model.params import init_params
from lookahead_jax.model.sharding import (
    batch_sharding,
    make_mesh,
    on_its_mesh,
    param_shardings,
    partition_spec,
)

MODELS = Path(__file__).parent / "fixtures" / "models"


def config(**fields):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    return config_from_hf({"model_type": "llama"} | sizes | heads | fields)


def test_functions_of_a_model_run_under_its_mesh():
    mesh = make_mesh(tensor=2)
    params = jax.device_put(
        init_params(jax.random.key(0), config(), jnp.float32), param_shardings(config(), mesh)
    )

    @on_its_mesh
    def axes(model):
        return jax.sharding.get_abstract_mesh().shape_tuple

    assert axes(SimpleNamespace(params=params)) == tuple(mesh.shape.items())
    alone = jax.device_put(params, jax.devices()[0])
    assert axes(SimpleNamespace(params=alone)) == ()


def test_mesh_axes_are_auto_and_data_takes_the_rest():
    mesh = make_mesh(tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "expert": 1, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(make_mesh(devices=jax.devices()[:1]).shape.values()) == {1}


@pytest.mark.parametrize(
    "sizes", [{"tensor": 3}, {"data": 1}, {"tensor": 8}, {"fsdp": 0}, {"data": -2, "fsdp": -2}]
)
def test_mesh_must_use_all_devices(sizes):
    with pytest.raises(ValueError, match="exactly the 4 devices"):
        make_mesh(**sizes)


def test_rules():
    mesh = make_mesh(fsdp=2, tensor=2)
    specs = jax.tree.map(lambda s: s.spec, param_shardings(config(), mesh))
    assert specs["embed"] == PS("tensor", "fsdp")
    assert specs["layers"]["q"] == PS(None, "fsdp", "tensor", None)
    assert specs["layers"]["k_bias"] == PS(None, "tensor", None)
    assert specs["layers"]["o"] == PS(None, "tensor", None, "fsdp")
    assert specs["layers"]["down"] == PS(None, "tensor", "fsdp")
    assert batch_sharding(mesh).spec == PS(("data", "fsdp"))


def test_a_mesh_without_some_axes_splits_less():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "tensor"))
    assert partition_spec(("embed", "mlp", None), mesh) == PS(None, "tensor", None)
    assert batch_sharding(mesh).spec == PS("data")


def test_unknown_logical_axis():
    with pytest.raises(ValueError, match="unknown logical axis 'time'"):
        partition_spec(("batch", "time"), make_mesh())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 1}, "kv_heads has size 1, not a multiple of 4"),
        ({"intermediate_size": 50}, "mlp has size 50, not a multiple of 4"),
        ({"vocab_size": 61}, "vocab has size 61"),
    ],
)
def test_indivisible_sizes(fields, message):
    with pytest.raises(ValueError, match=message):
        param_shardings(config(**{"num_key_value_heads": 4} | fields), make_mesh(tensor=4))


def test_fingerprint_does_not_depend_on_placement():
    sharded = load(MODELS / "qwen2", mesh=make_mesh(fsdp=2, tensor=2)).params
    assert fingerprint(sharded) == fingerprint(load(MODELS / "qwen2").params)


@functools.partial(jax.jit, static_argnames="config")
def full_logits(params, tokens, *, config):
    valid = tokens >= 0
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    block = lm.Block(
        x=lm.embed(params, tokens, config=config),
        positions=jnp.where(valid, columns, -1),
        rope_span=valid.sum(-1, dtype=jnp.int32),
    )
    return lm.logits(params, lm.forward(params, block, None, config=config).hidden, config=config)


@pytest.mark.parametrize("name", ["llama3", "gemma3", "phi3", "qwen2_window", "olmo2"])
@pytest.mark.parametrize("axes", [{"tensor": 2}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_four_devices_give_the_logits_of_one(name, axes):
    """Float32 sums in another order: the tolerance of the parity test."""
    with np.load(MODELS / name / "golden.npz") as file:
        tokens = file["tokens"]
    tokens = np.concatenate([tokens, tokens[:1]])  # four rows divide by data x fsdp
    single = load(MODELS / name)
    expected = full_logits(single.params, tokens, config=single.config)
    mesh = make_mesh(**axes)
    model = load(MODELS / name, mesh=mesh)
    assert len(model.params["layers"]["gate"].sharding.device_set) == 4
    got = full_logits(
        model.params, jax.device_put(tokens, batch_sharding(mesh)), config=model.config
    )
    valid = tokens >= 0
    error = np.abs(np.asarray(got) - np.asarray(expected))[valid].max()
    assert error <= 1e-5 * np.abs(np.asarray(expected)[valid]).max()
