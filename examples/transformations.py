"""The library's functions inside jit, vmap and shard_map code of one's own.

    python examples/transformations.py

`lk.prefill`, `lk.embed`, `lk.forward` and `lk.logits` are pure functions of pytrees: parameters and
caches go in, arrays and caches come out. Here they rank candidate answers by their likelihood
after a prompt that was cut to a fixed budget.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lookahead_jax as lk

POLICY, BUDGET, SLOTS = lk.make_policy("snapkv", window="8"), 64, 128
PROMPT = "def area(width, height):\n    return width * height\n" * 4 + "\ndef volume("
CANDIDATES = ["width, height", "self, request", "0.5 + 1e-3 *"]


def log_likelihood(params, cache, logits, answer, *, config):
    """Log-likelihood [B] of the answer int32 [B, P] after a cache and its last logits [B, V]."""
    path = jnp.arange(answer.shape[1], dtype=jnp.int32)
    block = lk.Block(
        x=lk.embed(params, answer, config=config),
        positions=cache.next_pos[:, None] + path[None],
        rope_span=cache.rope_span,
    )
    out = lk.forward(params, block, cache, config=config)
    after = lk.logits(params, out.hidden, config=config)
    predicted = jnp.concatenate([logits[:, None], after[:, :-1]], axis=1)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(predicted), answer[..., None], axis=-1)
    return chosen[..., 0].sum(-1)


@functools.partial(jax.jit, static_argnames="config", compiler_options=lk.compiler_options())
def rank(params, prompt, answers, *, config):
    """Log-likelihoods [A] of answers int32 [A, P] after one prompt int32 [1, T], read once."""
    read = lk.prefill(
        params, prompt, config=config, policy=POLICY, budget=BUDGET, slots=SLOTS, new_tokens=16
    )
    score = functools.partial(log_likelihood, params, read.cache, read.logits, config=config)
    return jax.vmap(lambda answer: score(answer[None])[0])(answers)


def rank_sharded(params, prompts, answers, *, config):
    """The same for as many prompts int32 [B, T] as there are devices, one on each."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("data"), PartitionSpec()
    params, answers = jax.device_put((params, answers), NamedSharding(mesh, whole))
    prompts = jax.device_put(prompts, NamedSharding(mesh, split))
    each = jax.shard_map(
        functools.partial(rank, config=config),
        mesh=mesh,
        in_specs=(whole, split, whole),
        out_specs=split,
        check_vma=False,
    )
    return jax.jit(each)(params, prompts, answers)


def main() -> tuple[jax.Array, jax.Array]:
    model = lk.load(lk.EMBEDDED_MODEL)
    encode = model.tokenizer.encode
    prompt = jnp.asarray(lk.pad_batch([encode(PROMPT)], config=model.config))
    rows = [encode(text, special=False) for text in CANDIDATES]
    width = min(map(len, rows))
    answers = jnp.asarray([row[:width] for row in rows], jnp.int32)
    one = rank(model.params, prompt, answers, config=model.config)
    prompts = jnp.repeat(prompt, jax.device_count(), axis=0)
    many = rank_sharded(model.params, prompts, answers, config=model.config)
    for text, value in zip(CANDIDATES, one.tolist(), strict=True):
        print(f"{value:8.2f}  {text}")
    return one, many.reshape(jax.device_count(), -1)


if __name__ == "__main__":
    main()
