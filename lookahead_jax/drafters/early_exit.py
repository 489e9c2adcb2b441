"""early_exit: the target's own first layers, its final norm and its head draft a chain.

LayerSkip (Elhoushi et al. 2024, arXiv:2404.16710) drafts with the first layers and verifies with
all of them; DEL (Zarch et al. 2025, arXiv:2504.05598) chooses how many layers and tokens. Only
models that were trained to exit early gain much by it. Unlike there, verification runs the first
layers again, and a draft does not end where the head is unsure. B batch, P nodes, C exits.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from lookahead_jax.decoding.device_drafter import Target, Verified, Weights
from lookahead_jax.decoding.tree import TokenTree, chain, root_only
from lookahead_jax.host.integers import check_integer
from lookahead_jax.model.cache import Entries, commit
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, embed, forward, logits

PLAIN_EVERY = 8  # plain steps per one that learns; each would cost a product with the head more


@struct.dataclass
class Agreement:
    """How often each exit said what the target chose, with more weight on recent steps."""

    agreed: jax.Array  # [B, C] float32 tokens on which they agreed
    read: jax.Array  # [B] float32 tokens that the target chose
    running: jax.Array  # [B] bool rows that take part


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """A chain as long as it pays, by as many layers as pay.

    One exit and one length serve all rows of a step: those that promise the most tokens per layer
    run. The agreement of an exit comes from its shadow tokens: what the head says after its layers
    at each node that the target accepted. It is known without drafting, so a draft is made only
    where it pays, at first none. Of plain steps every eighth is compared.
    """

    layers: tuple[int, ...] | None = None
    """Numbers of layers to choose from, ascending. Default: a quarter, half and three quarters of
    the target's; DEL tries all, but each costs one product with the head per step."""
    depth: int = 7
    """Longest draft; it fills the smallest step that verifies one."""
    memory: float = 0.95
    """Weight of earlier steps in the agreement, per step; a value of our own."""

    weights = None

    def __post_init__(self) -> None:
        check_integer("depth", self.depth, least=1)
        if self.layers is not None:
            if not self.layers:
                raise ValueError("layers must name at least one exit, or be left out")
            object.__setattr__(self, "layers", tuple(self.layers))  # a static argument is hashable
        if not 0 <= self.memory <= 1:
            raise ValueError(f"memory={self.memory} must be between 0 and 1")

    def exits(self, config: ModelConfig) -> tuple[int, ...]:
        """The numbers of layers to choose from; ValueError if the model has none of that kind."""
        whole = config.num_layers
        if whole == 1:
            raise ValueError("early_exit needs a model of two layers or more: take another drafter")
        if self.layers is None:
            return tuple(sorted({max(1, whole * part // 4) for part in (1, 2, 3)}))
        if list(self.layers) != sorted({count for count in self.layers if 0 < count < whole}):
            raise ValueError(
                f"early_exit: layers={self.layers} must be ascending numbers from 1 to {whole - 1} "
                f"for a model of {whole} layers"
            )
        return self.layers

    def init(self, batch: int, room: int, config: ModelConfig) -> Agreement:
        return Agreement(
            jnp.zeros((batch, len(self.exits(config))), jnp.float32),
            jnp.zeros(batch, jnp.float32),
            jnp.zeros(batch, bool),
        )

    def begin(
        self, weights: Weights, state: Agreement, rows: jax.Array, prompts: jax.Array
    ) -> Agreement:
        return Agreement(
            state.agreed.at[rows].set(0.0),
            state.read.at[rows].set(0.0),
            state.running.at[rows].set(True),
        )

    def propose(
        self, weights: Target, state: Agreement, root: jax.Array, nodes: int
    ) -> tuple[Agreement, TokenTree]:
        if nodes == 1:
            return state, root_only(root)
        most, exits = min(self.depth, nodes - 1), self.exits(weights.config)
        which, length = choose(state, exits, most=most, whole=weights.config.num_layers)
        drafts = [partial(_draft, weights, layers=layers, most=most) for layers in exits]
        return state, chain(root, jax.lax.switch(which, drafts, root, length), nodes)

    def update(self, weights: Target, state: Agreement, verified: Verified) -> Agreement:
        state = dataclasses.replace(state, running=verified.layout.valid[:, 0])
        learned = partial(self._learned, weights, state, verified)
        if verified.tree.tokens.shape[1] > 1:
            return learned()
        position = jnp.where(state.running, weights.cache.next_pos, 0).max()
        due = position % PLAIN_EVERY == 0
        return jax.lax.cond(due, learned, lambda: state)

    def _learned(self, weights: Target, state: Agreement, verified: Verified) -> Agreement:
        """The agreement after a step whose shadow tokens are compared."""
        shadow = _shadow_tokens(weights, [hidden[:, : self.depth + 1] for hidden in verified.exits])
        width, accepted = shadow.shape[2], verified.accepted
        said = jnp.take_along_axis(shadow, accepted.path[:, None, :width], axis=2)
        on_path = jnp.arange(width, dtype=jnp.int32)[None] < accepted.count[:, None]
        same = (said == accepted.emitted[:, None, :width]) & on_path[:, None]
        memory = jnp.where(accepted.count > 0, jnp.float32(self.memory), 1.0)
        return dataclasses.replace(
            state,
            agreed=state.agreed * memory[:, None] + same.sum(2, dtype=jnp.float32),
            read=state.read * memory + accepted.count.astype(jnp.float32),
        )


def choose(
    state: Agreement, exits: tuple[int, ...], *, most: int, whole: int
) -> tuple[jax.Array, jax.Array]:
    """The index of an exit and the length of a draft, 0 to `most`: int32 scalars.

    They have the highest TPL(l, d) = (1 + a + ... + a ** d) / (d l + L) of DEL, the mean over
    running rows, for the agreement a after l of L = `whole` layers. A row that has not been read
    has a = 0.
    """
    share = state.agreed / jnp.maximum(state.read, 1e-9)[:, None]
    powers = jnp.cumprod(jnp.broadcast_to(share[..., None], (*share.shape, most)), axis=-1)
    tokens = 1.0 + jnp.concatenate([jnp.zeros_like(share)[..., None], powers.cumsum(-1)], axis=-1)
    tokens = jnp.where(state.running[:, None, None], tokens, 0.0).sum(0)
    run = whole + jnp.arange(most + 1)[None] * jnp.asarray(exits, jnp.int32)[:, None]
    which, length = jnp.divmod(jnp.argmax(tokens / run.astype(jnp.float32)), most + 1)
    return which.astype(jnp.int32), length.astype(jnp.int32)


def _draft(
    target: Target, root: jax.Array, length: jax.Array, *, layers: int, most: int
) -> jax.Array:
    """The next tokens [B, most] after each root by the first `layers` layers, -1 past `length`."""
    params, cache, config = target.params, target.cache, target.config
    whole = jnp.zeros((len(root), 1), jnp.int32)  # the path of a block of one row

    def longer(carry):
        i, token, tokens, own = carry
        x = embed(params, token[:, None], config=config)
        block = Block(x, own.next_pos[:, None], cache.rope_span)
        before = dataclasses.replace(own, shared=cache)
        out = forward(params, block, before, config=config, layers=layers)
        entries = Entries(
            out.k, out.v, block.positions, whole, jnp.ones_like(token), out.k_scale, out.v_scale
        )
        token = jnp.argmax(logits(params, out.hidden, config=config)[:, 0], axis=-1)
        token = token.astype(jnp.int32)
        return i + 1, token, tokens.at[:, i].set(token), commit(own, entries)

    tokens = jnp.full((len(root), most), -1, jnp.int32)
    # Only the entries of the draft itself are new, and they end with it.
    own = dataclasses.replace(cache.branch(1, slots=most, layers=layers), shared=None)
    start = jnp.int32(0), root, tokens, own
    return jax.lax.while_loop(lambda carry: carry[0] < length, longer, start)[2]


def _shadow_tokens(target: Target, exits: list[jax.Array]) -> jax.Array:
    """What the head says about the hidden states [B, P, D] of C exits: int32 [B, C, P]."""
    rows = jnp.concatenate(exits, axis=1)  # one product, which reads the head once
    said = jnp.argmax(logits(target.params, rows, config=target.config), axis=-1)
    return said.astype(jnp.int32).reshape(len(rows), len(exits), -1)
