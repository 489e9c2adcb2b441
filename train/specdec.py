"""Train the acceptance head of the drafter specdec for a model and its draft model.

    lookahead train data --model DIR --source FILE --out DATA
    lookahead train specdec --model DIR --draft-model SMALL --data DATA --run RUN
    lookahead generate --model DIR --drafter specdec --draft-model SMALL \\
        --drafter-arg head=RUN/head.safetensors ...

SpecDec++ (Huang et al. 2024, arXiv:2405.19715). Behind each prompt the draft model reads what it
drafts itself at every place of the target's response, with a few of the target's own tokens among
it. The head learns from its hidden states with which probability each drafted token is accepted.
Letters: A micro-batches, B rows of one, T prompt, Y response, S text of both, D draft model dim.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import NamedSharding, PartitionSpec

from lookahead_jax import EMBEDDED_MODEL
from lookahead_jax.checkpoints.load import load
from lookahead_jax.drafters.acceptance_head import (
    AcceptanceHead,
    acceptance_logits,
    init_head,
    save_head,
)
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.host.files import make_folder
from lookahead_jax.host.lock import folder_lock
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, embed, forward, logits
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.model.jit import program
from lookahead_jax.model.params import Params
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.train.batches import Batch, microbatch_sharding
from lookahead_jax.train.checkpoints import Checkpoints
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from lookahead_jax.train.progress import say, steps
from lookahead_jax.train.step import check_batch
from lookahead_jax.train.training_data import open_data

HEAD_FILE = "head.safetensors"
_WARMUP = 0.03  # of the steps
_IDENTITY = ("layers", "weight", "mixed", "epochs", "batch", "rate", "seed", "max_prompt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Train the acceptance head of the drafter specdec; the same command resumes."""

    data: tuple[Path, ...]
    """Folders that `lookahead train data` wrote for the model; their rows are pooled."""
    draft_model: Path
    """Folder of the draft model, which is not changed."""
    run: Path
    """Folder for the head and the checkpoints, made if it does not exist."""
    model: Path | None = None
    """Folder of the model that verifies. Default: the embedded model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; None: that of the checkpoints."""
    layers: int = 3
    """Residual blocks of the head."""
    weight: float = 6.0
    """Weight of rejected tokens in the loss; that of accepted ones is 1."""
    mixed: float = 0.15
    """Part of the response that the draft model reads as the target wrote it."""
    epochs: int = 3
    """Passes over the data."""
    batch: int = 32
    """Rows per update, over all devices."""
    micro_batches: int = 8
    """Passes per update; more passes take less memory."""
    rate: float = 5e-5
    """Peak learning rate of Adam."""
    seed: int = 0
    """Seed of the head, of the order of the data and of the drafted tokens."""
    max_prompt: int | None = None
    """Longest prompt in tokens; rows with a longer one are skipped. None: no limit."""
    save_every: int = 100
    """Steps between checkpoints."""


class Judged(NamedTuple):
    """Drafted tokens of the responses, and what the head learns of them."""

    hidden: jax.Array  # [B, Y, D] of the draft model after it has read them
    chance: jax.Array  # [B, Y] float32 probability that each is accepted
    counted: jax.Array  # [B, Y] bool drafted, and not the target's own token


def judged_drafts(
    target: Params,
    draft: Params,
    prompts: jax.Array,
    responses: jax.Array,
    key: jax.Array,
    *,
    config: ModelConfig,
    draft_config: ModelConfig,
    mixed: float,
) -> Judged:
    """Tokens that the draft model samples along the responses [B, Y] behind the prompts [B, T].

    Each is sampled behind the response as the target wrote it, and accepted with min(1, p / q).
    The draft model then reads them in a row, the target's token in a part `mixed` of the places.
    """
    (batch, width), rows = responses.shape, jnp.arange(len(responses))[:, None]
    places = (prompts >= 0).sum(1, dtype=jnp.int32)[:, None] + jnp.arange(width)[None]
    text = jnp.full((batch, prompts.shape[1] + width), -1, jnp.int32)
    text = text.at[:, : prompts.shape[1]].set(prompts).at[rows, places].set(responses)

    def next_tokens(params: Params, config: ModelConfig) -> jax.Array:
        hidden = _hidden(params, text, config=config)[rows, places - 1]
        return jax.nn.log_softmax(logits(params, hidden, config=config), axis=-1)

    q = next_tokens(draft, draft_config)
    draw, mix = jax.random.split(key)
    drafted = jax.random.categorical(draw, q)

    def of_drafted(p: jax.Array) -> jax.Array:
        return jnp.take_along_axis(p, drafted[..., None], axis=-1)[..., 0]

    chance = jnp.exp(jnp.minimum(of_drafted(next_tokens(target, config)) - of_drafted(q), 0.0))
    own = jax.random.bernoulli(mix, mixed, responses.shape)
    read = jnp.where(responses < 0, -1, jnp.where(own, responses, drafted))
    text = text.at[rows, places].set(read)
    hidden = _hidden(draft, text, config=draft_config)[rows, places]
    return Judged(hidden, chance, (responses >= 0) & ~own)


def _hidden(params: Params, text: jax.Array, *, config: ModelConfig) -> jax.Array:
    """Hidden states [B, S, D] of texts [B, S], padded on the right with -1."""
    places = jnp.arange(text.shape[1], dtype=jnp.int32)[None]
    positions = jnp.where(text >= 0, places, -1)
    span = (text >= 0).sum(1, dtype=jnp.int32)
    block = Block(embed(params, text, config=config), positions, span)
    return forward(params, block, None, config=config).hidden


