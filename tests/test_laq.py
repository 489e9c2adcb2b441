"""LAQ and LAQ++ from the prompt to the cut cache, against a float64 restatement of all passes."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.eval.grid.config import method_of
from lookahead_jax.generation.inputs import draft_tokens
from lookahead_jax.policies.base import WithDraft, WithLookup
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.prefilling.batching import pad_batch
from lookahead_jax.prompts.read import read_prompt
from tests import reference, tiny
from tests.test_decode_eviction import model
from tests.test_policies import (
    BUDGET,
    LENGTHS,
    RICH,
    TOLERANCE,
    check_heads,
    check_selection,
    kept_sets,
    protect,
    weights,
)

DRAFT = dict(draft_tokens=6, draft_window=8, draft_pool="avg", draft_kernel=3)
LAQ = make_policy("laq", **DRAFT, pool="max", kernel=5)
LAQ2 = make_policy("laq++", **DRAFT, pool="avg", kernel=3, window=5)


NEVER = (-2,)  # no token has this id


@functools.cache
def drafted(row, eos):
    """A prompt, and the tokens decoded on a copy of its cache that SnapKV has cut."""
    tokens = np.asarray(tiny.batch(LENGTHS, RICH))[row]
    tokens = tokens[tokens >= 0]
    layers, _ = reference.run(weights(RICH), RICH, tokens)
    kept = []
    for window, layer in zip(RICH.layer_window, layers, strict=True):
        scores = reference.snapkv(layer, len(tokens), 8, "avg", 3)
        scores[:, -8:] = np.inf
        first = 0 if window is None else len(tokens) - window + 1
        kept.append([reference.best(head, BUDGET, first) for head in scores])
    return tokens, reference.greedy_draft(weights(RICH), RICH, tokens, kept, 6, eos)


def read(policy, eos=NEVER, budget=BUDGET, draft=None):
    return read_prompt(
        weights(RICH), tiny.batch(LENGTHS, RICH), config=RICH, policy=policy, budget=budget,
        new_tokens=8, eos_ids=eos, with_scores=True, draft=draft,
    )  # fmt: skip


def check(policy, kind, kernel, eos=NEVER, **reductions):
    """Scores and kept entries are those of the draft's queries over the whole prompt."""
    result = read(policy, eos)
    sets, scores = kept_sets(result.cache), np.asarray(result.scores)
    for row, length in enumerate(LENGTHS):
        tokens, draft = drafted(row, eos)
        layers, _ = reference.run(weights(RICH), RICH, [*tokens, *draft])
        scored = length - policy.window
        observers = np.arange(scored, length + len(draft))
        for index, layer in enumerate(layers):
            expected = reference.observed(
                layer, length, observers, scored, kind, kernel, **reductions
            )
            pinned, allowed = protect(RICH, index, length, policy.window, 0)
            check_heads(scores[index, row], sets[index, row], expected, pinned, allowed)


def test_laq_scores_with_the_draft():
    check(LAQ, "max", 5)


@pytest.mark.parametrize(("reduce", "group"), [("max", "max"), ("max", "mean")])
def test_laq_may_take_the_largest_attention(reduce, group):
    policy = dataclasses.replace(LAQ, reduce=reduce, group=group)
    check(policy, "max", 5, reduce=getattr(np, reduce), group=getattr(np, group))


def test_laq_plus_plus_observes_with_the_last_prompt_queries_too_and_keeps_them():
    """Also with a sliding window, where these see what the next token no longer can."""
    check(LAQ2, "avg", 3)


def test_the_draft_ends_with_its_first_end_of_sequence():
    eos = (drafted(0, NEVER)[1][2],)
    cut = [len(drafted(row, eos)[1]) for row in range(len(LENGTHS))]
    assert cut[0] <= 3
    assert max(cut) == 6  # another row goes on
    check(LAQ, "max", 5, eos)


def test_a_draft_from_outside_that_equals_the_decoded_one_gives_its_scores():
    """One pass over prompt and draft scores and keeps what two passes do."""
    drafts = [drafted(row, NEVER)[1] for row in range(len(LENGTHS))]
    given = make_policy("laq", draft="trie", **DRAFT, pool="max", kernel=5)
    once = read(given, draft=jnp.asarray(np.array(drafts, np.int32)))
    twice = read(LAQ)
    expected = np.asarray(twice.scores)
    np.testing.assert_allclose(
        np.asarray(once.scores), expected, rtol=0, atol=TOLERANCE * expected.max()
    )
    kept, wanted = kept_sets(once.cache), kept_sets(twice.cache)
    for at in np.ndindex(kept.shape):
        np.testing.assert_array_equal(kept[at], wanted[at])


LOOKED_UP = make_policy(
    "laq++", draft="prompt", draft_tokens=6, draft_window=8, window=2, pool="max", kernel=5, ngram=4
)


def repeating_prompts():
    """Prompts of LENGTHS that repeat their end: long before it, not at all, and right before it."""
    rows = tiny.prompts(LENGTHS, 0, RICH.vocab_size)
    rows[0][20:23] = rows[0][-3:]
    rows[0][40:42] = rows[0][-2:]  # a shorter match, further right
    rows[2][-6:-3] = rows[2][-3:]
    return rows


def looked_up(row):
    """The six tokens behind the first of the longest matches of 2 to 4 tokens."""
    for n in (4, 3, 2):
        for start in range(len(row) - n):
            if row[start : start + n] == row[-n:]:
                return row[start + n : start + n + 6]
    return []


