"""Strategies against restatements in NumPy, over the float64 model of `reference`.

The restatements read every text from its start: no cache, no batch, no steps.
"""

import collections
import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest

from lookahead_jax.checkpoints.load import load
from lookahead_jax.cli.main import main
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.generation.generate import generate
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.strategies.adadec import AdaDec
from lookahead_jax.strategies.base import Ranked, Strategy
from lookahead_jax.strategies.cautious import PUNCTUATION, Cautious
from lookahead_jax.strategies.registry import STRATEGIES, make_strategy, strategy_summaries
from lookahead_jax.strategies.search import place_seeds, search
from lookahead_jax.strategies.self_consistency import SelfConsistency
from tests import reference, tiny

PROMPTS = ["abc def", "hello hello world"]
ROWS, NEW = 3, 12
FULL = make_policy("full")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One token per byte, and it writes visible characters only."""
    folder = tmp_path_factory.mktemp("bytes")
    tiny.save_chat_model(folder)
    return load(folder)


@pytest.fixture(scope="module")
def read(model):
    """A text's tokens -> float64 logits after it, and the hidden states of all its tokens."""
    weights = jax.tree.map(lambda a: np.asarray(a, np.float64), model.params)

    @functools.cache
    def run(tokens: tuple[int, ...]):
        hidden = reference.run(weights, model.config, np.array(tokens))[1]
        return hidden[-1] @ weights["embed"].T, hidden

    return run


def ids(model, prompt) -> tuple[int, ...]:
    return tuple(model.tokenizer.encode(prompt))


def found(model, strategy, prompts=tuple(PROMPTS), **options):
    settings: dict[str, Any] = {"policy": FULL, "max_new_tokens": NEW, "eos_ids": (), **options}
    return search(model, list(prompts), strategy=strategy, **settings)


def texts_of(candidates) -> list[str]:
    return [str(candidate.text) for candidate in candidates]


def scores_of(candidates) -> np.ndarray:
    return np.array([candidate.score for candidate in candidates], np.float64)


def log_softmax(x):
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def reward(prompt: str, text: str) -> float:
    """Between 0 and 1, and different for different texts."""
    return (sum(ord(c) * (i + 1) for i, c in enumerate(prompt[:1] + text)) * 7919 % 1009) / 1009


# ---- token level --------------------------------------------------------------------------------


def beams(read, prompt, n, ends, penalty):
    """Every continuation of every beam is listed and sorted; a finished one stays itself."""
    alive = [((), 0.0)]
    for _ in range(NEW):
        options = []
        for text, score in alive:
            if text and text[-1] in ends:
                options.append((text, score))
                continue
            gains = log_softmax(read(prompt + text)[0])
            options += [((*text, v), score + gain) for v, gain in enumerate(gains)]
        alive = sorted(options, key=lambda option: -option[1])[:n]
    final = [score / len(text) ** penalty for text, score in alive]
    return [list(text) for text, _ in alive], final


@pytest.mark.parametrize("penalty", [1.0, 0.0])
def test_beam_search_lists_and_sorts(model, read, penalty):
    strategy = make_strategy("beam", n=ROWS, length_penalty=penalty)
    some = found(model, strategy).candidates[1][1].tokens
    ends = (some[4],)  # ends beams early, and not all
    result = found(model, strategy, eos_ids=ends)
    lengths = set()
    for i, prompt in enumerate(PROMPTS):
        texts, final = beams(read, ids(model, prompt), ROWS, ends, penalty)
        assert [c.tokens for c in result.candidates[i]] == texts
        scores = scores_of(result.candidates[i])
        np.testing.assert_allclose(scores, final, rtol=1e-4)  # float32 sums of 12 logarithms
        assert result.chosen[i] == int(np.argmax(final))
        assert result.tokens[i] == texts[result.chosen[i]]
        lengths |= {len(text) for text in texts}
    assert len(lengths) > 1, "beams of different lengths were compared"


