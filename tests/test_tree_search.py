"""A*-Decoding and PG-TD against restatements that read every text from its start.

The rewards that they ask for, in order, are the order in which they expand.
"""

import collections
import dataclasses
import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest

from lookahead_jax.checkpoints.load import load
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.strategies.a_star import AStar
from lookahead_jax.strategies.base import Ranked
from lookahead_jax.strategies.planned import Planned
from lookahead_jax.strategies.registry import make_strategy
from lookahead_jax.strategies.search import place_seeds
from lookahead_jax.strategies.texts import put_texts, read_texts
from tests import tiny
from tests.test_arbitrage import reader
from tests.test_strategies import PROMPTS, draw, found, ids, reward

N, NEW, SEEDS = 3, 16, [0, 4]
HEAT = 0.6
HOT = Sampling(temperature=HEAT)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save_chat_model(folder, num_hidden_layers=2)
    sharp = load(folder)
    return dataclasses.replace(sharp, params={**sharp.params, "embed": sharp.params["embed"] * 0.5})


@pytest.fixture(scope="module")
def read(model):
    return reader(model)


class Judge:
    """A reward that remembers what it was asked, for each prompt.

    By `haste` per character it likes long texts less, so a search goes back to short ones.
    """

    def __init__(self, haste: float = 0.0):
        self.asked = collections.defaultdict(list)
        self.haste = haste

    def __call__(self, prompt: str, text: str) -> float:
        self.asked[prompt].append(text)
        return reward(prompt, text) / (1 + self.haste * len(text))


def missing(held, text) -> bool:
    """Whether no row that holds one of the texts `held` knows all of `text` but its last token."""
    return all(list(row[: len(text) - 1]) != list(text[:-1]) for row in held)


def check_limits(search, **settings) -> None:
    """Work ends within its limits, at some text, and close to them, wherever the prompt stands."""
    free = search(**settings)
    turned = {name: value[::-1] if name == "seeds" else value for name, value in settings.items()}
    for limit, index in (("most_tokens", 0), ("most_forwards", 1)):
        for most in (N, 20):
            few = search(**settings, **{limit: most})
            for before, after in zip(free.work, few.work, strict=True):
                spent = dataclasses.astuple(after)[index]
                assert most - N < spent <= most or after == before
            assert all(few.tokens)
        other = search(PROMPTS[::-1], **turned, **{limit: 20})
        assert (other.tokens, other.work) == (few.tokens[::-1], few.work[::-1])


# ---- A*-Decoding --------------------------------------------------------------------------------


def a_star(model, read, judge, prompt, seed, *, step, ends, expansions):
    """The answer, the texts that were expanded, and the work: tokens and forwards."""
    start, places = ids(model, prompt), place_seeds([seed], N)
    decode = lambda text: model.tokenizer.decode([v for v in text if v not in ends])  # noqa: E731
    over = lambda text: text[-1] in ends or len(text) == NEW  # noqa: E731
    r, g, tokens, forwards, parent = {}, {}, 0, -1, ()
    opened: list[tuple[int, ...]] = []
    held: list[tuple[int, ...]] = []
    for _ in range(expansions):
        opened.append(parent)
        forwards += bool(parent) and missing([text[:-1] for text in held], parent)
        held = []
        for place in places:
            own: list[int] = list(parent)
            while True:
                own.append(draw(read, start, own, place, HEAT))
                if over(own) or step in decode(own)[len(decode(parent)) :]:
                    break
            held.append(tuple(own))
        tokens += sum(map(len, held)) - N * len(parent)
        forwards += max(map(len, held)) - len(parent)
        for text in held:
            if text not in r:
                r[text] = judge(prompt, decode(text))
                rise = (1 - r[text]) - (1 - r[parent]) if parent else 0
                g[text] = g.get(parent, 0) + max(rise, 0)
        parent = min((t for t in r if t not in opened), key=lambda t: g[t] + 1 - r[t])
        if over(parent):
            return list(parent), opened, (tokens, forwards)
    best = min(r, key=lambda t: (not over(t), t in opened, g[t] + 1 - r[t]))
    return list(best), opened, (tokens, forwards)


def settings(model, read) -> tuple[str, tuple[int, ...]]:
    """A step string and an end token that texts have now and then."""
    drawn = collections.Counter[int]()
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        for place in place_seeds([seed], N):
            text: list[int] = []
            while len(text) < NEW:
                text.append(draw(read, ids(model, prompt), text, place, HEAT))
            drawn.update(text)
    common = [v for v, _ in drawn.most_common(13)]
    return model.tokenizer.decode(common[:1]), (common[-1],)


@pytest.mark.parametrize("expansions", [32, 6])
def test_a_star_restated(model, read, expansions):
    step, ends = settings(model, read)
    ours, theirs = Judge(0.3), Judge(0.3)
    strategy = AStar(n=N, step=step, expansions=expansions)
    search = functools.partial(
        found, model, strategy, sampling=HOT, eos_ids=ends, max_new_tokens=NEW
    )
    result = search(reward=ours, seeds=SEEDS)
    orders = []
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        rules: dict[str, Any] = dict(step=step, ends=ends, expansions=expansions)
        text, opened, work = a_star(model, read, theirs, prompt, seed, **rules)
        assert result.tokens[i] == text
        assert ours.asked[prompt] == theirs.asked[prompt]
        assert (result.work[i].tokens, result.work[i].forwards) == work
        orders.append(opened)
    if expansions == 32:
        back = [a for a, b in itertools.pairwise(orders[0]) if b[: len(a)] != a]
        assert back, "the search went back to a shorter text"
        return
    other = search(PROMPTS[::-1], reward=Judge(0.3), seeds=SEEDS[::-1])
    assert (other.tokens, other.work) == (result.tokens[::-1], result.work[::-1])
    check_limits(search, seeds=SEEDS, reward=Judge(0.3))


