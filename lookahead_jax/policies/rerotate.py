"""rerotate: any policy, and the kept entries move together to the positions 0, 1, 2, ..."""

import dataclasses

import jax
import jax.numpy as jnp

from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.layer_attention import layer_kinds
from lookahead_jax.model.quantization import quantize_entries
from lookahead_jax.model.rope import apply_rope, inverse_frequencies
from lookahead_jax.policies.base import Policy, WithCuts
from lookahead_jax.policies.full import Full
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.policies.wrapper import PolicyWrapper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rerotate(PolicyWrapper):
    """Keeps what another policy keeps, without the gaps between the entries' positions.

    The text goes on where the fullest head ends, at C and not at the length of the prompt, so that
    what follows a long prompt is within the positions that the model knows; the prompt itself is
    read at its own, and limits count these. The last entry of every head is right before the text
    that follows. (StreamingLLM, arXiv 2309.17453, section 3.2, and the rerotation press of kvpress,
    which needs heads of equal size.)

    `Generation.kept` has the new positions. Entries are not evicted while decoding: such cuts come
    at fixed positions of the text.
    """

    inner: Policy = dataclasses.field(default_factory=SnapKV)
    """The policy that chooses the entries."""

    def why_not(self, policy: Policy) -> str | None:
        if isinstance(policy, Full):
            return "it leaves no gaps"
        if isinstance(policy, Rerotate):
            return "it moves entries itself"
        if isinstance(policy.reading, WithCuts):
            return "its cuts come at fixed positions of the text"
        return None

    @property
    def decode_cut(self) -> None:
        return None

    @property
    def renumbers(self) -> bool:
        return True

    def arrange(self, cache: KVCache, config: ModelConfig) -> KVCache:
        return renumbered(self.inner.arrange(cache, config), config)


def renumbered(cache: KVCache, config: ModelConfig) -> KVCache:
    """A cache whose entries have consecutive positions, their keys turned accordingly.

    The head with the most entries starts at 0, and all heads of a row end together. An int8 cache
    rounds its keys once more.
    """
    length = cache.length.max((0, 2))
    first = length[None, :, None] - cache.length
    slot = jnp.arange(cache.slots, dtype=jnp.int32)[None, None, None]
    pos = jnp.where(cache.pos >= 0, first[..., None] + slot, -1)
    turns = jnp.where(cache.pos >= 0, pos - cache.pos, 0)
    # Not `rope_tables`: the keys have the attention factor of their rope already.
    frequencies = jnp.stack([inverse_frequencies(r, cache.rope_span)[0] for r in config.ropes])

    def turn(layer):
        k, scale, turns, rope = layer
        batch, heads, slots, width = k.shape
        angles = turns[..., None].astype(jnp.float32) * frequencies[rope][:, None, None]
        angles = angles.reshape(batch * heads, slots, -1)
        x = k if scale is None else k.astype(jnp.float32) * scale[..., None]
        x = x.reshape(batch * heads, slots, 1, width)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        x = apply_rope(x, cos, sin, interleaved=config.rope_interleaved)
        x = x.reshape(batch, heads, slots, width)
        return (x, None) if scale is None else quantize_entries(x)

    # One layer at a time: cosines and sines are as large as its keys in float32.
    k, scale = jax.lax.map(turn, (cache.k, cache.k_scale, turns, layer_kinds(config).rope))
    return dataclasses.replace(cache, k=k, k_scale=scale, pos=pos, next_pos=length)
