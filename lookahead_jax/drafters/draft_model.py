"""draft_model: a smaller model of the same vocabulary drafts a dynamic tree.

DySpec (Xiong et al. 2024, arXiv:2410.11744) in its threshold form, with the likeliest children
instead of drawn ones, since the target's choice decides. B batch, P nodes, W nodes a level.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.device_drafter import Verified, Weights
from lookahead_jax.decoding.tree import TokenTree, layout, root_only
from lookahead_jax.model.cache import Entries, KVCache, commit, empty_cache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, embed, forward, logits
from lookahead_jax.policies.full import Full
from lookahead_jax.prefilling.prefill import prefill


@struct.dataclass
class DraftCache:
    """The draft model's cache of all tokens but the root, and the pending accepted path."""

    cache: KVCache
    k: jax.Array  # [L, B, K, depth + 1, H]
    v: jax.Array  # [L, B, K, depth + 1, H]
    count: jax.Array  # [B] int32 valid entries of k and v

    def whole(self) -> KVCache:
        """The cache with the pending path; written before it is read, see step.decode_burst."""
        steps = jnp.arange(self.k.shape[3], dtype=jnp.int32)[None]
        path = jnp.broadcast_to(steps, (self.count.shape[0], steps.shape[1]))
        positions = self.cache.next_pos[:, None] + path
        return commit(self.cache, Entries(self.k, self.v, positions, path, self.count))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftModel:
    """A tree of the W likeliest paths per level, as long as they have a probability of 1 / P.

    W is the number that fills all nodes with `depth` levels. The draft model evicts nothing and
    runs once per level and once over the accepted path.
    """

    model: Model = dataclasses.field(compare=False, repr=False)
    depth: int = 7
    """Longest drafted path."""
    config: ModelConfig = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth={self.depth} must be at least 1")
        object.__setattr__(self, "config", self.model.config)

    @property
    def weights(self) -> Weights:
        return self.model.params

    def init(self, batch: int, room: int, config: ModelConfig) -> DraftCache:
        own = self.config
        if own.vocab_size != config.vocab_size:
            raise ValueError(
                f"the draft model has {own.vocab_size} tokens and the target {config.vocab_size}: "
                "they must share a tokenizer"
            )
        dtype = self.model.params["embed"].dtype
        rows = (own.num_layers, batch, own.num_kv_heads, self.depth + 1, own.head_dim)
        return DraftCache(
            empty_cache(own, batch, room, dtype, jnp.zeros(batch, jnp.int32)),
            jnp.zeros(rows, dtype), jnp.zeros(rows, dtype), jnp.zeros(batch, jnp.int32),
        )  # fmt: skip

    def begin(
        self, weights: Weights, state: DraftCache, rows: jax.Array, prompts: jax.Array
    ) -> DraftCache:
        cache = state.cache
        new = prefill(
            weights, prompts, config=self.config, policy=Full(), budget=0, slots=cache.slots
        ).cache
        put = partial(jax.tree.map, lambda old, row: old.at[rows].set(row))
        layered = partial(jax.tree.map, lambda old, row: old.at[:, rows].set(row))
        cache = KVCache(
            *layered(
                (cache.k, cache.v, cache.pos, cache.length), (new.k, new.v, new.pos, new.length)
            ),
            *put((cache.next_pos, cache.rope_span), (new.next_pos, new.rope_span)),
        )
        return dataclasses.replace(state, cache=cache, count=state.count.at[rows].set(0))

    def propose(
        self, weights: Weights, state: DraftCache, root: jax.Array, nodes: int
    ) -> tuple[DraftCache, TokenTree]:
        cache = state.whole()
        state = dataclasses.replace(state, cache=cache, count=jnp.zeros_like(state.count))
        tree = root_only(root)
        if nodes == 1:
            return state, tree
        depth = min(self.depth, nodes - 1)
        width = (nodes - 1) // depth
        value = jnp.zeros((root.shape[0], 1), jnp.float32)  # log probability of the newest level
        values = [value]
        for _ in range(depth):
            newest = value.shape[1]
            chances = self._successors(weights, cache, tree, newest) + value[..., None]
            best, token = jax.lax.top_k(chances, width)
            value, at = jax.lax.top_k(best.reshape(len(root), -1), width)
            token = jnp.take_along_axis(token.reshape(len(root), -1), at, axis=1)
            likely = value >= -jnp.log(jnp.float32(nodes))
            values.append(value)
            above = tree.tokens.shape[1] - newest + at // width
            tree = TokenTree(
                jnp.concatenate([tree.tokens, jnp.where(likely, token, -1)], axis=1),
                jnp.concatenate([tree.parents, above.astype(jnp.int32)], axis=1),
            )
        tree = best_first(tree, jnp.concatenate(values, axis=1))
        pad = [(0, 0), (0, nodes - tree.tokens.shape[1])]
        return state, jax.tree.map(lambda a: jnp.pad(a, pad, constant_values=-1), tree)

    def update(self, weights: Weights, state: DraftCache, verified: Verified) -> DraftCache:
        width = min(self.depth + 1, verified.tree.tokens.shape[1])
        path, count = verified.accepted.path[:, :width], verified.accepted.count
        tokens = jnp.take_along_axis(verified.tree.tokens, path, axis=1)
        steps = jnp.arange(width, dtype=jnp.int32)[None]
        cache = state.cache
        positions = jnp.where(steps < count[:, None], cache.next_pos[:, None] + steps, -1)
        block = Block(embed(weights, tokens, config=self.config), positions, cache.rope_span)
        out = forward(weights, block, cache, config=self.config)
        pad = [(0, 0), (0, 0), (0, 0), (0, self.depth + 1 - width), (0, 0)]
        return DraftCache(cache, jnp.pad(out.k, pad), jnp.pad(out.v, pad), count)

    def _successors(
        self, weights: Weights, cache: KVCache, tree: TokenTree, newest: int
    ) -> jax.Array:
        """Log probabilities [B, newest, V] after the last `newest` nodes; -inf after no node."""
        batch, size = tree.tokens.shape
        laid = layout(
            tree, vocab_size=self.config.vocab_size,
            most=jnp.full(batch, size, jnp.int32), ends=jnp.zeros((1, 0), jnp.int32),
        )  # fmt: skip
        positions = jnp.where(laid.valid, cache.next_pos[:, None] + laid.depth, -1)
        x = embed(weights, jnp.where(laid.valid, tree.tokens, -1), config=self.config)
        block = Block(x, positions, cache.rope_span, laid.ancestors)
        hidden = forward(weights, block, cache, config=self.config).hidden[:, size - newest :]
        chances = jax.nn.log_softmax(logits(weights, hidden, config=self.config), axis=-1)
        return jnp.where(laid.valid[:, size - newest :, None], chances, -jnp.inf)


def best_first(tree: TokenTree, value: jax.Array) -> TokenTree:
    """The nodes sorted by value [B, n]; a parent's is never below its child's."""
    order = jnp.argsort(-value, axis=1, stable=True)
    place = jnp.argsort(order, axis=1).astype(jnp.int32)
    parents = jnp.take_along_axis(tree.parents, order, axis=1)
    above = jnp.take_along_axis(place, jnp.maximum(parents, 0), axis=1)
    return TokenTree(
        jnp.take_along_axis(tree.tokens, order, axis=1), jnp.where(parents < 0, -1, above)
    )