def head_loss(head: AcceptanceHead, judged: Judged, weight: float) -> jax.Array:
    """The binary cross-entropy of the counted tokens, rejections weighing `weight`: float32 []."""
    scores = jax.nn.log_softmax(acceptance_logits(head, judged.hidden), axis=-1)
    accepted = jnp.where(judged.counted, judged.chance, 0.0)
    rejected = jnp.where(judged.counted, weight * (1.0 - judged.chance), 0.0)
    total = accepted.sum() + rejected.sum()
    loss = -(rejected * scores[..., 0] + accepted * scores[..., 1]).sum()
    return loss / jnp.where(total > 0, total, 1.0)


_STATIC = ("config", "draft_config", "mixed", "weight", "optimizer")


@program(static_argnames=_STATIC, donate_argnames=("state",))
def head_step(
    state: tuple[AcceptanceHead, Any],
    target: Params,
    draft: Params,
    batch: Batch,
    key: jax.Array,
    *,
    config: ModelConfig,
    draft_config: ModelConfig,
    mixed: float,
    weight: float,
    optimizer: optax.GradientTransformation,
) -> tuple[tuple[AcceptanceHead, Any], jax.Array]:
    """One update of (head, optimizer state) on the mean loss of the micro-batches; that loss."""
    head, moments = state

    def add(total: Any, inputs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        rows, key = inputs
        judged = judged_drafts(
            target, draft, rows.prompts, rows.responses, key, config=config,
            draft_config=draft_config, mixed=mixed,
        )  # fmt: skip
        found = jax.value_and_grad(head_loss)(head, judged, weight)
        return jax.tree.map(jnp.add, total, found), None

    nothing = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, head)
    parts = len(batch.prompts)
    total, _ = jax.lax.scan(add, nothing, (batch, jax.random.split(key, parts)))
    loss, gradient = jax.tree.map(lambda a: a / parts, total)
    tree: Any = head  # optax declares arrays, and takes any tree of them
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        updates, moments = optimizer.update(gradient, moments, tree)
    return (jax.tree.map(jnp.add, head, updates), moments), loss


def train_head(config: HeadConfig) -> None:
    """Trains from the newest checkpoint to the end and writes RUN/head.safetensors.

    Raises ValueError for settings that do not fit models, data or devices, FloatingPointError for a
    loss that is not finite, BlockingIOError if another process writes the run.
    """
    mesh = make_mesh()
    check_batch(config.batch, config.micro_batches, mesh)
    if min(config.epochs, config.save_every) < 1 or not 0 <= config.mixed < 1:
        raise ValueError(
            f"--epochs {config.epochs} and --save-every {config.save_every} must be at least 1, "
            f"--mixed {config.mixed} from 0 to below 1"
        )
    make_folder(config.run)
    with folder_lock(config.run), jax.set_mesh(mesh):
        say("loading the models")
        target = load(config.model or EMBEDDED_MODEL, dtype=config.dtype, mesh=mesh)
        draft = load(config.draft_model, dtype=config.dtype, mesh=mesh)
        if target.config.vocab_size != draft.config.vocab_size:
            raise ValueError(
                f"{config.draft_model} has {draft.config.vocab_size} tokens and {target.path} "
                f"{target.config.vocab_size}: they must share a tokenizer"
            )
        bases = fingerprint(target.params), fingerprint(draft.params)
        data = open_data(
            config.data, batch=config.batch, seed=config.seed, base_fingerprint=bases[0],
            max_prompt=config.max_prompt,
        )  # fmt: skip
        total = config.epochs * data.steps_per_epoch
        optimizer = make_optimizer(
            OptimizerConfig(rate=config.rate, warmup=int(_WARMUP * total)), total
        )

        def begin() -> tuple[AcceptanceHead, Any]:
            key = jax.random.key(config.seed)
            head: Any = init_head(key, draft.config.hidden_size, config.layers)
            return head, optimizer.init(head)

        whole = NamedSharding(mesh, PartitionSpec())
        state = jax.jit(begin, out_shardings=whole)()
        described = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        identity = {name: described[name] for name in _IDENTITY} | {"bases": list(bases)}
        with Checkpoints(config.run / "checkpoints", keep=2, identity=identity) as checkpoints:
            first, state = checkpoints.restore(state) or (0, state)
            for step in steps(first, total):
                state, loss = head_step(
                    state, target.params, draft.params,
                    data.batch_of(step, config.micro_batches, microbatch_sharding(mesh)),
                    jax.random.fold_in(jax.random.key(config.seed), step), config=target.config,
                    draft_config=draft.config, mixed=config.mixed, weight=config.weight,
                    optimizer=optimizer,
                )  # fmt: skip
                if (done := step + 1) == total or done % config.save_every == 0:
                    if not math.isfinite(float(loss)):
                        raise FloatingPointError(f"step {step}: the loss is {float(loss)}")
                    say(f"step {done} of {total}: loss {float(loss):.4f}")
                    checkpoints.save(done, state)
        save_head(config.run / HEAD_FILE, state[0], params=draft.params)
    say(f"{config.run / HEAD_FILE}: {config.layers} blocks after {total} steps")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    prog = "lookahead train specdec"
    return run_command(lambda: tyro.cli(HeadConfig, args=args, prog=prog), train_head, prog=prog)


if __name__ == "__main__":
    end_process(main())
