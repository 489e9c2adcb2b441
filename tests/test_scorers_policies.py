"""knorm, lagkv, critical and chunkkv against float64 restatements, and policies around others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.cli.options import EvictionOptions, ModelOptions
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.eval.grid.config import method_of
from lookahead_jax.model.quantization import QuantizedWeight, quantize
from lookahead_jax.policies import critical
from lookahead_jax.policies.ada import Ada
from lookahead_jax.policies.base import CutByEntries
from lookahead_jax.policies.chunkkv import ChunkKV
from lookahead_jax.policies.critical import Critical
from lookahead_jax.policies.keydiff import KeyDiff
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.prompts.read import read_prompt
from tests import reference, tiny
from tests.test_decode_eviction import model
from tests.test_policies import (
    BUDGET,
    LENGTHS,
    MODELS,
    PLAIN,
    RICH,
    TOLERANCE,
    check_selection,
    fake_view,
    kept_sets,
    protect,
    read,
    restated,
    weights,
)

LAG, SINKS, CHUNK, WINDOW = 7, 3, 5, 6


def knorm(layer, length):
    return -np.sqrt((layer.k[:, :length] ** 2).sum(-1))


def lagkv(layer, length, compare):
    """Scores [K, T]; entries without one have NaN."""
    scores = np.full((layer.k.shape[0], length), np.nan)
    for head in range(len(scores)):
        for start in range(SINKS, length - 2 * LAG + 1, LAG):
            parts = []
            for rows in (layer.k[head], layer.v[head]):
                here, following = rows[start : start + LAG], rows[start + LAG : start + 2 * LAG]
                low, high = following.min(0), following.max(0)
                deviation = [np.std((row - low) / (high - low), ddof=1) for row in here]
                parts.append(reference.softmax(np.array(deviation)))
            mean = (parts[0] + parts[1]) / 2
            rank = [(mean < x).sum() / LAG for x in mean]
            scores[head, start : start + LAG] = rank if compare == "partition" else mean
    return scores


def projected(layer, length, index, config):
    """|W_o v|_1 of every entry, mean over the query heads of a group: [K, T]."""
    o = np.asarray(weights(config)["layers"]["o"][index], np.float64)
    group = config.num_heads // config.num_kv_heads
    norms = [np.abs(layer.v[n // group, :length] @ o[n]).sum(-1) for n in range(len(o))]
    return reference.group_mean(np.array(norms), config.num_kv_heads)


def best_of(ranked, count):
    """Positions of the `count` best, ties to the earlier."""
    return reference.best(ranked, count, 0)


def two_stages(ranked, norms, count, ratio):
    """What one head keeps of `ranked` [T], which has inf and -inf."""
    first = best_of(ranked, int(count * ratio))
    weighed = np.where(np.isinf(ranked), ranked, (ranked + 1e-4) * norms)
    weighed[first] = np.inf
    return best_of(weighed, count)


def chunked(ranked):
    """Every finite score replaced by the mean of the finite ones of its chunk."""
    out = ranked.copy()
    for start in range(0, len(ranked), CHUNK):
        part = out[start : start + CHUNK]
        finite = np.isfinite(part)
        if finite.any():
            part[finite] = part[finite].mean()
    return out


def cases(result, model, observers=""):
    """Every layer of every row: kept entries and the restated layer."""
    sets = kept_sets(result.cache)
    for row, (length, layers) in enumerate(restated(model, observers)):
        for index, layer in enumerate(layers):
            yield row, index, layer, length, sets[index, row]


def test_knorm():
    model = RICH
    result = read(model, tiny.batch(LENGTHS, model), make_policy("knorm"))
    for row, index, layer, length, kept in cases(result, model):
        expected = knorm(layer, length)
        atol = TOLERANCE * np.abs(expected).max()
        got = np.asarray(result.scores)[index, row, :, :length]
        np.testing.assert_allclose(got, expected, rtol=0, atol=atol)
        pinned, allowed = protect(model, index, length, 0, 0)
        for head, positions in enumerate(kept):
            assert len(positions) == min(BUDGET, allowed.sum())
            check_selection(positions, expected[head], pinned, allowed, atol)


@pytest.mark.parametrize(("compare", "model_name"), [("partition", "rich"), ("prompt", "plain")])
def test_lagkv(compare, model_name):
    model = MODELS[model_name]
    policy = make_policy("lagkv", lag_size=LAG, n_sink=str(SINKS), compare=compare)
    result = read(model, tiny.batch(LENGTHS, model), policy)
    for row, index, layer, length, kept in cases(result, model):
        expected = lagkv(layer, length, compare)
        scored = np.isfinite(expected[0])
        got = np.asarray(result.scores)[index, row, :, :length]
        np.testing.assert_allclose(got[:, scored], expected[:, scored], rtol=0, atol=TOLERANCE)
        pinned, allowed = protect(model, index, length, 0, 0)
        pinned |= ~scored
        assert LAG <= pinned[SINKS:].sum() < 2 * LAG
        for head, positions in enumerate(kept):
            ranked = np.where(scored, expected[head], 1.0)
            assert len(positions) == min(BUDGET, allowed.sum())
            check_selection(positions, ranked, pinned, allowed, TOLERANCE)


def test_lagkv_without_a_whole_partition_keeps_sinks_and_the_newest():
    policy = make_policy("lagkv")
    assert policy.notice(256) is None
    assert (
        policy.notice(132) == "lag_size 128 leaves budget 132 to sinks and the most recent entries"
    )
    result = read(PLAIN, tiny.batch(LENGTHS, PLAIN), policy)
    for _, _, _, length, kept in cases(result, PLAIN):
        for positions in kept:
            expected = [0, 1, 2, 3, *range(length - BUDGET + 4, length)]
            np.testing.assert_array_equal(positions, expected)


def test_lagkv_counts_a_constant_channel_as_nothing():
    """Entries in any order of slots, and garbage in empty ones, give the same scores."""
    policy = make_policy("lagkv", lag_size=4, n_sink=1, compare="prompt")
    rng = np.random.default_rng(0)
    k = rng.standard_normal((1, 2, 16, 5)).astype(np.float32)
    k[..., 2] = 1.0
    pos = np.r_[np.arange(14), -1, -1].astype(np.int32)
    shuffled = rng.permutation(16)
    scores = []
    for order in (np.arange(16), shuffled):
        keys = np.where((pos[order] < 0)[:, None], np.nan, k[:, :, order])
        view = fake_view(
            jnp.zeros((1, 2, 16)), jnp.asarray(pos[order])[None, None], jnp.array([14])
        )
        scores.append(np.asarray(policy.score(view._replace(k=keys, v=keys)))[..., order.argsort()])
    np.testing.assert_array_equal(scores[0][..., :14], scores[1][..., :14])
    for start in (1, 5):
        low, high = (f(k[0, 0, start + 4 : start + 8], axis=0) for f in (np.min, np.max))
        normed = (k[0, 0, start : start + 4] - low) / np.where(high > low, high - low, np.inf)
        expected = reference.softmax(np.std(normed.astype(np.float64), axis=-1, ddof=1))
        np.testing.assert_allclose(scores[0][0, 0, start : start + 4], expected, rtol=1e-5)


def inner_scores(inner, layer, length):
    if inner == "snapkv":
        return reference.snapkv(layer, length, WINDOW, "avg", 3)
    if inner == "keydiff":
        return reference.keydiff(layer, length)
    return reference.observed(
        layer, length, np.arange(length, layer.probs.shape[1]), length, "none", 1
    )


def settings(inner):
    return dict(window=WINDOW, pool="avg", kernel=3) if inner == "snapkv" else {}


@pytest.mark.parametrize(
    ("name", "model_name", "ratio"),
    [
        ("critical:snapkv", "plain", 0.5),
        ("critical:snapkv", "rich", 0.3),
        ("critical:ada:snapkv", "plain", 0.5),
        ("critical:lookaheadkv", "rich", 0.5),
        ("critical:chunkkv:snapkv", "plain", 0.0),
        ("chunkkv:snapkv", "rich", None),
        ("chunkkv:ada:keydiff", "plain", None),
    ],
)
def test_policies_around_others(name, model_name, ratio):
    model, parts = MODELS[model_name], name.split(":")
    inner = parts[-1]
    own = {} if ratio is None else {"first_stage_ratio": ratio}
    own |= {"chunk_size": CHUNK} if "chunkkv" in parts else {}
    policy = make_policy(name, **own, **settings(inner))
    result = read(model, tiny.batch(LENGTHS, model), policy)
    changed = 0
    observers = "lookahead" if inner == "lookaheadkv" else ""
    for row, index, layer, length, kept in cases(result, model, observers):
        scores = inner_scores(inner, layer, length)
        got = np.asarray(result.scores)[index, row, :, :length]
        np.testing.assert_allclose(got, scores, rtol=0, atol=TOLERANCE * np.abs(scores).max())
        pinned, allowed = protect(model, index, length, WINDOW if inner == "snapkv" else 0, 0)
        ranked = np.where(pinned & allowed, np.inf, np.where(allowed, scores, -np.inf))
        if "chunkkv" in parts:
            ranked = np.array([chunked(row) for row in ranked])
        budgets = [min(BUDGET, allowed.sum())] * len(ranked)
        if "ada" in parts:
            budgets = reference.ada(ranked, BUDGET, 0.2)
        norms = projected(layer, length, index, model)
        for head, positions in enumerate(kept):
            expected = best_of(ranked[head], budgets[head])
            if "critical" in parts:
                alone, expected = (
                    expected,
                    two_stages(ranked[head], norms[head], budgets[head], ratio),
                )
                changed += set(alone) != set(expected)
            np.testing.assert_array_equal(positions, expected)
    assert changed > 0 or "critical" not in parts


def test_chunks_are_kept_whole_but_one():
    policy = make_policy("chunkkv:keydiff", chunk_size=CHUNK)
    for _, _, _, length, kept in cases(read(PLAIN, tiny.batch(LENGTHS, PLAIN), policy), PLAIN):
        for positions in kept:
            counts = np.bincount(positions // CHUNK)
            whole = np.minimum(CHUNK, length - CHUNK * np.arange(len(counts)))
            part = np.flatnonzero((counts > 0) & (counts < whole))
            assert len(part) <= 1
            for chunk in part:  # its first entries
                inside = positions[positions // CHUNK == chunk] - chunk * CHUNK
                np.testing.assert_array_equal(inside, np.arange(counts[chunk]))


def test_chunks_come_from_positions_not_from_slots():
    policy = make_policy("chunkkv", chunk_size=4)
    rng = np.random.default_rng(2)
    pos = np.array([[9, -1, 0, 23, 3, 8, 11, -1, 21, 2], [4, 5, 6, 7, 12, 40, 41, 1, 0, -1]])
    scores = rng.standard_normal((1, 2, 10)).astype(np.float32)
    competing = (pos >= 0) & (pos != 8) & (pos != 41)
    got = np.asarray(
        policy.adjust(
            jnp.asarray(np.where(pos < 0, np.nan, scores)),
            jnp.asarray(pos[None], jnp.int32),
            jnp.asarray(competing[None]),
        )
    )
    for head, slot in np.argwhere(competing):
        mates = competing[head] & (pos[head] // 4 == pos[head, slot] // 4)
        np.testing.assert_allclose(got[0, head, slot], scores[0, head, mates].mean(), rtol=1e-5)
    np.testing.assert_array_equal(got[0][~competing & (pos >= 0)], scores[0][[0, 1], [5, 6]])


@pytest.mark.parametrize("blocks", [1, 10**9])
@pytest.mark.parametrize("quantized", [False, True])
def test_projected_norms(blocks, quantized, monkeypatch):
    monkeypatch.setattr(critical, "_PROJECTED", blocks)
    rng = np.random.default_rng(1)
    v = rng.standard_normal((2, 3, 21, 8)).astype(np.float32)
    o = rng.standard_normal((6, 8, 10)).astype(np.float32)
    weight, exact = jnp.asarray(o), o.astype(np.float64)
    if quantized:
        values, scale = quantize(o, (0, 1))
        weight = QuantizedWeight(jnp.asarray(values), jnp.asarray(scale), jnp.zeros(1))
        exact = values.astype(np.float64) * scale
    got = np.asarray(jax.jit(critical.projected_norms)(jnp.asarray(v), weight))
    for row, head in np.ndindex(2, 3):
        both = [np.abs(v[row, head] @ exact[n]).sum(-1) for n in (2 * head, 2 * head + 1)]
        np.testing.assert_allclose(got[row, head], np.mean(both, axis=0), rtol=1e-5)


def test_critical_and_ada_in_either_order_keep_the_same():
    tokens = tiny.batch(LENGTHS, RICH)
    one, other = (
        read(RICH, tokens, make_policy(name, window=WINDOW, alpha=0.1)).cache
        for name in ("critical:ada:snapkv", "ada:critical:snapkv")
    )
    np.testing.assert_array_equal(one.pos, other.pos)
    assert (np.asarray(one.length) != BUDGET).any()


@pytest.mark.parametrize("name", ["critical:kvzip", "chunkkv:kvzip"])
def test_around_kvzip(name):
    """Behind two passes: the choice among kvzip's own scores, with its shares of heads."""
    inner = dict(allocate="layer", chunk=32, sinks=2)
    policy = make_policy(name, **inner, **({"chunk_size": CHUNK} if "chunkkv" in name else {}))
    tokens = tiny.batch(LENGTHS, PLAIN)
    result = read_prompt(
        weights(PLAIN), tokens, config=PLAIN, policy=policy, budget=BUDGET, new_tokens=8,
        with_scores=True,
    )  # fmt: skip
    for row, index, layer, length, kept in cases(result, PLAIN):
        ranked = np.asarray(result.scores, np.float64)[index, row, :, :length]
        ranked[:, :2] = np.inf
        if "chunkkv" in name:
            ranked = np.array([chunked(row) for row in ranked])
        order = np.argsort(-ranked.reshape(-1), kind="stable")[: BUDGET * len(ranked)]
        norms = projected(layer, length, index, PLAIN)
        for head, positions in enumerate(kept):
            count = int((order // length == head).sum())
            expected = best_of(ranked[head], count)
            if "critical" in name:
                expected = two_stages(ranked[head], norms[head], count, 0.5)
            np.testing.assert_array_equal(positions, expected)


def test_critical_needs_the_projection():
    view = fake_view(jnp.zeros((1, 1, 3)), jnp.arange(3)[None, None], jnp.array([3]))
    ranked, budgets = jnp.zeros((1, 1, 3)), jnp.ones((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="output projection"):
        make_policy("critical").rerank(ranked, budgets, view)


def test_names_nest():
    expected = Critical(inner=Ada(inner=SnapKV(window=8), alpha=0.3))
    assert make_policy("critical:ada:snapkv", window=8, alpha="0.3") == expected
    assert make_policy("critical", inner="ada", window=8, alpha=0.3) == expected
    assert make_policy("critical", inner="ada:snapkv", window=8, alpha=0.3) == expected
    assert make_policy("critical:ada", inner="snapkv", window=8, alpha=0.3) == expected
    assert make_policy("critical:ada", inner=SnapKV(window=8), alpha=0.3) == expected
    assert method_of("critical:ada:snapkv:window=8,alpha=0.3").policy == expected
    assert method_of("critical:ada").policy == make_policy("critical:ada")
    nested = method_of("chunkkv:inner=ada:keydiff,chunk_size=7").policy
    assert nested == ChunkKV(inner=Ada(inner=KeyDiff()), chunk_size=7)
    assert nested.decode_cut == CutByEntries()
    options = EvictionOptions(
        policy="critical:ada:snapkv", policy_arg=("window=8", "alpha=0.3"), budget=3
    )
    assert options.resolve(ModelOptions()).policy == expected


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("critical:snapvk", {}, "unknown policy 'snapvk' in 'critical:snapvk'; known: full, "),
        ("critical:", {}, "unknown policy '' in 'critical:'"),
        (
            "snapkv:ada",
            {},
            "policy 'snapkv:ada': snapkv wraps no other policy, only ada, critical, chunkkv, "
            "layers, threshold, blockwise, rerotate do",
        ),
        ("critical:full", {}, "Critical cannot wrap Full: it keeps everything"),
        ("chunkkv:full", {}, "ChunkKV cannot wrap Full: it keeps everything"),
        ("critical:kvzip", {}, "cannot wrap KVzip: .* set allocate=layer"),
        ("chunkkv:ada:kvzip", {}, "cannot wrap KVzip: .* set allocate=layer"),
        ("critical:critical", {}, "Critical cannot wrap Critical: it weighs values itself"),
        ("critical:ada:critical", {}, "Critical cannot wrap Critical: it weighs values itself"),
        ("ada:critical:ada", {}, "Ada cannot wrap Ada: it shares budgets among heads itself"),
        ("chunkkv:ada:chunkkv", {}, "ChunkKV cannot wrap ChunkKV"),
        ("ada:threshold", {}, "Ada cannot wrap Threshold: .*put it in front, threshold:ada"),
        ("threshold:chunkkv:threshold", {}, "Threshold cannot wrap Threshold"),
        ("layers:ada:pyramidkv", {}, "Layers cannot wrap PyramidKV: it shares budgets among lay"),
        ("chunkkv:critical", {}, "ChunkKV cannot wrap Critical: .*critical:chunkkv"),
        ("critical:ada:keydiff", {}, "Critical cannot wrap KeyDiff: its scores are negative"),
        ("critical:knorm", {}, "Critical cannot wrap KNorm: its scores are negative"),
        ("critical:qfilter", {}, "Critical cannot wrap QFilter: its scores are negative"),
        ("critical:rkv", {}, "Critical cannot wrap RKV: its scores are negative"),
        ("rkv", {"attention": 2}, "attention=2.0 must lie between 0 and 1"),
        ("rkv", {"preset": "factory"}, "unknown argument 'preset'"),
        ("critical:expected_attention", {}, "set values=none"),
        ("critical:snapkv", {"inner": "tova"}, "unknown argument 'inner'"),
        ("critical:ada:snapkv", {"kernels": 3}, "unknown argument 'kernels'"),
        ("critical", {"first_stage_ratio": 2}, "between 0 and 1"),
        ("chunkkv", {"chunk_size": 0}, "at least 1"),
        ("lagkv", {"lag_size": 0}, "at least 1"),
        ("lagkv", {"compare": "all"}, "partition, prompt"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(name, arguments, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        make_policy(name, **arguments)
    assert "\n" not in str(error.value)


def test_expected_attention_without_the_norm_of_the_value():
    policy = make_policy("critical:expected_attention", values="none", sinks=2)
    result = read(PLAIN, tiny.batch(LENGTHS, PLAIN), policy)
    for row, index, layer, length, _ in cases(result, PLAIN):
        expected = reference.expected_attention(layer, length, PLAIN, index, 2, 512, 0.0)
        expected = expected / np.linalg.norm(layer.v[:, :length], axis=-1)
        got = np.asarray(result.scores)[index, row, :, :length]
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * expected.max())


@pytest.mark.parametrize(
    "name",
    [
        "lagkv:lag_size=4",
        "critical:h2o:window=3",
        pytest.param("ada:pyramidkv:window=4", marks=pytest.mark.slow),
        pytest.param("knorm", marks=pytest.mark.slow),
        pytest.param("chunkkv:keydiff:chunk_size=4", marks=pytest.mark.slow),
    ],
)
def test_drafts_change_nothing_where_texts_are_cut_again(name):
    prompts = [[int(t) for t in row] * 4 for row in tiny.prompts((8, 5))]
    policy = method_of(name).policy
    options = dict(policy=policy, budget=12, max_new_tokens=30, evict_every=8, eos_ids=())
    plain = lk.generate(model(), prompts, **options)
    drafted = lk.generate(
        model(), prompts, drafter=make_drafter("prompt_lookup"), draft_nodes=8, **options
    )
    assert [len(tokens) for tokens in plain.tokens] == [30, 30]
    assert drafted.tokens == plain.tokens
