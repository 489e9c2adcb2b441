"""ThinkRouter against a restatement in NumPy that reads embeddings, from the start of each text."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
import pytest

from lookahead_jax.checkpoints.load import load
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.generation.generate import generate
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.strategies.base import Ranked
from lookahead_jax.strategies.search import place_seeds
from lookahead_jax.strategies.think_router import ThinkRouter, _OfModel
from tests import reference, tiny
from tests.test_strategies import FULL, NEW, PROMPTS, found, ids, log_softmax

TEXTS = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
SEEDS = [11, 7, 15]
SAMPLING = Sampling(temperature=0.6, top_k=30, top_p=0.9)
WARM = Sampling(temperature=0.6)
ROUTER = ThinkRouter(threshold=0.1, k=5, min_p=0.3, cold_entropy=4.0, cold_steps=2, end="j")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its embeddings are scaled, and are not those that the logits come from."""
    folder = tmp_path_factory.mktemp("model")
    tiny.save_chat_model(folder, num_hidden_layers=1, tie_word_embeddings=False)
    return scaled(load(folder))


def scaled(model):
    return dataclasses.replace(model, config=dataclasses.replace(model.config, embed_scale=1.5))


class Thought(NamedTuple):
    """A step of the restatement."""

    token: int
    kind: str  # soft, drawn, stopped, answer
    largest: float
    entropy: float


def think(model, prompt, seed, settings, new=NEW, sampling=SAMPLING, change=None):
    """The steps after a prompt; from step `change[0]` on the noise is that of seed `change[1]`."""
    weights = jax.tree.map(lambda a: np.asarray(a, np.float64), model.params)
    table = weights["embed"] * model.config.embed_scale
    end = ids(model, settings.end)[0] if settings.end else None
    start, inputs, steps = ids(model, prompt), [], []
    thinking, cold = True, 0
    while len(steps) < new:
        rows = np.array(inputs) if inputs else None
        hidden = reference.run(weights, model.config, np.array(start), rows)[1][-1]
        logits = hidden @ weights["lm_head"].T / sampling.temperature
        log_p = log_softmax(logits)
        p = np.exp(log_p)
        entropy = -(p * log_p).sum()
        order = np.argsort(-p)[: sampling.top_k]
        renormed = p[order] / p[order].sum()
        order = order[np.cumsum(renormed) - renormed < (sampling.top_p or np.inf)]
        if change is not None and len(steps) == change[0]:
            seed = change[1]
        key = jax.random.fold_in(jax.random.key(np.uint32(seed)), len(start) + len(steps))
        noise = np.asarray(jax.random.gumbel(key, p.shape, np.float32))
        token, kind = int(order[np.argmax((logits + noise)[order])]), "answer"
        mean = table[token]
        if thinking:
            cold = cold + 1 if entropy < settings.cold_entropy else 0
            kind = "drawn"
            if end is not None and cold >= settings.cold_steps:
                token, kind = end, "stopped"
                mean = table[token]
            elif p.max() >= settings.threshold:
                token, kind = int(order[0]), "soft"
                some = order[: settings.k]
                some = some[p[some] >= settings.min_p * p.max()]
                mean = (p[some] / p[some].sum()) @ table[some]
            if token == end:
                thinking, mean = False, table[token]
        inputs.append(mean)
        steps.append(Thought(token, kind, p.max(), entropy))
    return steps


def routed(model, strategy, prompts=tuple(TEXTS), seeds=tuple(SEEDS), **options):
    options = {"sampling": SAMPLING, "seeds": list(seeds), **options}
    return found(model, strategy, prompts, **options)


class Forked(_OfModel):
    """Two rows; after five tokens the second becomes a copy of the first."""

    def for_model(self, model):
        return dataclasses.replace(self, end_id=self._end_id(model.tokenizer))

    @property
    def rows(self) -> int:
        return 2

    def run(self, rows) -> list[Ranked]:
        rows.advance(4)
        rows.gather(np.repeat(rows.groups[:, 0], 2))
        rows.advance()
        return [Ranked(0, [None, None]) for _ in rows.groups]


