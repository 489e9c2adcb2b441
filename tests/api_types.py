"""What a type checker sees of the public names, although they are imported lazily; not a test."""

from typing import assert_type

import jax
import numpy as np

import lookahead_jax as lk


def names_have_their_types(model: lk.Model, cache: lk.KVCache, tokens: jax.Array) -> None:
    assert_type(lk.load("folder"), lk.Model)
    assert_type(lk.generate(model, ["text", [1, 2]], policy=lk.make_policy("full")), lk.Generation)
    assert_type(lk.generate(model, ["text"]).tokens, list[list[int]])
    assert_type(lk.make_policy("snapkv", window=16), lk.policies.Policy)
    assert_type(lk.score(model, np.zeros((1, 2), np.int32)).kept, jax.Array)
    assert_type(cache.fork(2), lk.KVCache)
    assert_type(model.config, lk.ModelConfig)
    assert_type(
        lk.decode(model.params, cache, tokens, config=model.config, max_new_tokens=1).cache,
        lk.KVCache,
    )
