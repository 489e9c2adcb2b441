"""Strategies that control thinking, against restatements that read every text from its start."""

import dataclasses
import functools
import json
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.checkpoints.load import load
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.cli.main import main
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.generation.output_text import OutputRow
from lookahead_jax.prefilling.prefill import extend
from lookahead_jax.strategies import verifier as verifiers
from lookahead_jax.strategies.registry import make_strategy
from lookahead_jax.strategies.subtasks import Subtasks, _Thread
from lookahead_jax.strategies.trimr import TrimR, last_sentences
from tests import tiny
from tests.test_arbitrage import reader
from tests.test_strategies import PROMPTS, found, ids, log_softmax, reward

NEW = 24
SEEDS = [3, 5]
VISIBLE = 94  # ids below it are one character each
# The tiny model repeats its last token at lower temperatures.
HOT = Sampling(temperature=3.0, logit_bias={v: -100.0 for v in range(VISIBLE, 258)})
NEVER = (999,)  # no token has this id
LETTERS = dict(opens="[A-J]", closes="[a-z]")  # marks that a random text has


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One token per byte, and it writes visible characters only."""
    folder = tmp_path_factory.mktemp("bytes")
    tiny.save_chat_model(folder, num_hidden_layers=2)
    return load(folder)


@pytest.fixture(scope="module")
def read(model):
    return reader(model)


def draw(model, read, prompt, text, seed):
    """The next character: Gumbel-max with the noise of (seed, position)."""
    tokens = (*prompt, *model.tokenizer.encode(text))
    scores = read(tokens)[0]
    key = jax.random.fold_in(jax.random.key(np.uint32(seed)), len(tokens))
    noise = np.asarray(jax.random.gumbel(key, scores.shape, np.float32))
    best = np.argmax((scores / HOT.temperature + noise)[:VISIBLE])
    return model.tokenizer.decode([int(best)])


def searched(model, strategy, **options):
    settings = dict(
        sampling=HOT, seeds=SEEDS, max_new_tokens=NEW, eos_ids=NEVER
    )
    return found(model, strategy, **{**settings, **options})


# ---- TrimR --------------------------------------------------------------------------------------


def judge(prompt: str, answer: str, earlier: str | None) -> float:
    """A probability that differs from text to text."""
    return reward(prompt, answer + (earlier or ""))


def trimr(model, read, prompt, seed, rule, verify):
    """One text, the additions to it, and what it has cost."""
    start, text, additions, forwards = ids(model, prompt), "", [], -1
    begin, thoughts, agreed, answer, new = 0, 0, 0, None, 0
    watches = ["thoughts", "loops"]
    while len(text) < NEW:
        text += draw(model, read, start, text, seed)
        forwards, new = forwards + 1, new + 1
        addition = None
        if watches and rule.end in text:
            watches = []
        size, windows = rule.loop_tokens, []
        for n in range(len(text) - new + 1, len(text) + 1):
            now = text[max(n - size, 0) : n]
            windows.append(len(now) == size and sum(text.startswith(now, i) for i in range(n)))
        new = 0
        if "thoughts" in watches and re.match(rule.pattern, text[-1]):
            thought, begin, thoughts = text[begin:-1], len(text) - 1, thoughts + 1
            if len(thought.split()) >= rule.shortest and verify(prompt, thought, None) > 0.5:
                same = answer is not None and verify(prompt, thought, answer) > 0.5
                agreed, answer = agreed + 1 if same else 0, thought
                if agreed >= rule.agreements:
                    addition, watches = rule.mild, ["loops"]
            if not addition and thoughts >= rule.thoughts and len(text) >= rule.share * NEW:
                addition, watches = rule.forced, []
        if watches and max(windows) >= rule.loops:
            addition, watches = rule.forced, []
        if addition is not None and len(text) + len(addition) < NEW:
            text, forwards, new = text + addition, forwards + 1, len(addition)
            additions.append(addition)
    return text, additions, (len(text), forwards)


NO_LOOPS = dict(loop_tokens=NEW)
RULES = {
    "converged": dict(pattern="[A-Z]", agreements=1, shortest=0, thoughts=NEW, **NO_LOOPS),
    "lost": dict(pattern="[A-Z]", agreements=NEW, shortest=0, thoughts=3, **NO_LOOPS),
    "circles": dict(pattern="[A-Z]", shortest=NEW, thoughts=NEW, loop_tokens=2, loops=2),
}


@pytest.mark.parametrize("name", RULES)
def test_trimr_restated(model, read, name):
    rule = TrimR(mild="=>", forced="@#>", end="#>", **RULES[name])
    result = searched(model, rule, verifier=judge)
    added = []
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        text, additions, work = trimr(model, read, prompt, seed, rule, judge)
        assert result.text is not None
        assert result.text[i] == text
        assert (result.work[i].tokens, result.work[i].forwards) == work
        added += additions
    expected = rule.mild if name == "converged" else rule.forced
    assert expected in added
    other = searched(model, rule, prompts=PROMPTS[::-1], seeds=SEEDS[::-1], verifier=judge)
    assert (other.text, other.work) == (result.text[::-1], result.work[::-1])
    for most in (1, 9, 15):
        few = searched(model, rule, verifier=judge, most_tokens=most)
        assert all(0 < (work.tokens or 0) <= most for work in few.work)
        few = searched(model, rule, verifier=judge, most_forwards=most)
        assert all((work.forwards or 0) <= most for work in few.work)
