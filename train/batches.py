"""The rows of one training step, as tokens or with what the base model computes for them.

Letters: A micro-batches, B rows of one, T prompt, Y response, V sets of modules.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.params import Params
from lookahead_jax.model.sharding import sharding
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.train.loss import LossConfig, LossParts
from lookahead_jax.train.objective import BaseForward, loss_parts, parts_behind


@struct.dataclass
class Batch:
    """Token rows, right-padded with -1; rows without a response are ignored."""

    prompts: jax.Array  # [A, B, T] int32
    responses: jax.Array  # [A, B, Y] int32

    @property
    def length(self) -> jax.Array:
        """Tokens of each prompt: [A, B] int32."""
        return (self.prompts >= 0).sum(-1, dtype=jnp.int32)

    @property
    def answered(self) -> jax.Array:
        """Tokens of each response: [A, B] int32."""
        return (self.responses >= 0).sum(-1, dtype=jnp.int32)

    def losses(
        self,
        variants: Sequence[LookaheadModules],
        params: Params,
        *,
        config: ModelConfig,
        losses: Sequence[LossConfig] | None,
        chunk: int | None,
    ) -> LossParts:
        """The losses of one micro-batch, a slice of this one along A."""
        return loss_parts(
            variants,
            params,
            self.prompts,
            self.responses,
            config=config,
            losses=losses,
            chunk=chunk,
        )


@struct.dataclass
class ForwardBatch:
    """Rows whose base forward is known, each array with a leading axis A."""

    forward: BaseForward

    @property
    def length(self) -> jax.Array:
        """Tokens of each prompt: [A, B] int32."""
        return self.forward.length

    @property
    def answered(self) -> jax.Array:
        """Tokens of each response: [A, B] int32."""
        return self.forward.answered

    def losses(
        self,
        variants: Sequence[LookaheadModules],
        params: Params,
        *,
        config: ModelConfig,
        losses: Sequence[LossConfig] | None,
        chunk: int | None,
    ) -> LossParts:
        """The losses of one micro-batch, a slice of this one along A."""
        return parts_behind(variants, params, self.forward, config=config, losses=losses)


AnyBatch = Batch | ForwardBatch


def microbatch_sharding(mesh: Mesh) -> NamedSharding:
    """Token rows of each micro-batch are split over the data axes."""
    return sharding((None, "batch"), mesh)


def forward_sharding(mesh: Mesh) -> Any:
    """The same of rows whose base forward is known: a ForwardBatch of shardings."""
    rows: Any = sharding((None, "batch"), mesh)
    layers: Any = sharding((None, None, "batch"), mesh)
    return ForwardBatch(BaseForward(layers, layers, layers, layers, rows, rows, rows))
