"""An engine whose model is spread over four devices serves what it serves on one."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from lookahead_jax.checkpoints.load import load
from lookahead_jax.decoding.sampling import GREEDY, Sampling
from lookahead_jax.engine.engine import Engine
from lookahead_jax.engine.requests import Request
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.policies.snapkv import SnapKV
from tests import tiny
from tests.compilations import compilations

PREFIX, *ENDS = tiny.prompts((512, 80, 30, 9, 12, 5))
PROMPTS = [PREFIX + ENDS[0], *ENDS[2:], PREFIX + ENDS[1]]  # the three short ones in one reading
SETTINGS = [GREEDY, Sampling(temperature=0.8, top_k=20), GREEDY, GREEDY, GREEDY]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh") / "model"
    tiny.model_folder(folder, max_position_embeddings=1024, vocab_size=98)
    return folder


def serve(model):
    engine = Engine(
        model, policy=SnapKV(window=8), budget=24, rows=4, max_new_tokens=12,
        max_prompt_tokens=700, eos_ids=(), drafter="prompt_lookup", draft_nodes=8,
        prefix_store_bytes=10**8,
    )  # fmt: skip
    engine.warm_up([9, 600])
    compiled = len(compilations)
    results = engine.run(
        [
            Request(prompt=prompt, max_new_tokens=12, sampling=sampling, seed=seed)
            for seed, (prompt, sampling) in enumerate(zip(PROMPTS, SETTINGS, strict=True))
        ]
    )
    assert len(compilations) == compiled
    assert [result.reused_tokens for result in results] == [0, 0, 0, 0, 512]
    return [result.tokens for result in results], engine._batch._state.cache.k.sharding


def test_tensor_and_data_parallel_rows_equal_those_of_one_device(folder):
    expected, _ = serve(load(folder, dtype=jnp.float32))
    spread = load(folder, dtype=jnp.float32, mesh=make_mesh(data=2, tensor=2))
    assert len(spread.params["layers"]["q"].sharding.device_set) == len(jax.devices()) == 4
    tokens, place = serve(spread)
    assert tokens == expected
    assert place.spec == PartitionSpec(None, ("data", "fsdp"), "tensor")
