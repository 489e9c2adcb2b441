"""The head of the drafter `denoiser`: it fills a block of masked tokens in one parallel pass.

DEER (arXiv 2512.15176) and DiffuSpec (arXiv 2510.02358) draft a block with a diffusion language
model that reads the text. This head is far smaller and reads the target's last hidden state
instead. Its tokens are projected from the target's embedding, and its outputs go through the
target's output table, or only through the rows of frequent tokens (FR-Spec, arXiv 2502.14856),
since the table is most of the work. Letters: B rows, T tokens of the block, D model, W width of the
head, U tokens that the head can predict.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from lookahead_jax.checkpoints.hf_config import config_from_hf
from lookahead_jax.host.integers import check_integer
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Stream, embed, layer_step, logits, scan_layers
from lookahead_jax.model.layer_attention import layer_kinds
from lookahead_jax.model.layers import linear, rms_norm
from lookahead_jax.model.params import Params, init_params
from lookahead_jax.model.quantization import rows_of
from lookahead_jax.model.rope import rope_tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserHeadConfig:
    """Sizes of the head."""

    tokens: int
    """T, the tokens of a block."""
    width: int
    """W, the width of its layers. Their MLP is four times as wide."""
    heads: int
    """Attention heads of a layer; width / heads must be even, for RoPE."""
    layers: int
    """Number of layers."""
    vocabulary: int | None
    """U, the tokens that it can predict; None: all of the target's."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (size := getattr(self, field.name)) is not None or field.name != "vocabulary":
                check_integer(f"head {field.name}", size, least=1)
        if self.width % (2 * self.heads):
            raise ValueError(
                f"head width {self.width} must be an even multiple of its {self.heads} heads"
            )

    def decoder(self) -> ModelConfig:
        """The layers: those of a Llama, whose attention is not causal here."""
        return config_from_hf(
            {
                "model_type": "llama", "vocab_size": 1, "hidden_size": self.width,
                "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
                "num_key_value_heads": self.heads, "intermediate_size": 4 * self.width,
                "max_position_embeddings": self.tokens, "hidden_act": "silu",
                "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True,
            }
        )  # fmt: skip


@struct.dataclass
class DenoiserHead:
    """The trained parameters, and the tokens that they predict."""

    params: Params
    """hidden_norm, token_norm [D], projections hidden, root, given [D, W], mask [T, W], layers,
    final_norm [W], out [W, D]."""
    vocabulary: jax.Array | None
    """[U] int32, ascending; None: all tokens."""
    config: DenoiserHeadConfig = struct.field(pytree_node=False)


def init_denoiser_head(key: jax.Array, config: DenoiserHeadConfig, hidden_size: int) -> Params:
    """Float32 parameters to start training from, for a target of D = `hidden_size`."""
    inner, *keys = jax.random.split(key, 6)
    layers = init_params(inner, config.decoder(), jnp.float32)
    ones = jnp.ones(hidden_size, jnp.float32)

    def normal(key: jax.Array, rows: int, columns: int, scale: float) -> jax.Array:
        return scale * jax.random.normal(key, (rows, columns), jnp.float32)

    width, gain = config.width, hidden_size**-0.5
    return {
        "hidden_norm": ones,
        "token_norm": jnp.copy(ones),  # two buffers: training donates both
        "hidden": normal(keys[0], hidden_size, width, gain),
        "root": normal(keys[1], hidden_size, width, gain),
        "given": normal(keys[2], hidden_size, width, gain),
        "mask": normal(keys[3], config.tokens, width, 1.0),
        "layers": layers["layers"],
        "final_norm": layers["final_norm"],
        # Small, so that the first loss is that of a guess: the target's table is not normalised.
        "out": normal(keys[4], width, hidden_size, 0.1 * width**-0.5),
    }


def block_logits(
    head: DenoiserHead,
    tables: Params,
    hidden: Float[Array, "B D"],
    root: Int[Array, " B"],
    given: Int[Array, "B T"],
    *,
    config: ModelConfig,
) -> Float[Array, "B T U"]:
    """Float32 logits of the T tokens that follow each row's `root`, over the head's vocabulary.

    `hidden` is the target's final-normed state that chose the root. `given` are known tokens of
    the block, -1 where one is masked. `tables` are those of `target_tables`; `config` is the
    target's.

    A row of the block is the sum of the projected state, the projected root, and either its
    projected token or the mask embedding of its place. The rows see one another in both directions.
    """
    p, own = head.params, head.config.decoder()
    batch, width = given.shape
    tokens = jnp.concatenate([root[:, None], given], axis=1)
    known = embed(tables, tokens, config=config).astype(p["out"].dtype)
    known = rms_norm(known, p["token_norm"], config=own)
    state = rms_norm(hidden[:, None].astype(known.dtype), p["hidden_norm"], config=own)
    shared = linear(p, "hidden", state) + linear(p, "root", known[:, :1])
    projected = linear(p, "given", known[:, 1:])
    x = shared + jnp.where(given[..., None] >= 0, projected, p["mask"][None])
    steps = jnp.arange(width, dtype=jnp.int32)[None]
    positions = jnp.broadcast_to(steps, (batch, width))
    cos, sin = rope_tables(own, positions, jnp.full(batch, width, jnp.int32))
    visible = jnp.ones((batch, width, width), bool)

    def step(x, inputs):
        layer, _, kind = inputs
        x, _ = layer_step(
            layer, Stream(x, cos, sin), kind,
            positions=positions, visible=visible, context=None, config=own,
        )  # fmt: skip
        return x, None

    x, _ = scan_layers(step, x, p["layers"], None, layer_kinds(own))
    out = linear(p, "out", rms_norm(x, p["final_norm"], config=own))
    rows = tables["predicted"]
    return logits({"embed": rows, "lm_head": rows}, out.astype(hidden.dtype), config=config)


def target_tables(params: Params, vocabulary: jax.Array | None, *, config: ModelConfig) -> Params:
    """What a head reads of its target: the embedding, and the output rows of its vocabulary."""
    rows = params["embed" if config.tie_embeddings else "lm_head"]
    if vocabulary is not None:
        rows = rows_of(rows, vocabulary)
    return {"embed": params["embed"], "predicted": rows}


def place_in(vocabulary: jax.Array | None, tokens: jax.Array) -> jax.Array:
    """The index of each token in the vocabulary; -1 for tokens that it lacks, and for -1."""
    if vocabulary is None:
        return tokens
    at = jnp.minimum(jnp.searchsorted(vocabulary, tokens), len(vocabulary) - 1).astype(jnp.int32)
    return jnp.where(vocabulary[at] == tokens, at, -1)