def contrastive(read, prompt, k, alpha):
    text = ()
    unit = lambda h: h / np.linalg.norm(h, axis=-1, keepdims=True)  # noqa: E731
    for _ in range(NEW):
        logits, hidden = read(prompt + text)
        p = np.exp(log_softmax(logits))
        scores = {}
        for v in np.argsort(-p)[:k].tolist():
            own = unit(read((*prompt, *text, v))[1][-1])
            scores[v] = (1 - alpha) * p[v] - alpha * (unit(hidden) @ own).max()
        text += (max(scores, key=lambda v: scores[v]),)
    return list(text)


def test_contrastive_search_restated(model, read):
    result = found(model, "contrastive")
    expected = [contrastive(read, ids(model, prompt), 4, 0.6) for prompt in PROMPTS]
    assert result.tokens == expected
    greedy = generate(model, PROMPTS, policy=FULL, max_new_tokens=NEW, eos_ids=())
    assert greedy.tokens != expected
    assert [w.tokens for w in result.work] == [NEW, NEW]


def momentum(read, prompt, k, alpha):
    """The n-grams of the text so far are a set of tuples."""
    text = list(prompt)
    for _ in range(NEW):
        grams = {tuple(text[i:j]) for j in range(len(text) + 1) for i in range(max(j - 5, 0), j)}
        p = np.exp(log_softmax(read(tuple(text))[0]))
        scores = {}
        for v in np.argsort(-p)[:k].tolist():
            longest = [n for n in range(1, 6) if (*text[len(text) - n + 1 :], v) in grams]
            scores[v] = p[v] - alpha * max(longest, default=0)
        text.append(max(scores, key=lambda v: scores[v]))
    return text[len(prompt) :]


def test_momentum_decoding_restated(model, read):
    result = found(model, "momentum")
    expected = [momentum(read, ids(model, prompt), 5, 0.2) for prompt in PROMPTS]
    assert result.tokens == expected
    # Without resistance it is greedy; with little, it repeats what resistance forbids.
    plain = found(model, make_strategy("momentum", alpha=0))
    greedy = generate(model, PROMPTS, policy=FULL, max_new_tokens=NEW, eos_ids=())
    assert plain.tokens == greedy.tokens != expected


# ---- samples ------------------------------------------------------------------------------------


def draw(read, prompt, text, seed, temperature):
    """The next token: Gumbel-max with the noise of (seed, position)."""
    logits = read((*prompt, *text))[0]
    key = jax.random.fold_in(jax.random.key(np.uint32(seed)), len(prompt) + len(text))
    noise = np.asarray(jax.random.gumbel(key, logits.shape, np.float32))
    return int(np.argmax(logits / temperature + noise))


def sample(read, prompt, seed, temperature, ends=()):
    text = []
    while len(text) < NEW and not (text and text[-1] in ends):
        text.append(draw(read, prompt, text, seed, temperature))
    return text


def test_best_of_n_restated(model, read):
    strategy = make_strategy("best_of_n", n=ROWS)
    result = found(model, strategy, reward=reward, seeds=[5, 6])
    for i, (prompt, seed) in enumerate(zip(PROMPTS, [5, 6], strict=True)):
        samples = [sample(read, ids(model, prompt), s, 0.8) for s in place_seeds([seed], ROWS)]
        assert [c.tokens for c in result.candidates[i]] == samples
        scores = [reward(prompt, model.tokenizer.decode(text)) for text in samples]
        assert [c.score for c in result.candidates[i]] == scores
        assert result.chosen[i] == int(np.argmax(scores))
        assert result.text is not None
        assert result.text[i] == model.tokenizer.decode(samples[result.chosen[i]])
    assert [(w.tokens, w.forwards) for w in result.work] == [(ROWS * NEW, NEW - 1)] * 2


