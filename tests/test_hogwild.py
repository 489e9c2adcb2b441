"""Rows that write together: against one text, and against a restatement token by token.

The restatement keeps each token's key as it was before RoPE, and rotates all that a worker sees to
consecutive positions whenever it reads a token.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.checkpoints.load import load
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.generation.generate import generate
from lookahead_jax.model.decoder import Block, forward
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.prefilling.batching import pad_batch
from lookahead_jax.prefilling.prefill import extend, prefill
from lookahead_jax.strategies import hogwild
from lookahead_jax.strategies.hogwild import Hogwild
from lookahead_jax.strategies.registry import make_strategy
from lookahead_jax.strategies.search import place_seeds, search
from tests import reference, tiny

FULL = make_policy("full")
PROMPTS = ["abc def", "hello hello world"]
NEW = 28
NEVER = (257,)  # an end token that is not drawn: of the same shape as one that is


class Workers:
    """What `n` workers of one prompt have written, in the order in which they see it."""

    def __init__(self, weights, config, prompt, n):
        self.weights, self.config, self.n = weights, config, n
        layers = {name: w for name, w in weights["layers"].items()}
        self.layers = [{name: w[i] for name, w in layers.items()} for i in range(config.num_layers)]
        records, _ = reference.run(weights, config, np.array(prompt))
        # blocks[layer][0] is the prompt, [1 + i] worker i: (key before RoPE, value) of each token
        self.blocks = []
        for index, record in enumerate(records):
            turned = [self.turn(p, index) for p in range(len(prompt))]
            keys = np.einsum("pih,kpi->pkh", turned, record.k)
            read = list(zip(keys, record.v.swapaxes(0, 1), strict=True))
            self.blocks.append([read, *[[] for _ in range(n)]])

    @functools.cache  # noqa: B019
    def turn(self, position, index):
        rope = self.config.ropes[self.config.layer_rope[index]]
        return reference.rotation(position, rope, self.config)

    def read(self, texts):
        """Reads a text for each worker at once; logits after each [n, V]."""
        config, table = self.config, self.weights["embed"]
        before = [len(block) for block in self.blocks[0][1:]]
        x = [table[np.array(text, int)] for text in texts]
        for index, (p, blocks) in enumerate(zip(self.layers, self.blocks, strict=True)):
            projected = []
            for row, block in zip(x, blocks[1:], strict=True):
                inner = reference.norm(row, p["attn_norm"], config)
                q, k, v = (np.einsum("pd,dnh->pnh", inner, p[name]) for name in "qkv")
                block.extend(zip(k, v, strict=True))
                projected.append(q)
            for i in range(self.n):
                others = [e for j, b in enumerate(blocks[1:]) if j != i for e in b]
                for t, q in enumerate(projected[i]):
                    seen = [*blocks[0], *others, *blocks[1 + i][: before[i] + t + 1]]
                    x[i][t] += self.attend(p, index, q, seen)
                inner = reference.norm(x[i], p["mlp_norm"], config)
                gated = reference.activation(inner @ p["gate"], "silu") * (inner @ p["up"])
                x[i] = x[i] + gated @ p["down"]
        last = np.stack([row[-1] if len(row) else 0 * table[0] for row in x])
        return reference.norm(last, self.weights["final_norm"], config) @ table.T

    def attend(self, p, index, q, seen):
        config, last = self.config, len(seen) - 1
        k = np.stack(
            [self.turn(at, index) @ key.T for at, (key, _) in enumerate(seen)]
        )  # [S, H, K]
        v, q = np.stack([value for _, value in seen]), q @ self.turn(last, index).T
        group, at = config.num_heads // config.num_kv_heads, np.arange(last + 1)
        window, out = config.layer_window[index], []
        for head, query in enumerate(q):
            logits = k[:, :, head // group] @ query * config.attn_scale
            logits[last - at >= (window or last + 1)] = -np.inf
            out.append(reference.softmax(logits) @ v[:, head // group])
        return np.einsum("nh,nhd->d", np.stack(out), p["o"].reshape(*q.shape, -1))


def float64(params):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), params)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One token per byte, and it writes visible characters only."""
    folder = tmp_path_factory.mktemp("bytes")
    tiny.save_chat_model(folder, num_hidden_layers=2)
    return load(folder)


def mixed():
    """Layers that differ: YaRN and no window, no RoPE and a window, longrope and another."""
    plain = tiny.config()
    (rope,) = plain.ropes
    yarn = dataclasses.replace(
        rope, kind="yarn", factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=True,
        original_max_position=32,
    )  # fmt: skip
    none = dataclasses.replace(rope, kind="none")
    long = dataclasses.replace(
        rope, kind="longrope", factor=4.0, original_max_position=10,
        short_factor=(1.0,) * 4, long_factor=(1.5, 2.0, 3.0, 4.0),
    )  # fmt: skip
    return dataclasses.replace(
        plain, ropes=(yarn, none, long), layer_rope=(0, 1, 2), layer_window=(None, 9, 6),
        attn_softcap=20.0, rope_interleaved=True,
    )  # fmt: skip


