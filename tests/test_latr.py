"""LATR against a restatement that reads every text from its start."""

import collections
import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from lookahead_jax.checkpoints.load import load
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.strategies.latr import edit_distance
from lookahead_jax.strategies.registry import make_strategy
from lookahead_jax.strategies.search import place_seeds
from tests import tiny
from tests.test_arbitrage import reader
from tests.test_strategies import draw, found, ids, log_softmax, reward, scores_of

N, NEW = 6, 24
ENDS = (90, 18, 65, 75)  # end some texts early
SETTINGS: dict[str, Any] = dict(n=N, width=3, absolute=0.05, relative=0.6, tree_tokens=14)
SETTINGS |= dict(symbols="+-=0123456789", pattern="[a-z]")
LIKE = make_strategy("latr", **SETTINGS, lookahead="2,5", distance=1.0)
ALL = make_strategy("latr", **SETTINGS, lookahead="5", distance=1.5)  # none is far enough
AT_ONCE = make_strategy("latr", **SETTINGS, lookahead="1", distance=1.5)
CASES = [
    # The prompts' trees have all that a tree can have, in these numbers.
    (LIKE, ["q: why?", "1 + 1 =", "yes or no", "(a) b"], dict(stayed=8, full=1, few=1)),
    (ALL, ["abc def", "the cat", "1 + 1 =", "yes or no"], dict(descendants=3)),
    (AT_ONCE, ["q: why?", "Once upon", "abc def", "zz"], dict(ended=3)),
]
SEEDS = [3, 8, 5, 4]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latr")
    tiny.save_chat_model(folder, num_hidden_layers=2)
    return load(folder)


@pytest.fixture(scope="module")
def read(model):
    return reader(model)


