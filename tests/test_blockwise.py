"""blockwise: entries that compete block by block, against NumPy."""

import dataclasses

import numpy as np
import pytest

from lookahead_jax.policies.blockwise import Blockwise
from lookahead_jax.policies.keydiff import KeyDiff
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.prompts.read import read_prompt
from tests import reference, tiny
from tests.test_policies import PLAIN, kept_sets, weights

LENGTHS = (70, 33, 61, 12)
BUDGET = 10


def keydiff(keys):
    """Minus the cosine of each key [T, H] to the mean direction of all."""
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    mean = unit.mean(0)
    return -unit @ (mean / np.linalg.norm(mean))


def survivors(keys, budget, size, last):
    """Entries of one head after all blocks; the `last` entries of the prompt are kept."""
    length = len(keys)
    kept = np.arange(min(budget, length))
    for start in range(len(kept), length, size):
        held = np.r_[kept, np.arange(start, min(start + size, length))]
        scores = np.where(held >= length - last, np.inf, keydiff(keys[held]))
        kept = np.sort(held[np.argsort(-scores, kind="stable")[:budget]])
    return kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ends(KeyDiff):
    """keydiff that keeps the prompt's last entries."""

    last: int

    def protected(self, pos, length, budget):
        return pos >= length[:, None, None] - self.last


def kept_by(policy):
    result = read_prompt(
        weights(PLAIN), tiny.batch(LENGTHS, PLAIN), config=PLAIN, policy=policy, budget=BUDGET,
        new_tokens=4,
    )  # fmt: skip
    return kept_sets(result.cache)


@pytest.mark.parametrize(("inner", "last"), [("keydiff", 0), ("ends", 3)])
def test_each_block_competes_with_what_was_kept(inner, last):
    policy = make_policy("keydiff") if inner == "keydiff" else Ends(last=last)
    sets = kept_by(Blockwise(inner=policy, block_size=7))
    at_once = kept_by(policy)
    assert any((a != b).any() for a, b in zip(sets[:, 0].flat, at_once[:, 0].flat, strict=True))
    for row, tokens in enumerate(np.asarray(tiny.batch(LENGTHS, PLAIN))):
        layers, _ = reference.run(weights(PLAIN), PLAIN, tokens[tokens >= 0])
        for index, layer in enumerate(layers):
            for head, kept in enumerate(sets[index, row]):
                expected = survivors(layer.k[head], BUDGET, 7, last)
                np.testing.assert_array_equal(kept, expected)


def test_each_head_fills_its_own_share():
    policy = make_policy("blockwise:ada:keydiff", block_size=16, alpha=0.0)
    uneven = kept_by(make_policy("ada:keydiff", alpha=0.0))
    for mine, other in zip(kept_by(policy).flat, uneven.flat, strict=True):
        assert len(mine) == len(other)


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("blockwise:kvzip", {"allocate": "layer"}, "its scores come from a second reading"),
        ("blockwise:blockwise", {}, "it works in blocks itself"),
        ("blockwise:critical", {}, "it chooses in two stages"),
        ("critical:blockwise", {}, "it leaves no more entries than the budget"),
        ("chunkkv:blockwise", {}, "put it in front, blockwise:chunkkv"),
        ("blockwise", {"block_size": 0}, "block_size=0 must be at least 1"),
    ],
)
def test_what_it_cannot_do_is_refused(name, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_policy(name, **settings)
