"""SpecKV, SpecPC and KVzip against float64 restatements, batched and ragged."""

import dataclasses
import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.checkpoints.load import GenerationDefaults, Model, first_layers
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.prefilling.prefill import prefill
from lookahead_jax.prompts.kvzip_replay import NO_TEMPLATE, RepeatTemplate, repeat_template
from lookahead_jax.prompts.observers import reread
from lookahead_jax.prompts.read import read_prompt
from lookahead_jax.prompts.speculation import draft_answers, select_tokens, speculate
from tests import reference, tiny
from tests.test_policies import BUDGET, LENGTHS, RICH, TOLERANCE, kept_sets, protect, weights

SPECKV = make_policy("speckv", draft_tokens=5, window=6, pool="max", kernel=3)
DRAFTS = np.array([[3, 9, 27, 81, 50], [4, 16, 64, -1, -1], [5, 25, 12, 60, -1]], np.int32)


def rows_of(model):
    return [row[row >= 0] for row in np.asarray(tiny.batch(LENGTHS, model))]


def pooled(scores, kernel):
    return np.stack([reference.pool(row, "max", kernel) for row in scores])


def group_max(per_query_head, kv_heads):
    return per_query_head.reshape(kv_heads, -1, per_query_head.shape[-1]).max(1)


def test_speckv_takes_the_largest_attention_of_window_and_draft():
    result = read_prompt(
        weights(RICH), tiny.batch(LENGTHS, RICH), config=RICH, policy=SPECKV, budget=BUDGET,
        new_tokens=8, with_scores=True, draft=jnp.asarray(DRAFTS),
    )  # fmt: skip
    sets, scores = kept_sets(result.cache), np.asarray(result.scores)
    for row, tokens in enumerate(rows_of(RICH)):
        length, draft = len(tokens), DRAFTS[row][DRAFTS[row] >= 0]
        layers, _ = reference.run(weights(RICH), RICH, [*tokens, *draft])
        scored = length - 7
        for index, layer in enumerate(layers):
            seen = layer.probs[:, scored:, :scored].max(1)
            expected = group_max(pooled(seen, 3), RICH.num_kv_heads)
            np.testing.assert_allclose(
                scores[index, row, :, :scored], expected, rtol=0, atol=TOLERANCE * expected.max()
            )
            _, allowed = protect(RICH, index, length, 7, 0)
            for head in range(RICH.num_kv_heads):
                kept = sets[index, row, head]
                assert len(kept) == min(BUDGET, allowed.sum())
                assert set(range(scored, length)) <= set(kept)


SPARSE = make_policy("speckv", draft_tokens=5, window=6, pool="none", columns=12, band=12)
STEP = 16  # rows of a prompt at a time
LONG = (STEP * 3 + 7, STEP + 7)  # the observed window begins with a chunk


def read_sparsely(policy):
    tokens = tiny.batch(LONG, RICH)
    tokens = jnp.pad(tokens, [(0, 0), (0, -tokens.shape[1] % STEP)], constant_values=-1)
    length = (tokens >= 0).sum(1)
    observer = reread(
        weights(RICH), tokens, rows=policy.window_rows(BUDGET), response=jnp.asarray(DRAFTS[:2]),
        length=length, span=length + 8, config=RICH,
    )  # fmt: skip
    return tokens, prefill(
        weights(RICH), tokens, config=RICH, policy=policy, budget=BUDGET, slots=64, new_tokens=8,
        observer=observer, chunk=STEP, with_scores=True,
    )  # fmt: skip


