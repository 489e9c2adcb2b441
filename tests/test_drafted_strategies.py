"""Searches with a drafter: the texts and the limits on work of the same search without one."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from lookahead_jax.checkpoints.load import load
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.strategies.registry import make_strategy
from lookahead_jax.strategies.search import search
from tests import tiny

PROMPTS = ["abc def", "hello hello world"]
ROWS, NEW = 3, 12
SAMPLING = Sampling(temperature=0.8, repetition_penalty=1.2)  # a penalty reads the text so far


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    tiny.save_chat_model(folder)
    return load(folder)


def reward(prompt: str, text: str) -> float:
    return (sum(ord(c) * (i + 1) for i, c in enumerate(prompt[:1] + text)) * 7919 % 1009) / 1009


def found(model, name, prompts=tuple(PROMPTS), seeds=(5, 6), n=ROWS, strategy=(), **options):
    settings: dict[str, Any] = dict(
        policy=make_policy("full"), max_new_tokens=NEW, eos_ids=(), sampling=SAMPLING,
        reward=None if name in ("first_finish", "self_consistency") else reward,
    )  # fmt: skip
    made = make_strategy(name, n=n, **dict(strategy))
    return search(model, list(prompts), strategy=made, seeds=list(seeds), **settings | options)


def texts(result):
    return [[(c.tokens, c.text, c.finish, c.score) for c in row] for row in result.candidates]


def tokens_spent(result):
    return [work.tokens for work in result.work]


def common(model, result) -> str:
    """A character that several candidates have, in the middle of them."""
    letters = [c for row in result.candidates for x in row for c in set(str(x.text)[2:-2])]
    return max(sorted(set(letters)), key=letters.count)


@pytest.fixture(scope="module")
def whole(model):
    return found(model, "best_of_n")
