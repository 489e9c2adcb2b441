"""What cannot fit into memory is refused before it is allocated."""

import pytest

from lookahead_jax.checkpoints.load import load
from lookahead_jax.engine.engine import Engine
from lookahead_jax.generation import memory
from lookahead_jax.policies.laq import LAQ
from lookahead_jax.policies.snapkv import SnapKV
from tests import tiny

SNAPKV = SnapKV(window=4, pool="avg", kernel=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save_bytes_model(folder, num_hidden_layers=1)
    return load(folder)


def make_engine(model, policy=SNAPKV, **stores):
    return Engine(
        model, policy=policy, budget=16, rows=2, max_new_tokens=8, max_prompt_tokens=32, **stores
    )


def test_the_stores_of_an_engine_count(model, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**9)
    make_engine(model, prompt_store_bytes=3 * 10**8, prefix_store_bytes=5 * 10**8)
    message = (
        r"stores of prompts and prefixes up to 1.1 GB, but 1.0 GB are free: lower max_new_tokens "
        r"\(8\), the budget \(16\), --prompt-store-mb \(prompt_store_bytes, 600 MB\), "
        r"--prefix-store-mb \(prefix_store_bytes, 500 MB\) or the number of rows"
    )
    with pytest.raises(ValueError, match=message):
        make_engine(model, prompt_store_bytes=6 * 10**8, prefix_store_bytes=5 * 10**8)


def test_a_store_that_stays_empty_does_not_count(model, monkeypatch):
    """LAQ reads every prompt more than once."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**9)
    make_engine(model, LAQ(), prefix_store_bytes=5 * 10**9)


def test_without_stores_the_cache_alone_is_named(model, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100)
    with pytest.raises(ValueError, match="the cache needs") as caught:
        make_engine(model)
    assert "store" not in str(caught.value)
    assert str(caught.value).endswith("the budget (16) or the number of rows")
