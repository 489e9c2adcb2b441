"""Cutting while decoding: against a float64 restatement, drafted and undrafted, in an engine."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lookahead_jax as lk
from lookahead_jax.checkpoints.load import GenerationDefaults, Model
from lookahead_jax.decoding.device_drafter import Given
from lookahead_jax.decoding.draft_packing import pack
from lookahead_jax.decoding.eviction import DecodeEviction, evict, opening_question, opening_sums
from lookahead_jax.decoding.sampling import GREEDY, sampling_rows
from lookahead_jax.decoding.state import start
from lookahead_jax.decoding.step import decode_burst, decode_step
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.prompts.read import read_prompt
from tests import reference, tiny
from tests.drafted import Shared, bush, perfect, spoil
from tests.test_kvzap import surrogate_of
from tests.test_policies import PLAIN, RICH, kept_sets, lookahead_modules, weights

BUDGET, INTERVAL, NEW = 12, 8, 30
LENGTHS = (33, 16, 5)  # off the interval, on it, shorter than the budget
POLICIES = {
    "streaming_llm": make_policy("streaming_llm", sinks=2),
    "keydiff": make_policy("keydiff"),
    "h2o": make_policy("h2o", window=3),
    "lookaheadkv": make_policy("lookaheadkv", window=2),
    "snapkv": make_policy("snapkv", window=3, kernel=3),
    "rkv": make_policy("rkv", window=3, kernel=3, attention=0.4),
    # Its window exceeds the shortest prompt.
    "question": make_policy("snapkv", window=6, kernel=3, observers="question"),
}
# Last tokens, always kept.
WINDOWS = {"h2o": 3, "lookaheadkv": 2, "snapkv": 3, "rkv": 3, "question": 6, "kvzap": 3}
ADDS_UP, LEAST = ("h2o", "kvzap"), 1.0
CUT_AS_READ = "incremental:threshold:kvzap"
TIE = 1e-6  # of two scores, relative: float32 rounds them, and the restatement does not


@pytest.fixture(scope="module", autouse=True)
def surrogate(tmp_path_factory):
    """kvzap cannot do without a file."""
    path = tmp_path_factory.mktemp("kvzap") / "surrogate.safetensors"
    safetensors.numpy.save_file(surrogate_of(RICH, 0), path)
    settings: dict[str, Any] = {"file": str(path), "window": 3}
    POLICIES["kvzap"] = make_policy("kvzap", **settings)
    POLICIES[CUT_AS_READ] = make_policy(CUT_AS_READ, every=INTERVAL, least=LEAST, **settings)
    yield
    del POLICIES["kvzap"], POLICIES[CUT_AS_READ]


def eviction(name: str) -> DecodeEviction:
    return DecodeEviction(policy=POLICIES[name], budget=BUDGET, interval=INTERVAL)


@functools.cache
def opened(name: str, config):
    cut = eviction(name)
    tokens = tiny.batch(LENGTHS, config)
    read = read_prompt(
        weights(config), tokens, config=config, policy=cut.policy, budget=BUDGET, new_tokens=NEW,
        modules=lookahead_modules(config), with_scores=True,
        room=cut.room(tokens.shape[1], NEW, config),
    )  # fmt: skip
    batch = len(LENGTHS)
    sums = opening_sums(cut, read)
    state = start(
        read.cache, read.logits,
        sampling=sampling_rows([GREEDY] * batch, [0] * batch, config.vocab_size),
        limit=jnp.asarray([NEW, NEW - 6, NEW], jnp.int32), eos=jnp.asarray([-2], jnp.int32),
        seen=None, width=NEW, sums=sums,
        question=opening_question(cut, tiny.prompts(LENGTHS)),
    )  # fmt: skip
    return jax.tree.map(np.asarray, state)


def modules(name: str, config):
    return lookahead_modules(config) if name == "lookaheadkv" else None


@functools.cache
def undrafted(name: str, config):
    """Plain decoding, a burst of 3 steps at a time; NaN in whatever is not filled."""
    state = jax.tree.map(jnp.asarray, opened(name, config))
    while not np.asarray(state.done).all():
        state = dataclasses.replace(state, cache=spoil(state.cache))
        state = decode_burst(
            weights(config), state, None, modules(name, config), config=config, steps=3,
            eviction=eviction(name),
        )  # fmt: skip
        assert int(np.asarray(state.cache.length).max()) <= BUDGET + INTERVAL
    return jax.tree.map(np.asarray, state)


def scores(name, config, text, gone, kept, since, prompt):
    """Per layer and KV head, what the restated policy thinks of every token of `text`."""
    params, end = weights(config), len(text)
    if name == "lookaheadkv":
        mods = lookahead_modules(config)
        layers, _ = reference.run(
            params, config, text, mods.embeddings, mods.lora,
            mods.config.alpha / mods.config.rank, kept=kept, gone=gone,
        )  # fmt: skip
        return [
            reference.group_mean(layer.probs[:, end:, :end].mean(1), config.num_kv_heads)
            for layer in layers
        ]
    if name == "question":
        rows = np.asarray(params["embed"], np.float64)[np.asarray(prompt[-6:])]
        rows = rows * (config.embed_scale or 1.0)
        layers, _ = reference.run(params, config, text, rows, kept=kept, gone=gone)
        observers = np.arange(end, end + len(rows))
        return [
            mean_attention(layer, end, heads, observers, window=6)
            for layer, heads in zip(layers, kept, strict=True)
        ]
    layers, _ = reference.run(params, config, text, gone=gone)
    if name in ("snapkv", "rkv"):
        last = np.arange(max(since, end - 3), end)
        if name == "rkv":
            return [
                reference.rkv(layer, end, heads, last, 3, 3, 0.4, 0.5)
                for layer, heads in zip(layers, kept, strict=True)
            ]
        return [
            mean_attention(layer, end, heads, last, window=3)
            for layer, heads in zip(layers, kept, strict=True)
        ]
    if name == "kvzap":
        found, norms = surrogate_of(config, 0), np.asarray(params["layers"]["attn_norm"], float)
        read = [reference.norm(la.residual, w, config) for la, w in zip(layers, norms, strict=True)]
        of_all = np.stack(read) @ found["weight"] + found["bias"][:, None]
        return list(np.where(np.arange(end)[:, None] >= since, of_all, 0.0).swapaxes(1, 2))
    if name == "h2o":
        return [
            reference.group_mean(layer.probs[:, since:, :end].sum(1), config.num_kv_heads)
            for layer in layers
        ]
    if name == "streaming_llm":
        return [np.tile(np.arange(end), (config.num_kv_heads, 1))] * config.num_layers
    out = []
    for layer, heads in zip(layers, kept, strict=True):
        by_head = np.zeros((config.num_kv_heads, end))
        for head, entries in enumerate(heads):
            unit = layer.k[head, entries]
            unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
            mean = unit.mean(0)
            by_head[head, entries] = -unit @ (mean / np.linalg.norm(mean))
        out.append(by_head)
    return out


def mean_attention(layer, end, kept, observers, *, window):
    """Mean attention of the observers, pooled over each head's entries before the window."""
    out, group = np.zeros((len(kept), end)), len(layer.probs) // len(kept)
    for head, entries in enumerate(kept):
        before = entries[entries < end - window]
        mean = layer.probs[head * group : (head + 1) * group, observers][..., before].mean(1)
        out[head, before] = np.mean([reference.pool(row, "max", 3) for row in mean], axis=0)
    return out


