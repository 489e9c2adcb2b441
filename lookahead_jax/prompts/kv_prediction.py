"""KV Prediction: a small model reads the prompt; its keys and values are mapped to the base's.

Source: arXiv 2410.08391. Layer l of the base takes layer floor(l * La / L) of the small, auxiliary
model. Keys are mapped before the key norm and RoPE, which the base then applies itself. The base
reads only the prompt's last token. This is lossy: it trades quality for a faster first token.
"""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from lookahead_jax.checkpoints.hf_files import read_json
from lookahead_jax.checkpoints.load import Model, first_layers, load
from lookahead_jax.host.files import atomic_write, load_arrays, save_arrays
from lookahead_jax.model.cache import SLOT_MULTIPLE, KVCache, round_up
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import embed, scan_layers
from lookahead_jax.model.jit import program
from lookahead_jax.model.layer_attention import layer_kinds
from lookahead_jax.model.layers import linear, optional_norm
from lookahead_jax.model.params import Params
from lookahead_jax.model.rope import apply_rope, rope_tables
from lookahead_jax.model.sharding import mesh_of
from lookahead_jax.prefilling.layer_pass import layer_buffers, prompt_layer, prompt_layout
from lookahead_jax.prefilling.prefill import Prefilled, extend


@struct.dataclass
class KVMaps:
    """The linear maps; A = K * H of the auxiliary model, B = K * H of the base."""

    k: jax.Array  # [L, A, B]
    v: jax.Array  # [L, A, B]


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A small model that reads prompts for a base: `generate(..., reader=)`."""

    base: Model
    aux: Model
    maps: KVMaps

    def __call__(
        self, tokens: jax.Array, new_tokens: int, known_tokens: int | jax.Array = 0
    ) -> Prefilled:
        """Prompts int32 [B, T], padded with -1; `new_tokens` will follow at most.

        Of those `known_tokens` (int or int32 [B]) are known: a question (see model/rope.py).
        """
        return prefill_predicted(
            self.base.params, tokens, self.maps, config=self.base.config,
            aux_params=self.aux.params, aux_config=self.aux.config, new_tokens=new_tokens,
            known_tokens=known_tokens,
        )  # fmt: skip


def save_maps(folder: Path, maps: KVMaps, aux: str | None, aux_layers: int | None) -> None:
    """Writes the maps and the small model they are for.

    `aux` is its name (None: the base itself), `aux_layers` how many of its layers are used (None:
    all).
    """
    atomic_write(folder / "aux.json", json.dumps({"aux": aux, "layers": aux_layers}) + "\n")
    save_arrays(folder / "maps.npz", k=np.asarray(maps.k), v=np.asarray(maps.v))


def load_predictor(folder: Path, base: Model) -> Predictor:
    """The predictor that `save_maps` wrote, for the base it was trained for, on the base's mesh.

    Raises ValueError if a file was not written by `save_maps` or the maps do not fit the models,
    FileNotFoundError without aux.json, and what `load` raises for the small model.
    """
    name, layers = _read_about(folder)
    # One program reads the results of both models, so both must be on the same devices.
    aux = base if name is None else load(name, mesh=mesh_of(base.params))
    if layers is not None:
        aux = first_layers(aux, layers)
    arrays = load_arrays(folder / "maps.npz")
    shapes = {part: array.shape for part, array in arrays.items()}
    expected = dict.fromkeys("kv", _shape(base.config, aux.config))
    if shapes != expected:
        raise ValueError(
            f"{folder}: maps of shapes {shapes} do not fit {base.path} and {aux.path}, which need "
            f"{expected}"
        )
    return Predictor(base, aux, KVMaps(k=jnp.asarray(arrays["k"]), v=jnp.asarray(arrays["v"])))


def _read_about(folder: Path) -> tuple[str | None, int | None]:
    """The small model (None: the base) and how many of its layers (None: all)."""
    about = read_json(folder, "aux.json")
    if about is None:
        raise FileNotFoundError(f"{folder}: has no aux.json, so it holds no maps")
    match about:
        case {"aux": str() | None as aux, "layers": int() | None as layers}:
            return aux, layers
    raise ValueError(f"{folder / 'aux.json'}: expected `aux` and `layers`, got {about}")


class PlainKV(NamedTuple):
    """Keys before norm and RoPE, and values, of whole prompts."""

    k: jax.Array  # [L, B, T, K * H]
    v: jax.Array  # [L, B, T, K * H]


def _shape(base: ModelConfig, aux: ModelConfig) -> tuple[int, int, int]:
    """L, A, B of the maps between two models."""
    inputs, outputs = (model.num_kv_heads * model.head_dim for model in (aux, base))
    return base.num_layers, inputs, outputs


def init_maps(key: jax.Array, base: ModelConfig, aux: ModelConfig) -> KVMaps:
    """Float32 maps to start training from: random and of unit gain, or the identity.

    The identity if both models have the same width K * H.
    """
    shape = _shape(base, aux)
    _, inputs, outputs = shape
    if inputs == outputs:
        eye = jnp.broadcast_to(jnp.eye(inputs, dtype=jnp.float32), shape)
        return KVMaps(k=eye, v=jnp.copy(eye))  # two buffers: training donates both
    k, v = (jax.random.normal(part, shape, jnp.float32) for part in jax.random.split(key))
    return KVMaps(k=k / inputs**0.5, v=v / inputs**0.5)


@program(static_argnames=("config",))
def plain_kv(params: Params, tokens: Int[Array, "B T"], *, config: ModelConfig) -> PlainKV:
    """A model's keys and values of a right-padded batch of prompts, before key norm and RoPE."""
    width = tokens.shape[1]
    tokens, prompt = prompt_layout(tokens, 0, None, config)
    x = embed(params, tokens, config=config)

    def step(carry, inputs):
        p, _, kind = inputs
        x, buffers = carry
        inner = optional_norm(p, "attn_norm", x, config=config)
        k, v = (linear(p, name, inner).reshape(*x.shape[:2], -1)[:, :width] for name in "kv")
        read = prompt_layer(p, x, buffers, prompt, kind, policy=None, config=config)
        return (read.x, read.buffers), PlainKV(k, v)

    carry = (x, layer_buffers(prompt, x.dtype, config))
    return scan_layers(step, carry, params["layers"], None, layer_kinds(config))[1]