def opened(params, config, prompts, policy=FULL, **settings):
    tokens = jnp.asarray(pad_batch(prompts, config=config))
    read = prefill(params, tokens, config=config, policy=policy, budget=12, slots=128, **settings)
    return read.cache


def in_rows(texts):
    """[B, 8], padded."""
    block = np.full((len(texts), 8), -1, np.int32)
    for row, text in zip(block, texts, strict=True):
        row[: len(text)] = text
    return jnp.asarray(block)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_rows_that_write_in_turn_write_one_text(cache_dtype):
    """Row 0 writes, then row 2 behind it, then row 1 behind both: each reads one text.

    They follow a cut prompt, whose heads keep different entries.
    """
    config = mixed()
    if cache_dtype:  # a key is rounded as it is rotated: without RoPE both texts have the same
        config = dataclasses.replace(config, layer_rope=(1, 1, 1))
    params = tiny.params(config)
    snapkv = make_policy("snapkv", window=4)
    plain = opened(params, config, tiny.prompts((20, 15)), snapkv, cache_dtype=cache_dtype)
    together = plain.fork(1).branch(3, slots=16, concurrent=True)
    for row in (0, 2, 1):
        texts = tiny.prompts((5, 3), seed=row)
        turns = [text if i == row else [] for text in texts for i in range(3)]
        together, logits = extend(params, in_rows(turns), together, config=config)
        plain, expected = extend(params, in_rows(texts), plain, config=config)
        here = np.asarray(logits).reshape(2, 3, -1)[:, row]
        np.testing.assert_allclose(here, expected, atol=1e-4)  # float32, logits of up to 20
    tree = Block(jnp.zeros((6, 1, 32)), plain.next_pos.repeat(3)[:, None], together.rope_span,
                 jnp.ones((6, 1, 1), bool))  # fmt: skip
    with pytest.raises(ValueError, match="read texts, not trees: leave the drafter out"):
        forward(params, tree, together, config=config)


def test_rows_that_write_together_see_each_other_at_once():
    """Texts of different lengths in one block; one row waits; windows end inside the others."""
    config = tiny.config(**{**tiny.MISTRAL, "sliding_window": 9})
    params, prompts = tiny.params(config), tiny.prompts((11, 4))
    cache = opened(params, config, prompts).branch(3, slots=16, concurrent=True)
    restated = [Workers(float64(params), config, prompt, 3) for prompt in prompts]
    for lengths in ((4, 7, 2, 1, 3, 5), (1, 1, 1, 1, 1, 1), (1, 3, 1, 2, 1, 1)):
        texts = tiny.prompts(lengths, seed=len(lengths) + sum(lengths))
        cache, logits = extend(params, in_rows(texts), cache, config=config)
        expected = [workers.read(texts[3 * g : 3 * g + 3]) for g, workers in enumerate(restated)]
        # float32 through three layers, logits of up to 20
        np.testing.assert_allclose(logits, np.concatenate(expected), atol=1e-4)


def draw(logits, seed, position):
    """Gumbel-max at temperature 1.5 with the noise of (seed, position)."""
    key = jax.random.fold_in(jax.random.key(np.uint32(seed)), position)
    return int(np.argmax(logits / 1.5 + np.asarray(jax.random.gumbel(key, logits.shape))))


def restated(model, prompt, strategy, seed, ends=()):
    """The loop of the source's full example, and how often it has read.

    A text of NEW tokens stays as it is; the first end token ends all texts.
    """
    ids = functools.partial(model.tokenizer.encode, special=False)
    workers = Workers(float64(model.params), model.config, ids(prompt), strategy.n)
    texts, seeds = [ids(text) for text in strategy.prefixes], place_seeds([seed], strategy.n)
    inputs, begins = [list(text) for text in texts], [0] * strategy.n
    since = reads = 0
    while any(inputs):
        logits, reads = workers.read(inputs), reads + 1
        logits[:, ids("!")] -= 100
        running = [i for i in range(strategy.n) if inputs[i]]
        for i in running:
            texts[i].append(draw(logits[i], seeds[i], len(ids(prompt)) + len(texts[i])))
        if any(texts[i][-1] in ends for i in running):
            break
        inputs = [[] for _ in texts]
        for i in running:
            if len(texts[i]) == NEW:
                continue
            inputs[i], paragraph = texts[i][-1:], model.tokenizer.decode(texts[i])[begins[i] :]
            text, found, after = paragraph.rpartition(strategy.step)
            if found and not after and text.strip().endswith(hogwild.SENTENCE_ENDS):
                begins[i] += len(paragraph)
                if since > strategy.check_every and len(texts[i]) + len(strategy.check) < NEW:
                    inputs[i], since = [*inputs[i], *ids(strategy.check)], 0
                    texts[i] += ids(strategy.check)
            since += len(inputs[i])
    return texts, reads


def found(model, strategy, prompts=tuple(PROMPTS), **options):
    settings: dict[str, Any] = {"policy": FULL, "max_new_tokens": NEW, "eos_ids": NEVER, **options}
    return search(model, list(prompts), strategy=strategy, **settings)