def restate(name, config, prompt, emitted, kept, sums, least=-np.inf):
    """The entries at the end, from those after the prompt: cut where the rules say.

    Also the logits, and the least difference, relative to the scores, that decided on an entry.
    """
    start_at, text = len(prompt), list(prompt) + list(emitted[:-1])
    gone = np.full((config.num_layers, config.num_kv_heads, len(text)), 10**6)
    for layer, head in np.ndindex(*gone.shape[:2]):
        cut = np.setdiff1d(np.arange(start_at), kept[layer][head])
        gone[layer, head, cut] = start_at
    since, closest = start_at, np.inf
    for end in range(start_at + 1, len(text) + 1):
        if end % INTERVAL:
            continue
        alive = [[np.flatnonzero(g[:end] > end) for g in layer] for layer in gone]
        found = scores(name, config, text[:end], gone, alive, since, prompt)
        for layer, head in np.ndindex(*gone.shape[:2]):
            value = found[layer][head].astype(float)
            if name in ADDS_UP:
                sums[layer][head][:end] += value
                value = sums[layer][head][:end].copy()
            value[end - WINDOWS.get(name, 0) :] = np.inf
            value[:2] = np.inf if name == "streaming_llm" else value[:2]
            window = config.layer_window[layer]
            entries = alive[layer][head]
            if window is not None:
                entries = entries[end - entries < window]
            left = np.full(end, -np.inf)
            left[entries] = value[entries]
            count = min(BUDGET, len(entries), (left >= least).sum())
            order = np.argsort(-left, kind="stable")
            stay = np.sort(order[:count])
            if 0 < count < len(entries):
                last, next_ = left[order[count - 1 : count + 1]]
                if next_ < last < np.inf:
                    closest = min(closest, (last - next_) / max(abs(last), abs(next_)))
            gone[layer, head, np.setdiff1d(alive[layer][head], stay)] = end
        since = end
    ends = [[np.flatnonzero(g > len(text)) for g in layer] for layer in gone]
    _, hidden = reference.run(weights(config), config, text, gone=gone)
    table = np.asarray(weights(config)["embed"], np.float64)
    return ends, hidden[max(start_at - 1, 0) :] @ table.T, closest