def predict(maps: KVMaps, aux: PlainKV) -> PlainKV:
    """The base's keys and values, predicted from the auxiliary model's."""
    layers, given = maps.k.shape[0], aux.k.shape[0]
    source = jnp.arange(layers) * given // layers
    k, v = (
        jnp.einsum("lbta,lac->lbtc", have[source].astype(jnp.float32), by)
        for have, by in ((aux.k, maps.k), (aux.v, maps.v))
    )
    return PlainKV(k, v)


def prediction_loss(maps: KVMaps, aux: PlainKV, base: PlainKV, valid: jax.Array) -> jax.Array:
    """Mean absolute error of keys and values over `valid` [B, T], relative to their mean size."""
    losses = []
    for guess, true in zip(predict(maps, aux), base, strict=True):
        true, mask = true.astype(jnp.float32), valid[None, :, :, None]
        error = jnp.where(mask, jnp.abs(guess - true), 0.0).sum((1, 2, 3))
        size = jnp.where(mask, jnp.abs(true), 0.0).sum((1, 2, 3))
        losses.append((error / size).mean())
    return (losses[0] + losses[1]) / 2


@program(static_argnames=("config", "slots"))
def predicted_cache(
    params: Params,
    maps: KVMaps,
    aux: PlainKV,
    length: Int[Array, " B"],
    known_tokens: int | Int[Array, ""] | Int[Array, " B"],
    *,
    config: ModelConfig,
    slots: int,
) -> KVCache:
    """The base's predicted cache of all prompt tokens except each row's last."""
    kv = predict(maps, aux)
    layers, batch, width = kv.k.shape[:3]
    slots = round_up(slots, SLOT_MULTIPLE)
    step = jnp.arange(width, dtype=jnp.int32)[None]
    positions = jnp.where(step < length[:, None] - 1, step, -1)
    span = length + jnp.asarray(known_tokens, jnp.int32)
    cos, sin = rope_tables(config, positions, span)
    dtype = params["embed"].dtype

    def layer(inputs):
        k, v, p, kind = inputs
        k, v = (
            a.reshape(batch, width, config.num_kv_heads, config.head_dim).astype(dtype)
            for a in (k, v)
        )
        k = optional_norm(p, "k_norm", k, config=config)
        interleaved = config.rope_interleaved
        k = apply_rope(k, cos[kind.rope], sin[kind.rope], interleaved=interleaved)
        room = [(0, 0), (0, 0), (0, slots - width), (0, 0)]
        return jnp.pad(k.swapaxes(1, 2), room), jnp.pad(v.swapaxes(1, 2), room)

    k, v = jax.lax.map(layer, (kv.k, kv.v, params["layers"], layer_kinds(config)))
    shape = (layers, batch, config.num_kv_heads)
    pos = jnp.pad(positions, [(0, 0), (0, slots - width)], constant_values=-1)
    return KVCache(
        k=k,
        v=v,
        pos=jnp.broadcast_to(pos[None, :, None], (*shape, slots)),
        length=jnp.broadcast_to((length - 1)[None, :, None], shape),
        next_pos=length - 1,
        rope_span=span,
    )


def prefill_predicted(
    params: Params,
    tokens: Int[Array, "B T"],
    maps: KVMaps,
    *,
    config: ModelConfig,
    aux_params: Params,
    aux_config: ModelConfig,
    new_tokens: int,
    known_tokens: int | jax.Array = 0,
) -> Prefilled:
    """Reads prompts int32 [B, T], padded with -1, with the small model, and evicts nothing.

    The base's layers must be stacked, as `load` returns them.
    """
    length = (tokens >= 0).sum(1, dtype=jnp.int32)
    aux = plain_kv(aux_params, tokens, config=aux_config)
    cache = predicted_cache(
        params, maps, aux, length, known_tokens, config=config, slots=tokens.shape[1] + new_tokens
    )
    last = jnp.take_along_axis(tokens, (length - 1)[:, None], axis=1)
    cache, logits = extend(params, last, cache, config=config)
    return Prefilled(cache, logits, None)
