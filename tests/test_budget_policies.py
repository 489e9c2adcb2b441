"""layers and threshold: how many entries layers and heads keep, against NumPy."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.eval.grid.config import method_of
from lookahead_jax.policies.registry import make_policy
from tests import reference, tiny
from tests.test_policies import (
    BUDGET,
    LENGTHS,
    PLAIN,
    RICH,
    TOLERANCE,
    check_selection,
    kept_sets,
    protect,
    read,
    restated,
)

WINDOW = 6


@pytest.fixture
def shares(tmp_path):
    path = tmp_path / "shares.json"
    path.write_text(json.dumps([4, 1.5, 0.5]))
    return str(path)


def test_layers_keep_their_shares_of_the_best_entries(shares):
    """48, 18 and 6 of 24 entries on average; a row of 33 tokens has no more for the first layer."""
    policy = make_policy("layers:snapkv", shares=shares, window=WINDOW)
    tokens = tiny.batch(LENGTHS, PLAIN)
    sets = kept_sets(read(PLAIN, tokens, policy).cache)
    for row, (length, layers) in enumerate(restated(PLAIN)):
        for index, (layer, share) in enumerate(zip(layers, (48, 18, 6), strict=True)):
            expected = reference.snapkv(layer, length, WINDOW, "max", 7)
            pinned, allowed = protect(PLAIN, index, length, WINDOW, 0)
            for head, kept in enumerate(sets[index, row]):
                assert len(kept) == min(share, length)
                check_selection(kept, expected[head], pinned, allowed, TOLERANCE)


def test_shares_are_rounded_to_the_budget_and_short_prompts_stay_whole(shares):
    policy, lengths = make_policy("layers", shares=shares), jnp.asarray([100, 7, 3])
    entries = np.asarray(policy.layer_budgets(lengths, 7, PLAIN))
    # 14, 5.25 and 1.75 entries: the largest remainder is rounded up.
    assert entries.T.tolist() == [[14, 5, 2], [7, 7, 7], [3, 3, 3]]
    assert policy.max_entries(100, 7, PLAIN) == 14
    assert policy.max_entries(10, 7, PLAIN) == 10
    even = make_policy("layers").layer_budgets(lengths, 7, PLAIN)
    np.testing.assert_array_equal(even, make_policy("snapkv").layer_budgets(lengths, 7, PLAIN))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[1, 2", "is not JSON"),
        ('{"a": 1}', "is not a list of shares"),
        ("[1, -2, 3]", "is not a list of shares"),
        ("[0, 0, 0]", "is not a list of shares"),
        ("[1, true, 3]", "is not a list of shares"),
        ("[1, 2]", "2 shares do not fit this model of 3 layers"),
    ],
)
def test_files_of_other_things_are_refused(tmp_path, content, complaint):
    path = tmp_path / "shares.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=complaint):
        make_policy("layers", shares=str(path)).max_entries(10, 4, PLAIN)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        make_policy("layers", shares=str(tmp_path / "none.json"))


def test_a_threshold_keeps_what_reaches_it_up_to_the_budget():
    """Some heads reach the cap and others leave slots empty, also behind a sliding window."""
    least = 0.012
    policy = method_of(f"threshold:snapkv:window={WINDOW},pool=none,least={least}").policy
    sets = kept_sets(read(RICH, tiny.batch(LENGTHS, RICH), policy).cache)
    sizes = set()
    for row, (length, layers) in enumerate(restated(RICH)):
        for index, layer in enumerate(layers):
            expected = reference.snapkv(layer, length, WINDOW, "none", 1)
            pinned, allowed = protect(RICH, index, length, WINDOW, 0)
            for head, kept in enumerate(sets[index, row]):
                tolerance = TOLERANCE * expected[head].max()
                ranked = np.where(pinned, np.inf, np.where(allowed, expected[head], -np.inf))
                most, fewest = ((ranked >= least + t).sum() for t in (-tolerance, tolerance))
                assert min(BUDGET, fewest) <= len(kept) <= min(BUDGET, most)
                check_selection(kept, expected[head], pinned, allowed, tolerance)
                sizes.add(len(kept))
    assert min(sizes) < max(sizes) == BUDGET