CASES = [
    pytest.param(name, config, id=f"{name}-{'plain' if config is PLAIN else 'rich'}")
    for name, config in [
        ("streaming_llm", PLAIN), ("keydiff", RICH), ("h2o", RICH), ("lookaheadkv", PLAIN),
        ("lookaheadkv", RICH), ("snapkv", PLAIN), ("rkv", RICH), ("kvzap", RICH),
        (CUT_AS_READ, RICH), ("question", RICH),
    ]
]  # fmt: skip


@pytest.mark.parametrize(("name", "config"), CASES)
def test_cuts_are_where_and_what_the_rules_say(name, config):
    before, state = opened(name, config), undrafted(name, config)
    prompts, compared = tiny.prompts(LENGTHS), 0
    at_start, at_end = kept_sets(before.cache), kept_sets(state.cache)
    for row, prompt in enumerate(prompts):
        count = int(state.count[row])
        emitted = state.tokens[row, :count]
        sums = None
        if name in ADDS_UP:
            sums = np.zeros((*at_start.shape[::2], len(prompt) + NEW))
            for layer, head in np.ndindex(*sums.shape[:2]):
                kept = at_start[layer, row, head]
                sums[layer, head, kept] = before.sums[layer, row, head, : len(kept)]
        if name == CUT_AS_READ:  # a prompt is cut as if it had been emitted
            sums = np.zeros((*at_start.shape[::2], len(prompt) + NEW))
            text = [*prompt, *emitted]
            ends, logits, closest = restate(
                "kvzap", config, [], text, at_start[:, row], sums, LEAST
            )
            logits = logits[len(prompt) - 1 :]
        else:
            ends, logits, closest = restate(name, config, prompt, emitted, at_start[:, row], sums)
        # Equal tokens have equal hidden states in the first layer, so kvzap scores them alike.
        # Which of two that tie at a cut goes is a matter of rounding, and machines differ in that.
        if closest < TIE:
            continue
        compared += 1
        for layer, head in np.ndindex(config.num_layers, config.num_kv_heads):
            np.testing.assert_array_equal(at_end[layer, row, head], ends[layer][head])
        best = logits[:count].argmax(-1)
        tiny.assert_tokens_match(emitted[None], best[None], logits[None, :count])
    assert compared >= (2 if name == "kvzap" else 3)