# ---- PG-TD --------------------------------------------------------------------------------------


def planned(model, read, judge, prompt, *, k, rollouts, ends):
    """Their classes as dictionaries: states are texts, the cache of sequences is a list."""
    start = ids(model, prompt)
    over = lambda text: bool(text) and (text[-1] in ends or len(text) == NEW)  # noqa: E731
    visits, returns = {(): 1}, collections.defaultdict(list)
    rewards: dict[tuple[int, ...], float] = {}
    sequences: list[tuple[int, ...]] = []
    work = [0, -1]

    def top(text):
        logits = read(start + text)[0]
        best = np.argsort(-logits, kind="stable")[:k]
        odds = np.exp(logits[best] - logits[best[0]])
        return dict(zip(best.tolist(), odds / odds.sum(), strict=True))

    def completed(text):
        for sequence in sequences:
            if sequence[: len(text)] == text:
                return sequence
        if sequences:
            work[1] += missing([sequences[-1][:-1]], text)
        whole = text
        while not over(whole):
            whole += (int(read(start + whole)[0].argmax()),)
        work[0], work[1] = work[0] + len(whole) - len(text), work[1] + len(whole) - len(text)
        sequences.append(whole)
        return whole

    def value(text):
        if text not in rewards:
            shown = [v for v in text if v not in ends]
            rewards[text] = judge(prompt, model.tokenizer.decode(shown))
        return rewards[text]

    def bound(text, v, p):
        weight = math.log((visits[text] + 10 + 1) / 10) + 4
        got = returns[text, v]
        return max(got, default=0) + weight * p * math.sqrt(math.log(visits[text])) / (1 + len(got))

    value(completed(()))
    for _ in range(rollouts):
        text, path = (), []
        while not over(text):
            prior = top(text)
            v = max(prior, key=lambda v: bound(text, v, prior[v]))
            path.append((text, v))
            text += (v,)
            if text not in visits:
                visits[text] = 1
                break
        estimate = value(text if over(text) else completed(text))
        visits[text] += 1
        for before, v in path:
            returns[before, v].append(estimate)
            visits[before] += 1
    return list(max(rewards, key=lambda text: rewards[text])), tuple(work), max(rewards.values())


def test_planned_restated(model, read):
    ours, theirs = Judge(), Judge()
    ends = (int(np.argsort(-read(ids(model, PROMPTS[0]))[0])[1]),)
    strategy = Planned(k=3, rollouts=40)
    search = functools.partial(found, model, strategy, eos_ids=ends, max_new_tokens=NEW)
    result = search(reward=ours)
    for i, prompt in enumerate(PROMPTS):
        text, work, best = planned(model, read, theirs, prompt, k=3, rollouts=40, ends=ends)
        assert ours.asked[prompt] == theirs.asked[prompt]
        assert result.tokens[i] == text
        assert result.candidates[i][0].score == best
        assert (result.work[i].tokens, result.work[i].forwards) == work
    assert len(ours.asked[PROMPTS[0]]) > 8, "some texts were completed"
    other = search(PROMPTS[::-1], reward=reward)
    assert (other.tokens, other.work) == (result.tokens[::-1], result.work[::-1])
    check_limits(search, reward=reward)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Back(Planned):
    """Completes each prompt's text, goes back to its beginning, and completes it again."""

    def run(self, rows) -> list[Ranked]:
        rows.advance()
        whole = [list(output.tokens) for output in rows.outputs]
        put_texts(rows, [text[:5] for text in whole])
        read_texts(rows, [text[:5] for text in whole], np.ones(len(whole), bool))
        rows.advance()
        assert [output.tokens for output in rows.outputs] == whole
        steps = NEW - 1 + NEW - 5
        assert [work.forwards for work in rows.spent] == [steps] * 2, "nothing was read again"
        return [Ranked(0, [None]) for _ in whole]


def test_going_back_to_what_a_cache_holds(model):
    found(model, Back(), reward=reward, max_new_tokens=NEW, eos_ids=[999])


# ---- what they refuse ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("a_star", {"n": 0}, "n=0 is too small: give at least 1"),
        ("a_star", {"expansions": 0}, "expansions=0 is too small"),
        ("a_star", {"step": ""}, "step is empty: give the string that ends a step"),
        ("planned", {"k": 0}, "k=0 is too small"),
        ("planned", {"rollouts": 0}, "rollouts=0 is too small"),
        ("planned", {"exploration": -1}, "exploration=-1.0 is too small: give at least 0"),
        ("planned", {"base": 0}, "base=0.0 must be a finite number above 0"),
    ],
)
def test_impossible_settings_are_named(name, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_strategy(name, **settings)


@pytest.mark.parametrize(
    ("strategy", "options", "complaint"),
    [
        (AStar(), {}, "AStar needs a reward: give reward="),
        (
            AStar(n=N),
            {"reward": reward, "sampling": Sampling(temperature=1.0, repetition_penalty=1.1)},
            "repetition_penalty would still count: leave it 1",
        ),
        (Planned(), {"reward": reward}, "by its own rule: leave sampling out"),
        (
            Planned(k=500),
            {"reward": reward, "sampling": None},
            "k=500 is more than the vocabulary: lower it",
        ),
        (AStar(n=N), {"reward": lambda *_: -0.1}, "returned -0.1: .* between 0 and 1"),
    ],
)
def test_what_they_cannot_use_is_refused(model, strategy, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        found(
            model, strategy, **{**dict(max_new_tokens=NEW, eos_ids=[94], sampling=HOT), **options}
        )
