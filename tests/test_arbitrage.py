"""Arbitrage against a restatement that reads every text from its start, with two float64 models."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.checkpoints.load import load
from lookahead_jax.cli.main import main
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.strategies.arbitrage import Arbitrage
from tests import reference, tiny
from tests.test_strategies import NEW, PROMPTS, draw, found, ids, reward

N = 4  # most tokens of a step
SEEDS = [0, 4]
WARM = Sampling(temperature=0.8)
NEVER = (999,)  # no token has this id


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, and the same one with its layers in reverse order: they share their programs."""
    folder = tmp_path_factory.mktemp("model")
    tiny.save_chat_model(folder, num_hidden_layers=2)
    model = load(folder)
    layers = jax.tree.map(lambda a: a[::-1], model.params["layers"])
    return model, dataclasses.replace(model, params={**model.params, "layers": layers})


@pytest.fixture(scope="module")
def readers(models):
    return [reader(model) for model in models]


def reader(model):
    weights = jax.tree.map(lambda a: np.asarray(a, np.float64), model.params)

    @functools.cache
    def read(tokens: tuple[int, ...]):
        hidden = reference.run(weights, model.config, np.array(tokens))[1]
        return hidden[-1] @ weights["embed"].T, hidden

    return read


def router(text: str, step: str) -> float:
    """Between 0 and 1, and different for different texts."""
    return reward(step, text)


class Writer:
    """One model: what it has read and what it has cost."""

    def __init__(self, read, prompt, seed, decode, step, ends):
        self.read, self.prompt, self.seed, self.decode = read, prompt, seed, decode
        self.step, self.ends = step, ends
        self.known, self.tokens, self.forwards = [], 1, 0  # with a first token of its own

    def write(self, text):
        """The next step after `text`."""
        if text:
            common = 0
            while common < len(text) - 1 and self.known[common : common + 1] == [text[common]]:
                common += 1
            self.forwards += common < len(text) - 1
        step = []
        while len(text) + len(step) < NEW and len(step) < N:
            step.append(draw(self.read, self.prompt, [*text, *step], self.seed, 0.8))
            written = self.decode(text + step)[len(self.decode(text)) :]
            if self.step in written or step[-1] in self.ends:
                break
        new = len(step) if text else len(step) - 1
        self.tokens, self.forwards = self.tokens + new, self.forwards + new
        self.known = (text + step)[:-1]
        return step


def arbitrage(model, readers, prompt, seed, *, threshold, by_router, step="\n\n", ends=NEVER):
    """The text, which of its steps are the model's, and the work of both models."""
    decode, start = model.tokenizer.decode, ids(model, prompt)
    large, small = (Writer(read, start, seed, decode, step, ends) for read in readers)
    text, own = [], []
    while len(text) < NEW and text[-1:] != [*ends]:
        drafted = small.write(text)
        if by_router:
            better = router(prompt + decode(text), decode(drafted)) > threshold
            written = large.write(text) if better else []
        else:
            written = large.write(text)
            scores = [reward(prompt, decode(text + s)) for s in (written, drafted)]
            better = scores[0] - scores[1] > threshold
        own.append(better)
        text = text + (written if better else drafted)
    return text, own, (large.tokens + small.tokens, large.forwards + small.forwards)


@pytest.mark.parametrize(("by_router", "threshold"), [(False, 0.1), (True, 0.5)])
def test_restated(models, readers, by_router, threshold):
    model, draft = models
    rule: dict[str, Any] = dict(threshold=threshold, by_router=by_router)
    some = arbitrage(model, readers, PROMPTS[0], SEEDS[0], **rule)[0]
    step, ends = model.tokenizer.decode(some[1:2]), (some[9],)  # some steps and a text end early
    strategy = Arbitrage(threshold=threshold, step=step, step_tokens=N)
    guide = {"router": router} if by_router else {"reward": reward}
    search = functools.partial(
        found, model, strategy, draft_model=draft, sampling=WARM, eos_ids=ends, **guide
    )
    result = search(seeds=SEEDS)
    steps, lengths = [], []
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        text, own, work = arbitrage(model, readers, prompt, seed, step=step, ends=ends, **rule)
        assert result.tokens[i] == text
        assert (result.work[i].tokens, result.work[i].forwards) == work
        steps += own
        lengths.append(len(text))
    assert {True, False} == set(steps), "both models wrote"
    assert min(lengths) < NEW, "an end token was written"
    other = search(PROMPTS[::-1], seeds=SEEDS[::-1])
    assert (other.tokens, other.work) == (result.tokens[::-1], result.work[::-1])
    for most in (2, 9, 15):
        few = search(seeds=SEEDS, most_tokens=most)
        assert all((work.tokens or 0) <= most for work in few.work)
        assert all(few.tokens), "there is always some text"
        few = search(seeds=SEEDS, most_forwards=most)
        assert all((work.forwards or 0) <= most for work in few.work)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (dict(draft_model=None), "Arbitrage needs a smaller model: give draft_model="),
        (dict(router=None), "needs a reward: give reward=.*, or router=, a function of"),
        (dict(reward=reward), "give router= or reward="),
        (dict(router=lambda text, step: float("nan")), "the router returned nan: it must return"),
        (dict(strategy="first_finish", router=None), "FirstFinish asks no other model: leave"),
        (dict(sampling=Sampling(repetition_penalty=1.1)), "repetition_penalty would still count"),
    ],
)
def test_what_it_cannot_use_is_refused(models, changes, complaint):
    model, draft = models
    settings: dict[str, Any] = dict(
        strategy="arbitrage", draft_model=draft, router=router, sampling=WARM, eos_ids=NEVER
    )
    with pytest.raises(ValueError, match=complaint):
        found(model, **{**settings, **changes})


def test_the_command_line_gives_draft_model_and_router(models, tmp_path, capsys, monkeypatch):
    given = {}

    def search(model, **arguments):
        given.update(arguments)
        raise ValueError("searched")

    monkeypatch.setattr(lk, "search", search)
    (tmp_path / "guide.py").write_text("def always(text, step):\n    return 1.0\n")
    path = str(models[0].path)
    common = ["generate", "--model", path, "--prompt", "a", "--policy", "full", "--strategy"]
    guide = ["--router", f"{tmp_path / 'guide.py'}:always"]
    arbitrage = [*common, "arbitrage"]
    for arguments, complaint in (
        ([*arbitrage, *guide, "--draft-model", path], "searched"),
        ([*arbitrage, *guide], "--strategy arbitrage needs --draft-model DIR"),
        (arbitrage, "arbitrage needs --reward FILE.py:NAME or DIR, or --router FILE.py:NAME"),
        ([*arbitrage, *guide, "--reward", guide[1]], "--router and --reward exclude each other"),
        ([*common, "beam", *guide], "--strategy beam asks no router: leave --router out"),
    ):
        assert main(arguments) != 0
        assert complaint in capsys.readouterr().err.replace("\n", " ")
    assert given["router"]("", "") == 1.0
    assert given["draft_model"].path == models[0].path
    assert given["reward"] is None