@pytest.mark.parametrize(
    ("name", "config", "nodes", "make"),
    [
        ("streaming_llm", PLAIN, 8, bush),
        ("h2o", RICH, 8, bush),
        ("lookaheadkv", PLAIN, 32, perfect),
        ("rkv", RICH, 8, bush),
        ("question", RICH, 8, bush),
        (CUT_AS_READ, RICH, 8, bush),
    ],
    ids=["streaming_llm", "h2o", "lookaheadkv", "rkv", "question", "incremental"],
)
def test_drafts_leave_tokens_and_cuts_as_they_were(name, config, nodes, make):
    plain = undrafted(name, config)
    state, rng = jax.tree.map(jnp.asarray, opened(name, config)), np.random.default_rng(0)
    while not np.asarray(state.done).all():
        drafts = [
            make(rng, row[n:limit].tolist(), nodes)
            for row, n, limit in zip(plain.tokens, state.count, plain.count, strict=True)
        ]
        before = np.asarray(state.cache.next_pos)
        state = dataclasses.replace(state, draft=pack(drafts, nodes))
        state, _ = decode_step(
            weights(config), state, None, modules(name, config), config=config, drafter=Given(),
            nodes=nodes, eviction=eviction(name),
        )  # fmt: skip
        after = np.asarray(state.cache.next_pos)
        # A step may end on a multiple of the interval; it never begins before one and ends after.
        assert ((after - 1) // INTERVAL <= before // INTERVAL).all()
    np.testing.assert_array_equal(state.tokens, plain.tokens)
    for mine, other in zip(kept_sets(state.cache).flat, kept_sets(plain.cache).flat, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert int(np.asarray(state.lengths).sum()) < int(plain.count.sum()) - len(LENGTHS)


SHORT = tiny.config(num_hidden_layers=2)  # decoding compiles every layer


def model() -> Model:
    defaults = GenerationDefaults(
        eos_ids=(), bos_id=None, pad_id=None, temperature=None, top_k=None, top_p=None
    )
    return Model(
        params=weights(SHORT), config=SHORT, tokenizer=None, generation=defaults, path=Path()
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "every"), [("h2o", 256), ("lookaheadkv", 120), ("question", 120)])
def test_engine_and_generate_cut_alike(name, every):
    """Rows that join and leave; the cache has room for budget and interval, not for the text."""
    prompts = tiny.prompts((60, 58, 63), seed=4)
    setting = dict(
        policy=eviction(name).policy, budget=BUDGET, lookahead=lookahead_modules(SHORT),
        evict_every=every, drafter="prompt_lookup", draft_nodes=Shared(8),
    )  # fmt: skip
    alone = [lk.generate(model(), [p], max_new_tokens=230, **setting) for p in prompts]
    engine = lk.Engine(model(), rows=2, max_new_tokens=230, max_prompt_tokens=64, **setting)
    state = engine._batch._state
    if name == "h2o":  # a row's last tenant leaves nothing, in slots that no prompt fills either
        left = jnp.full_like(state.sums, jnp.nan)
        engine._batch._state = dataclasses.replace(state, sums=left)
    results = engine.run([lk.Request(prompt=p, max_new_tokens=230) for p in prompts])
    assert [r.tokens for r in results] == [g.tokens[0] for g in alone]
    assert all(g.cache.bytes < g.cache.full_bytes for g in alone)  # 256 slots, 288 to 293 tokens


@pytest.mark.slow
def test_ada_cuts_while_decoding():
    """An even share is the inner policy; a free one keeps as many entries in each layer."""
    settings = dict(budget=BUDGET, max_new_tokens=NEW, evict_every=INTERVAL)
    prompts = tiny.prompts((33, 5))
    plain = lk.generate(model(), prompts, policy=make_policy("h2o", window=3), **settings)
    even = make_policy("ada", inner="h2o", window=3, alpha=1)
    assert lk.generate(model(), prompts, policy=even, **settings).tokens == plain.tokens
    free = make_policy("ada", inner="h2o", window=3, alpha=0)
    result = lk.generate(model(), prompts, policy=free, **settings)
    assert [len(row) for row in result.tokens] == [NEW, NEW]
    lengths = np.asarray(result.cache.kept_per_head)
    assert (lengths.sum(-1) == SHORT.num_kv_heads * np.array([[BUDGET, 5]])).all()


@pytest.mark.parametrize("name", ["tova", "laq", "oracle"])
def test_policies_that_cannot_say_so(name):
    policy = make_policy(name)
    able = (
        "streaming_llm, h2o, snapkv, rkv, pyramidkv, ada, critical, chunkkv, layers, threshold, "
        "blockwise, knorm, keydiff, lagkv or lookaheadkv"
    )
    named = f"{type(policy).__name__} cannot evict while decoding: use {able}"
    with pytest.raises(ValueError, match=named):
        lk.generate(model(), [[1, 2]], policy=policy, evict_every=4)


def test_a_question_that_is_missing_is_named():
    state = jax.tree.map(jnp.asarray, opened("question", RICH))
    with pytest.raises(
        ValueError, match="SnapKV reads the prompt's last tokens again: give question="
    ):
        evict(
            weights(RICH), state.cache, None, emitted=state.tokens, count=state.count,
            new=jnp.ones(3, jnp.int32), modules=None, config=RICH, eviction=eviction("question"),
        )  # fmt: skip


def test_no_interval_is_refused():
    with pytest.raises(ValueError, match="interval must be at least 1, not 0"):
        lk.generate(model(), [[1, 2]], policy=make_policy("keydiff"), evict_every=0)
