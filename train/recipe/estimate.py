"""How long a recipe takes on this machine, from one small batch of each of its phases."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lookahead_jax.checkpoints.hf_files import read_json
from lookahead_jax.checkpoints.load import Model
from lookahead_jax.generation.generate import generate
from lookahead_jax.host.files import atomic_write
from lookahead_jax.model.jit import compiler_options
from lookahead_jax.modules.definition import LookaheadConfig, init_modules
from lookahead_jax.policies.full import Full
from lookahead_jax.prefilling.batching import pad_batch
from lookahead_jax.train.batches import ForwardBatch
from lookahead_jax.train.loss import LossConfig
from lookahead_jax.train.objective import base_forward
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from lookahead_jax.train.step import init_state, train_step

_ROWS = 2
_NEW = 33  # tokens of a response: one by the pass over the prompt, the others by decoding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds of the parts of each phase; compiling is not included."""

    prompt: float
    """To make a prompt."""
    read: float
    """To read a token of a prompt."""
    decode: float
    """To generate one token for each row of a batch."""
    forward: float
    """To run the base model over a token of a prompt for its keys, values and targets."""
    learn: float
    """To run and update the lookahead tokens, per token of a prompt."""


def file_name(loss: LossConfig, dtype: str | None) -> str:
    """The name of the file of rates: steps with the loss of a memory run the response, too."""
    parts = ["rates", "memory" if loss.memory else "", dtype or ""]
    return "_".join(filter(None, parts)) + ".json"


def rates(
    file: Path,
    model: Model,
    prompts: Sequence[list[int]],
    modules: LookaheadConfig,
    *,
    loss: LossConfig,
    prompt_s: float,
) -> Rates:
    """The rates measured before, or those of a batch of the prompts of middle length."""
    if (stored := read_json(file.parent, file.name)) is not None:
        return Rates(**stored)
    middle = max(0, (len(prompts) - _ROWS) // 2)
    chosen = sorted(prompts, key=len)[middle : middle + _ROWS]
    tokens = sum(map(len, chosen))
    for _ in range(2):  # the first one compiles
        made = generate(model, chosen, policy=Full(), max_new_tokens=_NEW, eos_ids=(), burst=64)
    forward, learn = _step_seconds(model, chosen, made.tokens, modules, loss)
    measured = Rates(
        prompt=prompt_s,
        read=made.timing.ttft_s / tokens,
        decode=len(chosen) / (made.timing.decode_tokens_per_s or 1.0),
        forward=forward / tokens,
        learn=learn / tokens,
    )
    atomic_write(file, json.dumps(dataclasses.asdict(measured), indent=1) + "\n")
    return measured


def _step_seconds(
    model: Model,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    sizes: LookaheadConfig,
    loss: LossConfig,
) -> tuple[float, float]:
    """Seconds of the base forward of a batch, and of a step after it."""
    optimizer = make_optimizer(OptimizerConfig(rate=1e-3, warmup=0), 1)
    modules = init_modules(jax.random.key(0), sizes, model.config, params=model.params)
    rows = [jnp.asarray(pad_batch(rows, config=model.config)) for rows in (prompts, responses)]

    def forward(params, prompts, responses):
        made = base_forward(params, prompts, responses, config=model.config, dtype=jnp.float16)
        return ForwardBatch(jax.tree.map(lambda a: a[None], made))

    def step(params, state, batch):
        return train_step(params, state, batch, config=model.config, optimizer=optimizer, loss=loss)

    first, second = (jax.jit(f, compiler_options=compiler_options()) for f in (forward, step))
    batch, forward_s = _seconds(first, model.params, *rows)
    _, step_s = _seconds(second, model.params, init_state(modules, optimizer), batch)
    return forward_s, step_s


def _seconds(program: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """The result of a program, and the seconds of its second run: the first one compiles."""
    result, seconds = None, 0.0
    for _ in range(2):
        begin = time.perf_counter()
        result = jax.block_until_ready(program(*args))
        seconds = time.perf_counter() - begin
    return result, seconds