SHORT: dict[str, Any] = dict(
    names="A,Bo",
    prefix="{name}/{others}:",
    lead="!",
    check="?=",
    check_every=5,
    forbidden="!,<none>",
)


def test_workers_write_what_the_source_writes(model, monkeypatch):
    """Prefixes, checks after paragraphs and the first end token, in any batch, within limits."""
    monkeypatch.setattr(hogwild, "SENTENCE_ENDS", tuple(map(chr, range(33, 110))))
    strategy, decode = Hogwild(**SHORT, step=":"), model.tokenizer.decode
    options: dict[str, Any] = dict(sampling=Sampling(temperature=1.5), seeds=[4, 5])
    whole = [restated(model, p, strategy, s)[0] for p, s in zip(PROMPTS, [4, 5], strict=True)]
    checked = [["?=" in decode(text) for text in texts] for texts in whole]
    assert checked == [[False, True], [True, True]]
    ends = (whole[0][1][-6],)
    result = found(model, strategy, eos_ids=ends, **options)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, [4, 5], strict=True)):
        texts, reads = restated(model, prompt, strategy, seed, ends)
        assert [c.tokens for c in result.candidates[i]] == texts
        ended = [float(text[-1] in ends) for text in texts]
        assert sum(map(len, texts)) < sum(map(len, whole[i]))
        assert [c.score for c in result.candidates[i]] == ended
        assert result.chosen[i] == int(np.argmax(ended))
        assert (result.work[i].tokens, result.work[i].forwards) == (sum(map(len, texts)), reads)
    assert result.finish == ["eos", "eos"]
    entry = model.config.num_layers * model.config.num_kv_heads * (2 * model.config.head_dim + 1)
    assert result.cache_bytes == 2 * (1 + strategy.n) * 128 * entry * 4  # each prompt once
    swapped = found(model, strategy, PROMPTS[::-1], eos_ids=ends, **{**options, "seeds": [5, 4]})
    assert swapped.candidates == result.candidates[::-1]

    begun = [len(text) for text in strategy.prefixes]
    few = found(model, strategy, most_forwards=4, **options)
    for texts, candidates in zip(whole, few.candidates, strict=True):
        expected = [text[: n + 4] for text, n in zip(texts, begun, strict=True)]
        assert [c.tokens for c in candidates] == expected
    for most in (30, 31):
        work = found(model, strategy, most_tokens=most, **options).work
        assert all(w.tokens is not None and most - 2 < w.tokens <= most for w in work)


def test_one_worker_decodes_as_usual(model):
    sampling = Sampling(temperature=0.8)
    alone = make_strategy("hogwild", n=1, prefix="", check="", forbidden="")
    result = found(model, alone, sampling=sampling, seeds=[5, 6])
    plain = generate(
        model,
        PROMPTS,
        policy=FULL,
        max_new_tokens=NEW,
        eos_ids=NEVER,
        sampling=sampling,
        seeds=[5, 6],
    )
    assert result.tokens == plain.tokens
    assert result.cache_bytes == 2 * plain.cache.bytes


def test_prefixes_name_the_workers():
    """As in the source's basic example; settings of a command line have line breaks."""
    assert Hogwild().prefixes == [
        "\n\n# Alice workspace\n\nI am Alice. Let's solve this together, Bob. Here's how we should "
        "collaborate:",
        "\n\n# Bob workspace\n\nI am Bob. Let's solve this together, Alice.",
    ]
    strategy: Any = make_strategy("hogwild", n="3", names="X, Y,Z", prefix="\\n{name}:{others}")
    assert strategy.prefixes[1:] == ["\nY:X and Z", "\nZ:X and Y"]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"n": 0}, "strategy hogwild: n=0 is too small"),
        ({"check_every": -1}, "check_every=-1 is too small"),
        ({"step": ""}, "step is empty: give the string that ends a paragraph"),
        ({"n": 5}, "names=Alice,Bob,Carol,Dave has too few for n=5: give one per worker"),
    ],
)
def test_impossible_settings_are_named(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_strategy("hogwild", **settings)


def test_what_does_not_fit_is_refused(model):
    short = Hogwild(**SHORT)
    with pytest.raises(ValueError, match=f"prefix has {NEW} tokens: give max_new_tokens of more"):
        found(model, Hogwild(**{**SHORT, "prefix": "x" * (NEW - 1)}))
    with pytest.raises(ValueError, match="have 11 tokens: give most_tokens of at least 13"):
        found(model, short, most_tokens=12)
    with pytest.raises(ValueError, match="repetition_penalty would still count: leave it 1"):
        found(model, short, sampling=Sampling(repetition_penalty=1.1))
    with pytest.raises(ValueError, match=r"the stop string .* is in the prefix"):
        found(model, short, stop=[short.prefixes[0][-2:]])
    silent = dataclasses.replace(model, tokenizer=None)
    with pytest.raises(ValueError, match="are texts, and this model has no tokenizer"):
        found(silent, short, [[1, 2, 3, 4, 5, 6, 7], [8] * 17])