def test_first_finish_restated(model, read):
    strategy = make_strategy("first_finish", n=ROWS)
    sampling = Sampling(temperature=0.8)
    samples = [
        [sample(read, ids(model, prompt), s, 0.8) for s in place_seeds([7], ROWS)]
        for prompt in PROMPTS
    ]
    ends = (samples[0][1][6], samples[0][2][9])
    result = found(model, strategy, sampling=sampling, seeds=[7, 7], eos_ids=ends)
    for i, prompt in enumerate(PROMPTS):
        whole = [sample(read, ids(model, prompt), s, 0.8, ends) for s in place_seeds([7], ROWS)]
        ended = [text if text[-1] in ends else [0] * (NEW + 1) for text in whole]
        first = min(range(ROWS), key=lambda row: len(ended[row]))
        steps = min(len(ended[first]), NEW)
        assert result.chosen[i] == (first if steps < NEW else 0)
        assert result.tokens[i] == whole[result.chosen[i]][:steps]
        assert [c.tokens for c in result.candidates[i]] == [text[:steps] for text in whole]
        assert result.work[i].tokens == ROWS * steps
    assert result.finish[0] == "eos"


def test_self_consistency_counts_answers(model, read):
    strategy = make_strategy("self_consistency", n=ROWS, pattern="([a-zA-Z])[^a-zA-Z]*$")
    result = found(model, strategy, sampling=Sampling(temperature=0.8), seeds=[5, 6])
    for candidates, chosen in zip(result.candidates, result.chosen, strict=True):
        letters = [
            next((c for c in reversed(text) if c.isascii() and c.isalpha()), "")
            for text in texts_of(candidates)
        ]
        votes = {**collections.Counter(letters), "": 0}
        counts = [float(votes[letter]) for letter in letters]
        assert scores_of(candidates).tolist() == counts
        assert chosen == int(np.argmax(counts))
    answer = SelfConsistency().answer
    assert [answer(t) for t in ("1, then 2,345.0!", "-7", "none")] == ["2345.0", "-7", None]


def particles(model, read, prompt, seed, step, max_steps, entropic, ahead):
    """its_hub's loop: propagate, score, resample with replacement, until all have stopped.

    With `ahead`, each particle's weight is multiplied by that of a step more, which is forgotten.
    """
    text_of, start = model.tokenizer.decode, ids(model, prompt)
    places, spent = place_seeds([seed], ROWS), 0
    others = [int(np.random.SeedSequence([s, 2**32 - 1]).generate_state(1)[0]) for s in places]

    def longer(text, place):
        nonlocal spent
        begin = len(text_of(text))
        while len(text) < NEW and step not in text_of(text)[begin:]:
            text, spent = [*text, draw(read, start, text, place, 0.8)], spent + 1
        r = np.clip(reward(prompt, text_of(text)), 1e-7, 1 - 1e-7)
        return text, np.log(r / (1 - r))

    texts, stopped, weights = [[] for _ in range(ROWS)], [False] * ROWS, [0.0] * ROWS
    for turn in itertools.count(1):
        for row in range(ROWS):
            if not stopped[row]:
                texts[row], weights[row] = longer(texts[row], places[row])
                stopped[row] = len(texts[row]) == NEW or turn == max_steps
        total = np.array(weights)
        if ahead and not all(stopped):
            total += [
                weights[row] if stopped[row] else longer(texts[row], others[row])[1]
                for row in range(ROWS)
            ]
        p = np.exp(log_softmax(total))
        share = 1 / (p**2).sum() / ROWS
        if entropic and share < 0.5 and turn / max_steps < 0.5:
            heat = max(1.0, (1 - turn / max_steps) / share)
            p = np.exp(log_softmax(total / heat))
        index = np.random.default_rng([seed, turn]).choice(ROWS, ROWS, p=p)
        texts, stopped, weights = ([a[i] for i in index] for a in (texts, stopped, weights))
        if all(stopped):
            return texts, weights, turn, spent
    raise AssertionError


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("particles", {}),
        ("entropic_particles", {}),
        ("entropic_particles", {"look_ahead": "on"}),
    ],
)
def test_particles_restated(model, read, name, settings):
    samples = [sample(read, ids(model, p), s, 0.8) for p in PROMPTS for s in place_seeds([3], ROWS)]
    common = collections.Counter(v for text in samples for v in text if v < 94).most_common(1)
    step = model.tokenizer.decode([common[0][0]])
    strategy = make_strategy(name, n=ROWS, step=step, max_steps=5, **settings)
    result = found(model, strategy, reward=reward, seeds=[2, 5])
    turns = 0
    for i, (prompt, seed) in enumerate(zip(PROMPTS, [2, 5], strict=True)):
        entropic = name == "entropic_particles"
        texts, weights, turn, spent = particles(
            model, read, prompt, seed, step, 5, entropic, bool(settings)
        )
        assert result.work[i].tokens == spent
        assert [c.tokens for c in result.candidates[i]] == texts
        assert result.chosen[i] == int(np.argmax(weights))
        np.testing.assert_allclose(
            scores_of(result.candidates[i]), 1 / (1 + np.exp(-np.array(weights)))
        )
        turns = max(turns, turn)
    assert turns > 1, "some particle has made more than one step"
    if settings:
        myopic = make_strategy(name, n=ROWS, step=step, max_steps=5)
        before = found(model, myopic, reward=reward, seeds=[2, 5])
        assert before.candidates != result.candidates, "the look ahead has changed a choice"
    few = found(model, strategy, reward=reward, seeds=[2, 5], most_tokens=16)
    assert all(work.tokens is not None and 16 - ROWS < work.tokens <= 16 for work in few.work)
    # Neither the other prompt nor its place in the batch matters.
    alone = found(model, strategy, [PROMPTS[1]], reward=reward, seeds=[5])
    assert [c.tokens for c in alone.candidates[0]] == [c.tokens for c in result.candidates[1]]
    assert alone.work == result.work[1:]


