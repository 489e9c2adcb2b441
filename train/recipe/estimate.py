"""How long a recipe takes on this machine, from one small batch of each of its phases."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

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
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from lookahead_jax.train.step import Batch, init_state, train_step

_ROWS = 2
_NEW = 33  # tokens of a response: one by the pass over the prompt, the others by decoding
FILE = "rates.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds of the parts of each phase; compiling is not included."""

    prompt: float
    """To make a prompt."""
    read: float
    """To read a token of a prompt."""
    decode: float
    """To generate one token for each row of a batch."""
    train: float
    """To train on a token of a prompt."""


def rates(
    folder: Path,
    model: Model,
    prompts: Sequence[list[int]],
    modules: LookaheadConfig,
    *,
    prompt_s: float,
) -> Rates:
    """The rates measured before, or those of a batch of the prompts of middle length."""
    if (stored := read_json(folder, FILE)) is not None:
        return Rates(**stored)
    middle = max(0, (len(prompts) - _ROWS) // 2)
    chosen = sorted(prompts, key=len)[middle : middle + _ROWS]
    tokens = sum(map(len, chosen))
    for _ in range(2):  # the first one compiles
        made = generate(model, chosen, policy=Full(), max_new_tokens=_NEW, eos_ids=(), burst=64)
    measured = Rates(
        prompt=prompt_s,
        read=made.timing.ttft_s / tokens,
        decode=len(chosen) / (made.timing.decode_tokens_per_s or 1.0),
        train=_step_seconds(model, chosen, made.tokens, modules) / tokens,
    )
    atomic_write(folder / FILE, json.dumps(dataclasses.asdict(measured), indent=1) + "\n")
    return measured


def _step_seconds(
    model: Model,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    sizes: LookaheadConfig,
) -> float:
    optimizer = make_optimizer(OptimizerConfig(rate=1e-3, warmup=0), 1)
    modules = init_modules(jax.random.key(0), sizes, model.config, params=model.params)
    padded = (pad_batch(rows, config=model.config)[None] for rows in (prompts, responses))
    batch = Batch(*map(jnp.asarray, padded))

    def step(params, state, batch):
        return train_step(params, state, batch, config=model.config, optimizer=optimizer)

    compiled = jax.jit(step, compiler_options=compiler_options())
    state, seconds = init_state(modules, optimizer), 0.0
    for _ in range(2):  # the first one compiles
        begin = time.perf_counter()
        jax.block_until_ready(compiled(model.params, state, batch))
        seconds = time.perf_counter() - begin
    return seconds