def test_a_draft_is_looked_up_in_the_prompt_and_snapkv_serves_those_without_one():
    rows = repeating_prompts()
    drafts = [looked_up(row) for row in rows]
    assert [len(draft) for draft in drafts] == [6, 0, 3]
    tokens = jnp.asarray(pad_batch(rows, config=RICH))
    result = read_prompt(
        weights(RICH), tokens, config=RICH, policy=LOOKED_UP, budget=BUDGET, new_tokens=8,
        with_scores=True,
    )  # fmt: skip
    sets, scores = kept_sets(result.cache), np.asarray(result.scores)
    for row, (prompt, draft) in enumerate(zip(rows, drafts, strict=True)):
        window, length = 2 if draft else 8, len(prompt)
        observers = np.arange(length - window, length + len(draft))
        layers, _ = reference.run(weights(RICH), RICH, [*prompt, *draft])
        for index, layer in enumerate(layers):
            expected = reference.observed(layer, length, observers, length - window, "max", 5)
            pinned, allowed = protect(RICH, index, length, window, 0)
            for head in range(RICH.num_kv_heads):
                tolerance = TOLERANCE * expected[head].max()
                np.testing.assert_allclose(
                    scores[index, row, head, : length - window], expected[head, :-window],
                    rtol=0, atol=tolerance,
                )  # fmt: skip
                check_selection(sets[index, row, head], expected[head], pinned, allowed, tolerance)


def test_a_trie_drafts_from_what_earlier_outputs_hold():
    """Its best path observes; a prompt whose end it has not seen has no draft."""
    trie, rows = make_drafter("trie"), tiny.prompts(LENGTHS, 0, RICH.vocab_size)
    trie.begin(0, [1, 2])
    trie.observe(0, [3, *rows[0][-2:], 5, 6, 7, 8, 9, 10, 11])
    trie.end(0)
    policy = make_policy("laq", draft="trie", draft_tokens=4, draft_window=8)
    assert policy.reading == WithDraft(tokens=4, by_drafter=True)
    found = np.asarray(draft_tokens(policy, None, rows, eos_ids=(), drafter=trie))
    assert found[0].tolist() == [5, 6, 7, 8]
    alone = np.asarray(draft_tokens(policy, None, rows[:1], eos_ids=()))
    assert alone[0].tolist() != [5, 6, 7, 8]  # a trie of its own knows the prompt alone
    unseen = draft_tokens(policy, None, [[1, 2, 3]], eos_ids=())
    assert np.asarray(unseen).tolist() == [[-1] * 4]
    # From here on the policy does what it does with draft=prompt.
    prompt = make_policy("laq", draft="prompt", draft_tokens=4, draft_window=8)
    assert policy.window_rows(BUDGET) == prompt.window_rows(BUDGET) == 8
    with pytest.raises(ValueError, match="use draft=prompt or draft=model, which need none"):
        read_prompt(
            weights(RICH), jnp.asarray(rows[:1]), config=RICH, policy=policy, budget=BUDGET,
            new_tokens=8,
        )  # fmt: skip


def test_one_pass_and_no_model_for_a_draft_from_the_prompt():
    policy = make_policy("laq", draft="prompt", draft_tokens="4", least="3")
    assert policy.reading == WithLookup(tokens=4, ngram=8, least=3)
    assert (policy.window_rows(64), policy.window_rows(32)) == (32, 16)
    inside = method_of("critical:laq:draft=prompt,least=3").policy
    assert inside.reading == WithLookup(tokens=8, ngram=8, least=3)


@pytest.mark.slow
def test_the_engine_looks_drafts_up_as_generate_does():
    """Each row is read alone there; here rows of other lengths are in the batch."""
    policy = make_policy("laq", draft="prompt", draft_tokens=6, draft_window=8)
    setting = dict(policy=policy, budget=BUDGET)
    rows = repeating_prompts()
    together = lk.generate(model(), rows, max_new_tokens=12, **setting)
    engine = lk.Engine(model(), rows=2, max_new_tokens=12, max_prompt_tokens=80, **setting)
    results = engine.run([lk.Request(prompt=row, max_new_tokens=12) for row in rows])
    assert [result.tokens for result in results] == together.tokens


def test_one_entry_per_head_inside_ada():
    policy = make_policy("ada", inner="laq++", **DRAFT)
    result = read(policy, budget=1)
    np.testing.assert_array_equal(np.asarray(result.cache.length).sum(2), RICH.num_kv_heads)
    assert np.isfinite(np.asarray(result.scores)).all()


@pytest.mark.parametrize(
    ("fields", "listed"),
    [
        (dict(draft_tokens=0), "draft_tokens=0"),
        (dict(window=-1), "window=-1"),
        (dict(kernel=4), "odd"),
        (dict(draft_kernel=4), "the draft's kernel=4 must be odd"),
        (dict(draft_window=0), "the draft's window=0"),
        (dict(draft="prompt", window=33), "window=33 must not exceed draft_window=32"),
        (dict(draft="prompt", least=9), "least=9 must be 1 to ngram=8"),
        (dict(draft="suffix"), "draft=suffix is not possible; choose model, prompt, trie"),
    ],
)
def test_impossible_fields(fields, listed):
    with pytest.raises(ValueError, match=listed):
        make_policy("laq", **fields)


def test_a_cut_draft_window_is_said():
    policy = make_policy("ada", inner="laq++")
    assert policy.notice(64) is None
    assert policy.notice(32) == "the draft's window 32 exceeds budget 32; reduced to 16"
    assert policy.window_rows(8) == 4
