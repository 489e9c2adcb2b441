"""The loss of lookahead tokens that stay in the cache: what they restore for the response.

The unchanged model reads the response once more, behind the entries that the policy would keep now
and the tokens' own keys and values. The loss is the KL divergence of its next tokens from those
behind the whole prompt. The selection has no gradient: gradients reach the tokens through their
keys and values alone.
Letters: B batch, T prompt, Y response, M lookahead tokens, K KV heads, H head dim, V vocabulary.
Source: RestoreKV (arXiv 2608.01247), which adds the reverse divergence and cuts by KVzip's scores.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.context import Context
from lookahead_jax.model.decoder import Block, embed, logits
from lookahead_jax.model.layer_attention import LayerKind
from lookahead_jax.model.layers import rms_norm
from lookahead_jax.model.params import Params
from lookahead_jax.model.rope import rope_tables
from lookahead_jax.policies.lookaheadkv import LookaheadKV
from lookahead_jax.policies.selection import select
from lookahead_jax.policies.view import LayerView, Queries
from lookahead_jax.prefilling.layer_pass import observe_layer
from lookahead_jax.prefilling.prefill import LayerEntries, cut_layer

_TOKENS = 8  # of each response whose logits [B, tokens, V] exist at a time


def response_block(
    params: Params,
    responses: Int[Array, "B Y"],
    first: Int[Array, " B"],
    span: Int[Array, " B"],
    *,
    config: ModelConfig,
) -> Block:
    """Responses, right-padded with -1, as rows at the positions from `first` on."""
    steps = first[:, None] + jnp.arange(responses.shape[1], dtype=jnp.int32)[None]
    return Block(
        x=embed(params, responses, config=config),
        positions=jnp.where(responses >= 0, steps, -1),
        rope_span=span,
    )


class Reading:
    """Responses on their way through the layers, behind a cut prompt and its memory.

    Row b is cut to one of `budgets`; which one depends on its place and on the batch's lengths, so
    a batch has all of them in turn.
    """

    def __init__(
        self,
        params: Params,
        responses: jax.Array,  # [B, Y] int32
        length: jax.Array,  # [B] int32 tokens of the prompts
        *,
        tokens: int,
        policy: LookaheadKV,
        budgets: Sequence[int],
        config: ModelConfig,
    ):
        self.config, self.policy, self.length = config, policy, length
        # The memory's positions are those behind the prompt.
        self.block = response_block(params, responses, length + tokens, length, config=config)
        self.rope = rope_tables(config, self.block.positions, length)
        drawn = drawn_budgets(length, budgets)
        self.layer_budget = jnp.minimum(drawn - tokens, length)
        self.least, self.most = min(budgets) - tokens, max(budgets) - tokens

    def advance(
        self, p: Params, rows: jax.Array, kind: LayerKind, *, context: Context, queries: Queries
    ) -> jax.Array:
        """One layer; `queries` are those of the lookahead tokens in it, with keys and values."""
        if queries.own is None or queries.own_v is None:
            raise ValueError("a memory needs the lookahead tokens' keys and values")
        kept = jax.lax.stop_gradient(
            self._kept(p, kind, *jax.lax.stop_gradient((context, queries)))
        )
        own_pos = queries.pos[:, None]
        entries = Context(
            jnp.concatenate([kept.k, queries.own[0]], axis=2),
            jnp.concatenate([kept.v, queries.own_v], axis=2),
            jnp.concatenate(
                [kept.pos, jnp.broadcast_to(own_pos, (*kept.pos.shape[:2], own_pos.shape[2]))],
                axis=2,
            ),
        )
        return _read(self.config, (self.block, self.rope), (p, kind), rows, entries)

    def _kept(self, p: Params, kind: LayerKind, context: Context, queries: Queries) -> LayerEntries:
        """What the policy keeps of a layer now."""
        view = LayerView.of(
            context, kind, length=self.length, span=self.length, config=self.config,
            queries=queries, sink_logits=p.get("sinks"), o=p["o"],
        )  # fmt: skip
        # The budget decides on the window, which fits into the least of them.
        kept = select(
            self.policy, view, self.policy.score(view), budget=self.least,
            layer_budget=self.layer_budget, limit=self.most,
        )  # fmt: skip
        return cut_layer(view, kept, self.most)


def drawn_budgets(length: Int[Array, " B"], budgets: Sequence[int]) -> Int[Array, " B"]:
    """The budget of each row of a batch of prompts with `length` tokens."""
    place = jnp.arange(length.shape[0], dtype=jnp.int32) + length.sum(dtype=jnp.int32)
    return jnp.asarray(budgets, jnp.int32)[place % len(budgets)]


# Only the rows between the layers are kept for the backward pass.
@partial(jax.checkpoint, static_argnums=0)
def _read(config, block_and_rope, layer, rows, entries):
    (block, rope), (p, kind) = block_and_rope, layer
    return observe_layer(
        p, rows, block, rope, kind, context=entries, lora=None, config=config
    )[0]  # fmt: skip


def next_token_divergence(
    params: Params,
    full: Float[Array, "B Y D"],
    cut: Float[Array, "B Y D"],
    answered: Int[Array, " B"],
    *,
    config: ModelConfig,
) -> Float[Array, " B"]:
    """KL(full || cut) of the next token, the mean over a response's tokens but the last.

    `full` and `cut` are the last layer's output at the response's tokens, of which there are
    `answered`; 0 for a response without a second token. Differentiable in `cut` alone.
    """
    width = full.shape[1]
    size = min(_TOKENS, width)
    counted = jnp.arange(width)[None] < answered[:, None] - 1
    share = counted.astype(jnp.float32) / jnp.maximum(answered[:, None] - 1, 1).astype(jnp.float32)

    def parts(a):  # [B, Y, ...] -> [chunks, B, size, ...]
        a = jnp.pad(a, [(0, 0), (0, -width % size), *[(0, 0)] * (a.ndim - 2)])
        return a.reshape(a.shape[0], -1, size, *a.shape[2:]).swapaxes(0, 1)

    def log_chances(x):
        hidden = rms_norm(x, params["final_norm"], config=config)
        return jax.nn.log_softmax(logits(params, hidden, config=config), axis=-1)

    def part(full, cut, share):
        target = log_chances(full)

        def total(cut):
            kl = (jnp.exp(target) * (target - log_chances(cut))).sum(-1)
            kl = jnp.where(share > 0, kl * share, 0.0).sum(-1)
            return kl.sum(), kl

        (_, values), gradient = jax.value_and_grad(total, has_aux=True)(cut)
        return values, gradient

    fixed = jax.lax.stop_gradient((full, cut))
    values, gradients = jax.lax.map(lambda a: part(*a), tuple(map(parts, (*fixed, share))))
    # The gradient is computed with the value, so that no logits are kept or computed again.
    gradients = gradients.swapaxes(0, 1).reshape(full.shape[0], -1, full.shape[2])[:, :width]
    along = gradients.astype(jnp.float32) * (cut - fixed[1]).astype(jnp.float32)
    return values.sum(0) + along.sum((1, 2))