@functools.cache
def distance(a, b):
    """The recursion of its definition."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return distance(a[1:], b[1:])
    return 1 + min(distance(a[1:], b), distance(a, b[1:]), distance(a[1:], b[1:]))


class Restated:
    """Texts of one prompt as lists, each with the number of its parent, its birth and a name."""

    def __init__(self, model, read, prompt, strategy):
        self.read, self.prompt = read, ids(model, prompt)
        self.strategy, self.decode = strategy, model.tokenizer.decode
        self.texts, self.parents, self.births = {0: []}, {0: None}, {0: 0}
        self.spent = self.named = 0
        self.seen = collections.Counter()

    def ended(self, name):
        return any(v in ENDS for v in self.texts[name])

    def grow(self):
        windows = [int(w) for w in self.strategy.lookahead.split(",")]
        for step in range(min(self.strategy.tree_tokens, NEW)):
            self.draw(step)
            self.compare(windows, step + 1)
            if all(map(self.ended, self.texts)):
                break
            late = all(birth + max(windows) < step for birth in self.births.values())
            if len(self.texts) == N and late:
                self.seen["full"] += 1
                break

    def draw(self, step):
        options, best = [], {}
        for name in self.texts:
            if self.ended(name):
                continue
            p = np.exp(log_softmax(self.read((*self.prompt, *self.texts[name]))[0]))
            order = np.argsort(-p)[: self.strategy.width].tolist()
            best[name] = order[0]
            for rank, v in enumerate(order[1:]):
                if p[v] > self.strategy.absolute and p[order[0]] - p[v] < self.strategy.relative:
                    options.append((rank, name, v))
        room = N - len(self.texts)
        self.seen["suppressed"] += max(len(options) - room, 0)
        for _, name, v in sorted(sorted(options)[:room], key=lambda o: (o[1], o[0])):
            self.named += 1
            self.texts[self.named] = [*self.texts[name], v]
            self.parents[self.named], self.births[self.named] = name, step
            self.spent += 1
        for name, v in best.items():
            self.texts[name].append(v)
            self.spent += 1

    def compare(self, windows, length):
        remove = set()
        for name, birth in self.births.items():
            parent = self.parents[name]
            if parent is None or length - birth not in windows:
                continue
            a, b = self.texts[name][birth:], self.texts[parent][birth:]
            assert self.texts[name][:birth] == self.texts[parent][:birth]
            if any(v in ENDS for v in a + b):
                self.seen["ended"] += 1
            elif self.decode(b[:1]).strip() in self.strategy.symbols:
                self.seen["kept"] += 1
            elif distance(tuple(a), tuple(b)) / (length - birth) < self.strategy.distance:
                remove.add(name)
            else:
                self.seen["stayed"] += 1
        while more := {n for n, p in self.parents.items() if p in remove} - remove:
            self.seen["descendants"] += len(more)
            remove |= more
        self.seen["pruned"] += len(remove)
        for name in remove:
            del self.texts[name], self.parents[name], self.births[name]

    def finish(self, seed):
        texts = list(self.texts.values())
        if not self.ended(0) and len(texts[0]) < NEW:
            self.seen["copies"] += N - len(texts)
            texts += [list(texts[0]) for _ in range(N - len(texts))]
        for text, place in zip(texts, place_seeds([seed], N), strict=False):
            while len(text) < NEW and not any(v in ENDS for v in text):
                text.append(draw(self.read, self.prompt, text, place, 1.0))
                self.spent += 1
        return texts


@pytest.mark.parametrize(("strategy", "prompts", "events"), CASES)
def test_latr_restated(model, read, strategy, prompts, events):
    result = found(model, strategy, prompts, seeds=SEEDS, eos_ids=ENDS, max_new_tokens=NEW)
    seen = collections.Counter()
    for i, (prompt, seed) in enumerate(zip(prompts, SEEDS, strict=True)):
        restated = Restated(model, read, prompt, strategy)
        restated.grow()
        texts = restated.finish(seed)
        assert [c.tokens for c in result.candidates[i]] == texts
        assert result.work[i].tokens == restated.spent
        assert result.work[i].forwards == max(map(len, texts)) - 1
        spoken = [model.tokenizer.decode([v for v in text if v not in ENDS]) for text in texts]
        letters = [[c for c in text if "a" <= c <= "z"][-1:] for text in spoken]
        votes = [float(letters.count(letter)) if letter else 0.0 for letter in letters]
        assert scores_of(result.candidates[i]).tolist() == votes
        assert result.chosen[i] == int(np.argmax(votes))
        seen += restated.seen
        seen["few"] += len(texts) < N
    assert {event: seen[event] for event in events} == events
    assert all(seen[event] for event in ("pruned", "kept", "ended", "suppressed", "copies"))


def test_latr_does_not_depend_on_the_batch(model):
    strategy, prompts, _ = CASES[0]
    options: dict[str, Any] = dict(eos_ids=ENDS, max_new_tokens=NEW, reward=reward)
    result = found(model, strategy, prompts, seeds=SEEDS, **options)
    for i, prompt in enumerate(prompts):
        scores = [reward(prompt, str(c.text)) for c in result.candidates[i]]
        assert scores_of(result.candidates[i]).tolist() == scores, "a reward replaces the vote"
        assert result.chosen[i] == int(np.argmax(scores))
    # Other places in the batch, and another neighbour; the shapes are the same.
    other = [1, 0, 0, 2]
    again = found(
        model, strategy, [prompts[i] for i in other], seeds=[SEEDS[i] for i in other], **options
    )
    assert again.candidates == [result.candidates[i] for i in other]
    assert again.work == [result.work[i] for i in other]


def test_latr_keeps_its_limits(model):
    strategy, prompts, _ = CASES[0]
    options: dict[str, Any] = dict(seeds=SEEDS, eos_ids=ENDS, max_new_tokens=NEW)
    whole = found(model, strategy, prompts, **options)
    for most in (N, 9, 40):
        result = found(model, strategy, prompts, most_tokens=most, **options)
        for work, unlimited in zip(result.work, whole.work, strict=True):
            assert work.tokens is not None
            assert unlimited.tokens is not None
            assert min(most - N + 1, unlimited.tokens) <= work.tokens <= most
    few = found(model, strategy, prompts, most_forwards=3, **options)
    assert [work.forwards for work in few.work] == [min(w.forwards or 0, 3) for w in whole.work]


def test_edit_distance():
    draws = np.random.default_rng(0).integers(0, 3, (20, 12)).tolist()
    for row in draws:
        a, b = row[:5], row[5:]
        assert edit_distance(a, b) == distance(tuple(a), tuple(b))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"lookahead": "20,x"}, "lookahead=20,x must be numbers of tokens from 1, such as"),
        ({"lookahead": "0"}, "lookahead=0 must be numbers"),
        ({"width": 0}, "width=0 is too small: give at least 1"),
        ({"distance": -1}, "distance=-1.0 is too small: give at least 0"),
        ({"pattern": "("}, "not a regular expression"),
    ],
)
def test_impossible_settings_are_named(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_strategy("latr", **settings)


def test_what_latr_cannot_use_is_refused(model):
    prompts = [ids(model, prompt) for prompt in CASES[0][1]]
    with pytest.raises(ValueError, match="width=999 is more than the vocabulary: lower it"):
        found(model, make_strategy("latr", n=N, width=999), prompts, max_new_tokens=NEW)
    penalty = Sampling(temperature=1.0, repetition_penalty=1.1)
    with pytest.raises(ValueError, match="LATR replaces tokens, which repetition_penalty"):
        found(model, LIKE, prompts, sampling=penalty, max_new_tokens=NEW)
    biased = Sampling(temperature=1.0, logit_bias={5: 1.0})
    with pytest.raises(ValueError, match="own probabilities: leave logit_bias out"):
        found(model, LIKE, prompts, sampling=biased, max_new_tokens=NEW)
    mute = dataclasses.replace(model, tokenizer=None)
    with pytest.raises(ValueError, match="LATR compares answers, and this model has no tokenizer"):
        found(mute, LIKE, prompts, max_new_tokens=NEW, eos_ids=ENDS)