def test_restated(model):
    strategy = Forked(**dataclasses.asdict(ROUTER), end_id=None)
    result = routed(model, strategy)
    last, pending, different = [], [], []
    for candidates, prompt, seed in zip(result.candidates, TEXTS, SEEDS, strict=True):
        first = think(model, prompt, seed, ROUTER)
        second = think(model, prompt, seed, ROUTER, change=(5, place_seeds([seed], 2)[1]))
        expected = [[step.token for step in steps] for steps in (first, second)]
        assert [c.tokens for c in candidates] == expected
        different.append(expected[0] != expected[1])
        pending.append(first[4].kind)
        kinds = [step.kind for step in first]
        assert {"soft", "drawn", "answer"} <= set(kinds)
        last.append(kinds[kinds.index("answer") - 1])
    assert last == ["soft", "stopped", "drawn"], "thinking ended in every way"
    assert "soft" in pending, "a copied row has read a soft token"
    assert any(different)
    other = routed(model, strategy, TEXTS[::-1], SEEDS[::-1])
    assert (other.tokens, other.work) == (result.tokens[::-1], result.work[::-1])
    few = routed(model, strategy, most_tokens=18)
    assert few.tokens == [row[:9] for row in result.tokens]
    assert [(w.tokens, w.forwards) for w in few.work] == [(18, 8)] * 3


def test_all_tokens_are_soft_at_threshold_zero(model):
    strategy = ThinkRouter(threshold=0, k=258, min_p=0, end="")
    result = routed(model, strategy, sampling=WARM)
    for tokens, prompt, seed in zip(result.tokens, TEXTS, SEEDS, strict=True):
        # Differences of float32 grow tenfold with each soft token of this model.
        steps = think(model, prompt, seed, strategy, new=NEW // 2, sampling=WARM)
        assert tokens[: NEW // 2] == [step.token for step in steps]
        assert {step.kind for step in steps} == {"soft"}


def test_without_soft_tokens_it_samples(model):
    plain = generate(
        model, TEXTS, sampling=WARM, seeds=SEEDS, policy=FULL, max_new_tokens=NEW, eos_ids=()
    )
    result = routed(model, ThinkRouter(threshold=1.01, end="("), sampling=WARM)
    assert result.tokens == plain.tokens


@pytest.mark.slow
def test_rows_may_lie_on_several_devices(model):
    spread = scaled(load(model.path, mesh=make_mesh(data=2, tensor=2)))
    texts, seeds = [*TEXTS, TEXTS[0]], [*SEEDS, SEEDS[0]]  # two rows on each half
    result = routed(spread, ROUTER, texts, seeds)
    for tokens, prompt, seed in zip(result.tokens, texts, seeds, strict=True):
        assert tokens == [step.token for step in think(model, prompt, seed, ROUTER)]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (dict(threshold=-0.1), "threshold=-0.1 is too small"),
        (dict(k=0), "k=0 is too small: give at least 1"),
        (dict(min_p=2.0), "min_p=2.0 is not possible: give 0 to 1"),
        (dict(cold_entropy=-1.0), "cold_entropy=-1.0 is too small"),
        (dict(cold_steps=0), "cold_steps=0 is too small"),
        (dict(k=259), "k=259 is more than the vocabulary: lower it"),
        (dict(), "end='</think>' is 8 tokens of this model: give a text that is one token, or"),
    ],
)
def test_impossible_settings_are_named(model, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        routed(model, ThinkRouter(**settings))


def test_what_it_cannot_use_is_refused(model):
    silent = dataclasses.replace(model, tokenizer=None)
    with pytest.raises(ValueError, match=r"no tokenizer\.json: put it there, or give"):
        found(silent, ROUTER, [[1, 2]])
    with pytest.raises(ValueError, match="ThinkRouter draws samples: give a temperature above 0"):
        found(model, ROUTER, sampling=Sampling())
    with pytest.raises(ValueError, match="leave the repetition penalty out"):
        warm = Sampling(temperature=0.6, repetition_penalty=1.1)
        found(model, ROUTER, TEXTS, seeds=SEEDS, sampling=warm)
