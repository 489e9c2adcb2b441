"""How much memory prefill of a long prompt on an 8B model allocates, without running it.

The shape is Llama 3.1 8B in bfloat16 and the arrays are abstract. The compiler reports what it
would allocate (`memory_analysis`): the budgeted cache, and the temporaries, which grow with the
prompt by the residual stream and one layer's keys and values only. The full cache is measured as
well.

    python benchmarks/prefill_memory.py                       # compiled for this CPU
    python benchmarks/prefill_memory.py --topology v5p:2x2x1    # ahead of time for a TPU (libtpu)
"""

import dataclasses
import json
import os
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from common import Help, parse
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lookahead_jax.checkpoints.hf_config import config_from_hf
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.params import abstract_params
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.full import Full
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.prefilling.batching import slots_for
from lookahead_jax.prefilling.prefill import prefill
from lookahead_jax.train.shapes import SHAPES

NEW_TOKENS = 256


def measure(
    config: ModelConfig, tokens: int, policy: Policy, budget: int, *, chunk, sharding
) -> dict:
    """Bytes of weights, temporaries and results for one prompt of `tokens` tokens."""

    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    memory = (
        prefill.lower(
            jax.tree.map(place, abstract_params(config, jnp.bfloat16)),
            place(jax.ShapeDtypeStruct((1, tokens), jnp.int32)),
            config=config,
            policy=policy,
            budget=budget,
            slots=slots_for(policy, tokens, budget, NEW_TOKENS, config=config),
            new_tokens=NEW_TOKENS,
            chunk=chunk,
        )
        .compile()
        .memory_analysis()
    )
    return {
        "tokens": tokens,
        "policy": type(policy).__name__,
        "weights": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "cache_and_logits": memory.output_size_in_bytes,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    tokens: Annotated[tuple[int, ...], Help("lengths of the prompt")] = (8192, 16384, 32768)
    budget: Annotated[int, Help("prompt entries kept per layer and KV head")] = 1024
    chunk: Annotated[int | None, Help("prompt rows in flight; by default the platform's")] = None
    topology: Annotated[str | None, Help("TPU to compile for, such as v5p:2x2x1")] = None


def main() -> None:
    options = parse(Options, __doc__)
    config = config_from_hf(SHAPES["llama-3.1-8b"])
    sharding = None
    if options.topology:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        tpu = topologies.get_topology_desc(platform="tpu", topology_name=options.topology)
        sharding = NamedSharding(Mesh(np.array(tpu.devices[:1]), ("x",)), PartitionSpec())

    one_layer = 2 * 2 * config.num_kv_heads * config.head_dim
    residual = 2 * config.hidden_size
    print(f"a token: residual {residual} bytes, one layer's keys and values {one_layer} bytes")
    print(f"all {config.num_layers} layers' keys and values {config.num_layers * one_layer} bytes")
    before = {}
    for policy in (SnapKV(window=32, pool="max", kernel=7), Full()):
        for tokens in options.tokens:
            row = measure(
                config, tokens, policy, options.budget, chunk=options.chunk, sharding=sharding
            )
            total = row["temporaries"] + row["cache_and_logits"]
            if row["policy"] in before:
                shorter, less = before[row["policy"]]
                row["bytes_per_token"] = (total - less) / (tokens - shorter)
            before[row["policy"]] = (tokens, total)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