def cautious(model, read, prompt, seed, strategy):
    """One text; at each token with several trials, each trial is a text of its own."""
    text, spent = [], 0
    places = place_seeds([seed], strategy.max_trials)
    while len(text) < NEW:
        log_p = log_softmax(read((*prompt, *text))[0] / 0.8)
        share = (-(np.exp(log_p) * log_p).sum() - strategy.low) / (strategy.high - strategy.low)
        width = int(1 + (strategy.max_trials - 1) * min(max(share, 0), 1))
        trials = []
        for place in places[:width]:
            trial, loss = [], 0.0
            while len(text) + len(trial) < NEW:
                log_p = log_softmax(read((*prompt, *text, *trial))[0] / 0.8)
                trial.append(draw(read, prompt, [*text, *trial], place, 0.8))
                loss -= log_p[trial[-1]]
                if width == 1 or model.tokenizer.decode(trial[-1:]) in PUNCTUATION:
                    break
            trials.append((loss / len(trial), trial))
            spent += len(trial)
        text += min(trials, key=lambda trial: trial[0])[1]
    return text, spent


def test_cautious_restated(model, read):
    entropies = [
        -(np.exp(log_p) * log_p).sum()
        for prompt in PROMPTS
        for log_p in [
            log_softmax(read((*ids(model, prompt), *range(n)))[0] / 0.8) for n in range(8)
        ]
    ]
    low, high = np.quantile(entropies, [0.4, 0.9]).tolist()
    strategy = Cautious(max_trials=ROWS, low=low, high=high)
    sampling = Sampling(temperature=0.8)
    result = found(model, strategy, sampling=sampling, seeds=[1, 2])
    for i, (prompt, seed) in enumerate(zip(PROMPTS, [1, 2], strict=True)):
        text, spent = cautious(model, read, ids(model, prompt), seed, strategy)
        assert result.tokens[i] == text
        assert result.work[i].tokens == spent > NEW, "there were trials"
    with pytest.raises(ValueError, match="leave the repetition penalty out"):
        found(model, strategy, sampling=Sampling(temperature=1.0, repetition_penalty=1.1))
    few = found(model, strategy, sampling=sampling, seeds=[1, 2], most_tokens=20)
    assert all(work.tokens is not None and work.tokens <= 20 for work in few.work)


def adadec(read, prompt, threshold, candidates, ahead):
    text = []
    while len(text) < NEW:
        log_p = log_softmax(read((*prompt, *text))[0])
        choices = np.argsort(-log_p)[:candidates].tolist()
        if -(np.exp(log_p) * log_p).sum() >= threshold:
            scores = {}
            for v in choices:
                after, total = [*text, v], log_p[v]
                while len(after) < min(len(text) + 1 + ahead, NEW):
                    next_p = log_softmax(read((*prompt, *after))[0])
                    after.append(int(next_p.argmax()))
                    total += next_p.max()
                scores[v] = total / (len(after) - len(text))
            choices = sorted(choices, key=lambda v: -scores[v])
        text.append(choices[0])
    return text