def sparse_layers(tokens, draft):
    """The layers of one row, every entry gone from sight where band and columns leave it."""
    length = len(tokens)
    ids = [*tokens, *draft]
    entry = np.arange(len(ids))
    # A chunk that begins at s sees what lies at s - band and behind; the rest of the others.
    banded = -(-(entry + SPARSE.band + 1) // STEP) * STEP
    gone = np.full((RICH.num_layers, RICH.num_kv_heads, len(ids)), 10**6)
    scored = np.zeros((RICH.num_layers, RICH.num_kv_heads, length - 7))
    for index in range(RICH.num_layers):
        layers, _ = reference.run(weights(RICH), RICH, ids, gone=gone)
        seen = layers[index].probs[:, length - 7 :, : length - 7].max(1)
        scored[index] = group_max(seen, RICH.num_kv_heads)
        for head, scores in enumerate(scored[index]):
            order = -scores if length > SPARSE.columns + SPARSE.band else np.arange(length - 7)
            columns = np.argsort(order, kind="stable")[: SPARSE.columns]
            gone[index, head] = np.where(np.isin(entry, columns), 10**6, banded)
    return reference.run(weights(RICH), RICH, ids, gone=gone), scored, gone


def test_speckv_reads_long_prompts_by_band_and_columns():
    tokens, found = read_sparsely(SPARSE)
    for row, ids in enumerate(np.asarray(tokens)):
        ids, draft = ids[ids >= 0], DRAFTS[row][DRAFTS[row] >= 0]
        length = len(ids)
        (layers, hidden), scored, gone = sparse_layers(ids, draft)
        short = length <= SPARSE.columns + SPARSE.band
        assert (gone < length).any() != short, "rows that are covered whole are read densely"
        table = np.asarray(weights(RICH)["embed"], np.float64)
        logits = hidden[length - 1] @ table.T
        largest = np.abs(logits).max()
        np.testing.assert_allclose(found.logits[row], logits, rtol=0, atol=TOLERANCE * largest)
        scores = np.asarray(found.scores)[:, row, :, : length - 7]
        np.testing.assert_allclose(scores, scored, rtol=0, atol=TOLERANCE * scored.max())
        for index, layer in enumerate(layers):
            for head in range(RICH.num_kv_heads):
                pos = np.asarray(found.cache.pos)[index, row, head]
                kept = np.asarray(found.cache.k)[index, row, head][pos >= 0]
                expected = layer.k[head, pos[pos >= 0]]
                worst = TOLERANCE * np.abs(expected).max()
                np.testing.assert_allclose(kept, expected, rtol=0, atol=worst)


@pytest.mark.slow
def test_a_sparse_reading_that_covers_everything_is_the_dense_one():
    wide = dataclasses.replace(SPARSE, columns=20, band=20)
    _, sparse = read_sparsely(wide)
    _, dense = read_sparsely(dataclasses.replace(SPARSE, columns=0))
    for a, b, exact in zip(sparse.logits, dense.logits, np.array(LONG) <= 40, strict=True):
        close = np.allclose(a, b, rtol=0, atol=1e-5 * float(np.abs(b).max()))
        assert close == exact


def test_speckv_without_drafts_says_what_is_missing():
    model = tiny_model(RICH)
    with pytest.raises(ValueError, match=r"a draft per prompt \(1 prompts, drafts: none\)"):
        lk.generate(model, [[1, 2, 3]], policy=SPECKV, budget=2)
    with pytest.raises(ValueError, match=r"\(1 prompts, drafts: 2\): give drafts="):
        lk.generate(model, [[1, 2, 3]], policy=SPECKV, budget=2, drafts=[[1], [2]])
    with pytest.raises(ValueError, match="SpecKV needs a draft per prompt"):
        lk.score(model, np.array([[1, 2, 3]], np.int32), policy=SPECKV, budget=2)


def test_speckv_takes_its_drafts_from_a_small_model():
    model, prompts = tiny_model(RICH), [[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7]]
    small = first_layers(model, 1)
    drafts = draft_answers(small, prompts, policy=SPECKV, eos_ids=[5])
    expected = [
        lk.generate(small, [p], policy=lk.make_policy("full"), max_new_tokens=5, eos_ids=[5])
        for p in prompts
    ]
    assert drafts == [result.tokens[0] for result in expected]
    settings = dict(policy=SPECKV, budget=4, max_new_tokens=4, eos_ids=[5])
    by_model = lk.generate(model, prompts, drafts=small, **settings)
    by_hand = lk.generate(model, prompts, drafts=drafts, **settings)
    assert by_model.tokens == by_hand.tokens
    np.testing.assert_array_equal(by_model.kept, by_hand.kept)
    with pytest.raises(ValueError, match="SnapKV reads no drafts"):
        draft_answers(small, prompts, policy=lk.make_policy("snapkv"), eos_ids=[])
    few = dataclasses.replace(small, config=dataclasses.replace(small.config, vocab_size=9))
    with pytest.raises(ValueError, match="token id 9 and the draft model only 9 tokens"):
        draft_answers(few, prompts, policy=SPECKV, eos_ids=[])


def tiny_model(config):
    defaults = GenerationDefaults(
        bos_id=None, eos_ids=(), pad_id=None, temperature=None, top_k=None, top_p=None
    )
    return Model(
        params=weights(config),
        config=config,
        tokenizer=None,
        generation=defaults,
        path=Path("tiny"),
    )


@functools.cache
def replayed(row, chunk, sinks, template, name):
    """Scores of kvzip or kvzip+ of one row per layer [K, T], from whole sequences and no cache."""
    tokens = rows_of(RICH)[row]
    length = len(tokens)
    scores = [np.zeros((RICH.num_kv_heads, length)) for _ in range(RICH.num_layers)]
    for first in range(0, length, chunk):
        part = tokens[first : first + chunk]
        before = tokens[max(first - 8, 0) : first]
        ids = [*template[bool(first)], *before, *template.answer, *part]
        layers, _ = reference.run(weights(RICH), RICH, [*tokens, *ids])
        seen = np.zeros(length + len(ids), bool)
        seen[:sinks] = seen[first : first + chunk] = seen[length:] = True
        for index, layer in enumerate(layers):
            logits = np.where(seen[None, None], layer.logits[:, length:], -np.inf)
            beside = layer.sinks[:, None, None]
            probs = reference.softmax_beside(beside, logits)[..., :length]
            if name == "kvzip+":
                norms = np.linalg.norm(layer.residual[length:], axis=-1)
                o = np.asarray(weights(RICH)["layers"]["o"][index], np.float64)
                v = np.repeat(layer.v[:, :length], RICH.num_heads // RICH.num_kv_heads, axis=0)
                added = np.linalg.norm(np.einsum("nth,nhd->ntd", v, o), axis=-1)
                probs = probs / norms[None, :, None] * added[:, None]
            most = probs.max(1)
            scores[index] = np.maximum(scores[index], group_max(most, RICH.num_kv_heads))
    return scores


@pytest.mark.parametrize(
    ("name", "allocate"),
    [
        ("kvzip", "global"),
        ("kvzip+", "global"),
        pytest.param("kvzip", "layer", marks=pytest.mark.slow),
    ],
)
def test_kvzip_keeps_what_a_replay_looks_at(name, allocate):
    policy = make_policy(name, chunk="32", sinks="2", allocate=allocate)
    template = RepeatTemplate((7, 8, 9), (10, 11), (12,))
    result = read_prompt(
        weights(RICH), tiny.batch(LENGTHS, RICH), config=RICH, policy=policy, budget=BUDGET,
        new_tokens=8, with_scores=True, repeat_template=template,
    )  # fmt: skip
    sets, scores = kept_sets(result.cache), np.asarray(result.scores)
    heads, layers = RICH.num_kv_heads, RICH.num_layers
    for row, tokens in enumerate(rows_of(RICH)):
        length = len(tokens)
        expected = replayed(row, 32, 2, template, name)
        ranked, sizes = [], []
        for index in range(layers):
            got = scores[index, row, :, :length]
            largest = expected[index].max()
            pinned, allowed = protect(RICH, index, length, 0, 2)
            shown = np.where(allowed, expected[index], 0.0)
            where = np.broadcast_to(allowed, got.shape)
            np.testing.assert_allclose(got[where], shown[where], rtol=0, atol=TOLERANCE * largest)
            ranked.append(
                np.where(pinned & allowed, np.inf, np.where(allowed, expected[index], -np.inf))
            )
            sizes.append([len(sets[index, row, head]) for head in range(heads)])
            for head in range(heads):
                assert set(np.flatnonzero(pinned & allowed)) <= set(sets[index, row, head])
        if allocate == "layer":
            for index in range(layers):
                room = int((ranked[index] > -np.inf).sum())
                assert sum(sizes[index]) == min(heads * min(BUDGET, length), room)
            continue
        total = layers * heads * min(BUDGET, length)
        assert sum(map(sum, sizes)) == total
        order = np.sort(np.concatenate([r.ravel() for r in ranked]))[::-1]
        threshold = order[total - 1]
        for index in range(layers):
            for head in range(heads):
                kept = np.zeros(length, bool)
                kept[sets[index, row, head]] = True
                sure = ranked[index][head] > threshold + TOLERANCE
                never = ranked[index][head] < threshold - TOLERANCE
                assert kept[sure].all()
                assert not kept[never].any()


def test_a_repetition_begins_where_the_model_answers():
    tokenizer, kvzip = lk.load(lk.EMBEDDED_MODEL).tokenizer, make_policy("kvzip")
    plain = dataclasses.replace(tokenizer, chat_templates={})
    texts = [tokenizer.decode(ids) for ids in repeat_template(kvzip, plain)]
    assert texts[0] == "\n\nRepeat the previous context exactly."
    assert texts[1] == "\n\nRepeat the part of the previous context exactly, starting with "
    assert texts[2] == "\n\nAnswer: "
    template = "<u>{{ messages[0].content }}</u>{% if add_generation_prompt %}<a>{% endif %}"
    chatty = dataclasses.replace(tokenizer, chat_templates={"default": template})
    assert tokenizer.decode(repeat_template(kvzip, chatty).answer) == "</u><a>"
    assert repeat_template(kvzip, None) == NO_TEMPLATE
    assert repeat_template(SPECKV, plain) == NO_TEMPLATE


@pytest.mark.slow
def test_the_small_model_s_attention_and_answers():
    model = tiny_model(RICH)
    rows = [row.tolist() for row in rows_of(RICH)]
    found = speculate(model, rows, tokens=6, eos_ids=(), attention=True, window=16, first_layer=1)
    first = min(1, RICH.num_layers // 2)
    for i, row in enumerate(rows):
        layers, _ = reference.run(weights(RICH), RICH, row)
        weight = np.linspace(0, 1, 16)[:, None]
        weighted = [(layer.probs[:, -16:] * weight).max((0, 1)) for layer in layers[first:]]
        expected = np.max(weighted, axis=0)
        np.testing.assert_allclose(found.attention[i], expected, atol=TOLERANCE)
    plain = lk.generate(model, rows, policy=make_policy("full"), max_new_tokens=6)
    assert found.answers == plain.tokens


def neighbourhoods(attention, keep, pool, neighbours, window):
    """SpecPC's choice, one token after the other."""
    length = len(attention)
    around = [(j - (pool - 1) // 2, j + pool - 1 - (pool - 1) // 2) for j in range(length)]
    smooth = [max(attention[max(a, 0) : b + 1]) for a, b in around]
    line = list(range(length - window, length))
    offsets = [0] + [sign * d for d in range(1, neighbours) for sign in (-1, 1)]
    reach = range(-((neighbours - 1) // 2), neighbours - (neighbours - 1) // 2)
    for best in sorted(range(length), key=lambda j: (-smooth[j], j))[:keep]:
        line += [best + d for d in offsets if d in reach and 0 <= best + d < length]
    return sorted(list(dict.fromkeys(line))[:keep])


@pytest.mark.parametrize(("pool", "neighbours"), [(1, 8), (32, 32), (7, 5), (64, 1)])
def test_specpc_keeps_neighbourhoods_of_the_best_tokens_and_the_end(pool, neighbours):
    rng = np.random.default_rng(pool)
    for _ in range(8):
        attention = (rng.random(300) ** 8).astype(np.float32)
        kept = select_tokens(attention, 90, pool=pool, neighbours=neighbours, window=16)
        assert kept.tolist() == neighbourhoods(attention, 90, pool, neighbours, 16)
    assert select_tokens(attention, 300).tolist() == list(range(300))
    assert len(select_tokens(attention, 10, window=64)) == 10