def test_adadec_restated(model, read):
    greedy = generate(model, PROMPTS, policy=FULL, max_new_tokens=NEW, eos_ids=())
    entropies = []
    for prompt, text in zip(PROMPTS, greedy.tokens, strict=True):
        for n in range(NEW):
            log_p = log_softmax(read((*ids(model, prompt), *text[:n]))[0])
            entropies.append(-(np.exp(log_p) * log_p).sum())
    threshold = float(np.quantile(entropies, 0.6))
    result = found(model, AdaDec(threshold=threshold, candidates=ROWS, ahead=3))
    expected = [adadec(read, ids(model, p), threshold, ROWS, 3) for p in PROMPTS]
    assert result.tokens == expected != greedy.tokens
    sure = found(model, AdaDec(threshold=99, candidates=ROWS, ahead=3))
    assert sure.tokens == greedy.tokens
    assert [(w.tokens, w.forwards) for w in sure.work] == [(NEW, NEW - 1)] * 2
    assert all(work.tokens is not None and work.tokens > NEW for work in result.work)


# ---- the interface ------------------------------------------------------------------------------


def test_rows_share_the_evicted_prompt_of_generate(model):
    """The first row of each prompt is what `generate` samples after the same cut cache.

    With questions, and with entries in eight bits, the prompt's and the rows' own.
    """
    long = [p * 5 for p in PROMPTS]
    options: dict[str, Any] = dict(
        policy=make_policy("snapkv", window=4), budget=16, seeds=[5, 6], eos_ids=()
    )
    sampling = Sampling(temperature=0.8)
    strategy = make_strategy("best_of_n", n=ROWS)
    result = search(
        model, long, strategy=strategy, reward=reward, sampling=sampling, max_new_tokens=NEW,
        **options,
    )  # fmt: skip
    plain = generate(model, long, sampling=sampling, max_new_tokens=NEW, **options)
    assert [row[0].tokens for row in result.candidates] == plain.tokens
    # One cut prompt and three rows of 128 slots each; `generate` has as many for each of its rows.
    assert result.cache_bytes == plain.cache.bytes * (1 + ROWS)


def test_work_is_limited_to_the_token(model):
    strategy = make_strategy("best_of_n", n=ROWS)
    for most, steps in ((ROWS * 5, 5), (ROWS * 5 + 2, 5), (ROWS, 1)):
        work = found(model, strategy, reward=reward, most_tokens=most).work
        assert [(w.tokens, w.forwards) for w in work] == [(ROWS * steps, steps - 1)] * 2
    result = found(model, strategy, reward=reward, most_forwards=4)
    assert [(w.tokens, w.forwards) for w in result.work] == [(ROWS * 5, 4)] * 2
    assert result.finish == ["length"] * 2
    with pytest.raises(ValueError, match="most_tokens must be at least 3, not 2"):
        found(model, strategy, reward=reward, most_tokens=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resumes(Strategy):
    """Resumes its rows, and looks at where the device's array is."""

    def run(self, rows):
        for _ in range(8):  # whether JAX copies an array depends on where it is
            rows.finished = np.concatenate([rows.finished])
            rows.resume()
            assert not np.shares_memory(np.asarray(rows.state.done), rows.finished)
        return [Ranked(0, [None]) for _ in rows.groups]


def test_rows_on_the_device_do_not_change_with_those_of_the_host(model):
    found(model, Resumes(), prompts=PROMPTS[:1])


def test_stop_strings_end_rows(model):
    strategy = make_strategy("best_of_n", n=ROWS)
    whole = found(model, strategy, reward=reward)
    stop = next(t[4] for t in texts_of(whole.candidates[0]) if t[4].isascii())
    result = found(model, strategy, reward=reward, stop=[stop])
    for before, after in zip(whole.candidates, result.candidates, strict=True):
        for full, cut in zip(before, after, strict=True):
            assert full.text is not None
            assert cut.text == full.text.partition(stop)[0]
            assert (cut.finish == "stop") == (stop in full.text)


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("astar", {}, "unknown strategy 'astar'; known: beam, contrastive"),
        ("beam", {"width": 3}, "strategy beam: unknown setting 'width'; known: n, length_penalty"),
        ("beam", {"n": "two"}, "strategy beam: n=two is not an integer"),
        ("beam", {"n": 0}, "strategy beam: n=0 is too small: give at least 1"),
        ("contrastive", {"alpha": 2}, "alpha=2.0 is not possible: give 0 to 1"),
        ("particles", {"select": "worst"}, "select=worst is not possible: choose best or sample"),
        ("particles", {"step": ""}, "step is empty"),
        ("self_consistency", {"pattern": "("}, "not a regular expression"),
    ],
)
def test_impossible_settings_are_named(name, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_strategy(name, **settings)


@pytest.mark.parametrize(
    ("strategy", "options", "complaint"),
    [
        ("particles", {}, "needs a reward: give reward="),
        ("beam", {"reward": reward}, "compares no rewards: leave reward out"),
        ("beam", {"sampling": Sampling(temperature=1.0)}, "own rule: leave sampling out"),
        ("first_finish", {"sampling": Sampling()}, "give a temperature above 0"),
    ],
)
def test_what_a_strategy_cannot_use_is_refused(model, strategy, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        found(model, strategy, **options)


@pytest.mark.parametrize("returned", [float("nan"), 1.5])
def test_impossible_rewards_are_named(model, returned):
    strategy = make_strategy("particles", n=ROWS, step=" ")
    with pytest.raises(ValueError, match=f"the reward returned {returned}"):
        found(model, strategy, reward=lambda prompt, text: returned)


def test_the_command_line_searches(model, tmp_path, capsys):
    (tmp_path / "judge.py").write_text("def judge(prompt, text):\n    return len(set(text))\n")
    common = ["generate", "--model", str(model.path), "--prompt", PROMPTS[0], "--policy", "full"]
    common += ["--max-new-tokens", str(NEW), "--strategy"]
    assert main([*common, "best_of_n", "--strategy-arg", f"n={ROWS}",
                 "--reward", f"{tmp_path / 'judge.py'}:judge"]) == 0  # fmt: skip
    judged = found(
        model, make_strategy("best_of_n", n=ROWS), PROMPTS[:1], eos_ids=None,
        reward=lambda prompt, text: len(set(text)),
    )  # fmt: skip
    assert judged.text is not None
    assert capsys.readouterr().out == judged.text[0] + "\n"
    for arguments, complaint in (
        (["beam", "--strategy-arg", "n"], "--strategy-arg takes NAME=VALUE, not 'n'"),
        (["beam", "--drafter", "trie"], "looks at every token before the next: leave --drafter"),
        (["beam", "--draft-nodes", "8"], "leave --draft-nodes out"),
        (["best_of_n"], "needs --reward FILE.py:NAME"),
        (
            ["best_of_n", "--reward", "judge"],
            "--reward takes FILE.py:NAME, or the folder or file of a",
        ),
        (["best_of_n", "--reward", f"{tmp_path / 'judge.py'}:j"], "has no function j"),
        (["beam", "--evict-every", "8", "--policy", "knorm"], "leave --evict-every out"),
    ):
        assert main([*common, *arguments]) != 0
        assert complaint in capsys.readouterr().err.replace("\n", " ")
    assert main([*common[:-1], "--most-tokens", "9"]) != 0
    assert "--most-tokens needs --strategy NAME" in capsys.readouterr().err


def test_help_lists_a_sentence_for_every_strategy(capsys):
    with pytest.raises(SystemExit):
        from lookahead_jax.cli.main import parse

        parse(["generate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, sentence in strategy_summaries().items():
        assert f"{name} {sentence}" in shown
    assert all(make_strategy(name).rows >= 1 for name in STRATEGIES)
