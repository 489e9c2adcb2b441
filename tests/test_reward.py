"""Reward heads: scores against texts read afresh, training against NumPy, files, and commands."""

import collections
import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.cli.main import main
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.modules.head_files import HEAD_FILE
from lookahead_jax.modules.reward_head import RewardHead, init_reward_head, save_reward_head
from lookahead_jax.strategies.registry import make_strategy
from lookahead_jax.train import labelled_steps, reward
from lookahead_jax.train.labelled_steps import StepBatch, read_steps
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from lookahead_jax.train.step import init_state
from tests import reference, tiny
from tests.test_strategies import NEW, PROMPTS, ROWS, found, ids, scores_of

WARM = Sampling(temperature=0.8)
SEEDS = [5, 6]
NEVER = (999,)  # no token has this id


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One token per byte, and it writes visible characters only."""
    folder = tmp_path_factory.mktemp("model")
    tiny.save_chat_model(folder, num_hidden_layers=1)
    return lk.load(folder)


def random_head(hidden_size: int, width: int) -> RewardHead:
    like = jax.eval_shape(lambda: init_reward_head(jax.random.key(0), hidden_size, width))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / 3, jnp.float32), like)


def chance(head: RewardHead, hidden: np.ndarray) -> float:
    h = jax.tree.map(lambda a: np.asarray(a, np.float64), head)
    x = hidden if h.inner is None else np.maximum(hidden @ h.inner + h.inner_bias, 0)
    return float(1 / (1 + np.exp(-(x @ h.out + h.out_bias[0]))))


def reader(model, head):
    """A reward that reads prompt and text from their start, in float64."""
    weights = jax.tree.map(lambda a: np.asarray(a, np.float64), model.params)

    @functools.cache
    def judge(prompt: str, text: str) -> float:
        tokens = np.array(ids(model, prompt) + ids(model, text))
        return chance(head, reference.run(weights, model.config, tokens)[1][-1])

    return judge


def test_particles_are_weighed_by_their_texts_read_afresh(model):
    """A head searches as a reward that reads every text from its start, end tokens left out."""
    head = random_head(model.config.hidden_size, 4)
    judge = reader(model, head)
    options: dict[str, Any] = dict(sampling=WARM, seeds=SEEDS, eos_ids=NEVER)
    plain = found(model, make_strategy("best_of_n", n=ROWS), reward=judge, **options)
    texts = [c.tokens for row in plain.candidates for c in row]
    ends = next(v for t in texts for v in t[2:-1] if all(v != u[0] for u in texts))
    often = collections.Counter(v for t in texts for v in t[1:] if v not in (ends, *texts[0]))
    step = model.tokenizer.decode([often.most_common(1)[0][0]])
    strategy, options["eos_ids"] = make_strategy("particles", n=ROWS, step=step), [ends]
    by_text = found(model, strategy, reward=judge, **options)
    result = found(model, strategy, reward=head, **options)
    assert result.chosen == by_text.chosen
    for row, other in zip(result.candidates, by_text.candidates, strict=True):
        assert [c.tokens for c in row] == [c.tokens for c in other]
        scores = scores_of(row), scores_of(other)
        np.testing.assert_allclose(*scores, rtol=1e-4)  # float32
    assert [w.tokens for w in result.work] == [w.tokens for w in by_text.work]
    assert any((w.tokens or 0) < ROWS * NEW for w in result.work), "an end token was written"
    pairs = zip(result.work, by_text.work, strict=True)
    assert any((w.forwards or 0) - (o.forwards or 0) > 1 for w, o in pairs), "several steps"
    for most in (1, 2, 7):
        few = found(model, strategy, reward=head, most_forwards=most, **options)
        assert all((work.forwards or 0) <= most for work in few.work)
        assert all(few.tokens)
    other = found(model, strategy, PROMPTS[::-1], reward=head, **options | {"seeds": SEEDS[::-1]})
    assert (other.tokens, other.work) == (result.tokens[::-1], result.work[::-1])


@pytest.mark.parametrize("name", ["a_star", "planned"])
def test_tree_searches_score_all_new_texts_in_one_forward(model, name):
    """Within the limit on forwards, whatever it is; the texts are those of a function."""
    settings = {"a_star": dict(n=2, step="a", expansions=4), "planned": dict(k=2, rollouts=5)}
    strategy, head = make_strategy(name, **settings[name]), random_head(model.config.hidden_size, 0)
    sampling = {"sampling": WARM} if name == "a_star" else {}
    options: dict[str, Any] = dict(seeds=SEEDS, eos_ids=NEVER, **sampling)
    result = found(model, strategy, reward=head, **options)
    by_text = found(model, strategy, reward=reader(model, head), **options)
    assert result.tokens == by_text.tokens
    for most in range(1, 30, 4):
        few = found(model, strategy, reward=head, most_forwards=most, **options)
        assert all((work.forwards or 0) <= most for work in few.work)
        assert all(few.tokens)


def test_arbitrage_has_the_model_read_what_the_draft_model_wrote(model):
    """Two forwards for each decision: the model's step and the draft's."""
    head = random_head(model.config.hidden_size, 0)
    judge, asked = reader(model, head), []

    def watched(prompt: str, text: str) -> float:
        asked.append(prompt)
        return judge(prompt, text)

    layers = jax.tree.map(lambda a: a / 2, model.params["layers"])
    draft = dataclasses.replace(model, params={**model.params, "layers": layers})
    strategy = make_strategy("arbitrage", step_tokens=3)
    options: dict[str, Any] = dict(
        sampling=WARM, seeds=SEEDS[1:], eos_ids=NEVER, strategy=strategy, draft_model=draft,
        prompts=PROMPTS[1:],
    )  # fmt: skip
    by_text = found(model, reward=watched, **options)
    result = found(model, reward=head, **options)
    assert result.tokens == by_text.tokens
    assert result.work[0].tokens == by_text.work[0].tokens
    assert result.work[0].forwards == (by_text.work[0].forwards or 0) + len(asked)
    assert len(asked) > 2
    for most in (2, 9):
        few = found(model, reward=head, most_forwards=most, **options)
        assert (few.work[0].forwards or 0) <= most
        assert all(few.tokens)


def test_what_a_search_cannot_judge_is_refused(model):
    other = random_head(8, 0)
    with pytest.raises(ValueError, match="reads hidden states of width 8, and this model's have"):
        found(model, "best_of_n", reward=other)
    head = random_head(model.config.hidden_size, 0)
    with pytest.raises(ValueError, match="Beam compares no rewards: leave reward out"):
        found(model, "beam", reward=head)
    with pytest.raises(ValueError, match="most_forwards must be at least 2, not 1"):
        found(model, "arbitrage", reward=head, draft_model=model, sampling=WARM, most_forwards=1)
    spoilt = dataclasses.replace(head, out_bias=jnp.full(1, jnp.nan))
    with pytest.raises(ValueError, match="the reward returned nan"):
        found(model, make_strategy("best_of_n", n=ROWS), reward=spoilt, eos_ids=())


@pytest.mark.parametrize("width", [0, 5])
def test_a_head_is_read_as_it_was_written_and_by_its_model_only(model, tmp_path, width):
    head, path = random_head(model.config.hidden_size, width), tmp_path / HEAD_FILE
    save_reward_head(path, head, params=model.params)
    for place in (path, tmp_path, str(tmp_path)):
        jax.tree.map(np.testing.assert_array_equal, lk.reward_head(place, model), head)
    other = dataclasses.replace(model, params={**model.params, "embed": model.params["embed"] + 1})
    with pytest.raises(ValueError, match="this reward head was trained for another model"):
        lk.reward_head(path, other)
    with pytest.raises(FileNotFoundError, match="does not exist: write one with lookahead train"):
        lk.reward_head(tmp_path / "none", model)
    head = dataclasses.replace(head, out=head.out[:-1])
    save_reward_head(path, head, params=model.params)
    with pytest.raises(ValueError, match="out is missing, unexpected or of another shape"):
        lk.reward_head(path, model)


# ---- training -----------------------------------------------------------------------------------


def test_an_update_restated():
    """Loss, gradient and the first step of Adam, which goes as far as the rate in every number."""
    rng, rate = np.random.default_rng(1), 0.01
    hidden, labels = rng.normal(size=(6, 8)), np.array([0, 1, 1, 0.25, 0, 1])
    head = random_head(8, 0)
    optimizer = OptimizerConfig(rate=rate, warmup=0)
    batch = StepBatch(*(jnp.asarray(a, jnp.float32) for a in (hidden, labels)))
    before = np.asarray(head.out, np.float64), np.asarray(head.out_bias, np.float64)
    state = init_state(head, make_optimizer(optimizer, 5))
    state, metrics = reward.reward_step(state, batch, batch, optimizer=optimizer, total=5)

    def judged(out, bias):
        p = 1 / (1 + np.exp(-(hidden @ out + bias)))
        return p, -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean()

    p, loss = judged(*before)
    gradient = (p - labels) @ hidden / 6, (p - labels).mean()
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    norm = np.sqrt((gradient[0] ** 2).sum() + gradient[1] ** 2)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    after = [a - rate * np.sign(g) for a, g in zip(before, gradient, strict=True)]
    np.testing.assert_allclose(state.modules.out, after[0], rtol=1e-4)
    np.testing.assert_allclose(state.modules.out_bias, after[1], rtol=1e-4)
    p, loss = judged(*after)
    assert float(metrics["held_out_loss"]) == pytest.approx(loss, rel=1e-4)
    assert float(metrics["held_out_accuracy"]) == ((p > 0.5) == (labels > 0.5)).mean()


def write_steps(path: Path, count: int) -> Path:
    """Texts whose steps are right if they end with an a, and wrong if with a b."""
    rng, rows = np.random.default_rng(2), []
    for _ in range(count):
        ends = rng.choice(["a", "b"], 3).tolist()
        steps = ["".join(rng.choice(["c", "d"], 3)) + end for end in ends]
        rows.append({"prompt": "xy", "steps": steps, "labels": [e == "a" for e in ends]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_learns_what_can_be_learned(model, tmp_path, monkeypatch, capsys):
    run, data = tmp_path / "run", write_steps(tmp_path / "steps.jsonl", 40)
    command = ["train", "reward", "--model", str(model.path), "--data", str(data)]
    command += ["--run", str(run), "--chat", "--rate", "0.3", "--batch", "16", "--epochs", "8"]
    assert main(["--no-compile-cache", *command]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8 * (36 * 3 // 16)
    assert lines[0]["loss"] == pytest.approx(np.log(2))
    assert lines[-1]["loss"] < 0.1
    assert lines[-1]["held_out_loss"] < 0.2
    assert lines[-1]["held_out_accuracy"] == 1
    head = lk.reward_head(run, model)
    text = read_steps([data], model, chat=True)[0]
    steps = json.loads(data.read_text().splitlines()[0])["steps"]
    chat = model.tokenizer.encode_chat([{"role": "user", "content": "xy"}])
    assert text.tokens.tolist() == [*chat, *ids(model, "".join(steps))]
    weights = jax.tree.map(lambda a: np.asarray(a, np.float64), model.params)
    hidden = reference.run(weights, model.config, text.tokens)[1][text.ends]
    assert [chance(head, h) > 0.5 for h in hidden] == (text.labels > 0.5).tolist()

    # The texts are not read again, and other labels are another run.
    monkeypatch.setattr(labelled_steps, "hidden_states", None)
    (run / HEAD_FILE).unlink()
    assert main(["--no-compile-cache", *command]) == 0
    assert (run / HEAD_FILE).exists()
    data.write_text(data.read_text().replace("true", "0.9"))
    assert main(["--no-compile-cache", *command]) == 1
    assert "belongs to another run (data differ)" in capsys.readouterr().err

    common = ["generate", "--model", str(model.path), "--prompt", PROMPTS[1], "--policy", "full"]
    common += ["--max-new-tokens", str(NEW), "--strategy", "best_of_n", "--strategy-arg"]
    common += [f"n={ROWS}", "--reward", str(run), "--seed", "6", "--json", "-"]
    assert main(["--no-compile-cache", *common]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["work"] == [{"tokens": ROWS * NEW, "forwards": NEW}]  # the last for the scores
    judge = reader(model, head)
    for candidate in report["candidates"][0]:
        expected = judge(PROMPTS[1], candidate["text"])
        assert candidate["score"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", 'line 2: expected {"prompt": a text'),
        ('{"prompt": "p", "steps": [], "labels": []}', "steps must be a list of texts that are"),
        ('{"prompt": "p", "steps": ["a"], "labels": [1, 0]}', "labels must be a list of 1 numbers"),
        ('{"prompt": "p", "steps": ["a"], "labels": [2]}', "label 2 is not a number from 0 to 1"),
        ('{"prompt": "", "steps": ["a"], "labels": [1]}', "the prompt is empty"),
    ],
)
def test_lines_that_are_no_labelled_steps_are_named(model, tmp_path, line, complaint):
    path = write_steps(tmp_path / "steps.jsonl", 1)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=re.escape(complaint)):
        read_steps([path], model, chat=False)


def test_settings_that_cannot_train_are_refused(model, tmp_path):
    paths = {"data": (write_steps(tmp_path / "s.jsonl", 2),), "run": tmp_path / "run"}
    for wrong, complaint in (
        ({"width": -1}, "width must be at least 0, not -1"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"held_out": 1.0}, "held_out=1.0 must be from 0 to below 1"),
    ):
        with pytest.raises(ValueError, match=complaint):
            reward.RewardConfig(**paths, **wrong)
    with pytest.raises(ValueError, match="6 labelled steps to train on are fewer than a batch"):
        reward.train(reward.RewardConfig(**paths, model=model.path))


def test_steps_are_labelled_by_the_answers_of_their_samples(model, tmp_path, capsys):
    """The samples are those of self-consistency; whoever has the voted answer is right."""
    problems, out = tmp_path / "problems.jsonl", tmp_path / "steps.jsonl"
    strategy = make_strategy("self_consistency", n=ROWS, pattern="[a-zA-Z}]")
    texts = [
        [str(c.text) for c in found(
            model, strategy, [prompt], sampling=WARM, seeds=[3 + i], eos_ids=None
        ).candidates[0]]
        for i, prompt in enumerate(PROMPTS)
    ]  # fmt: skip
    answers = [re.findall("[a-zA-Z}]", row[0])[-1] for row in texts]
    lines = [json.dumps(dict(prompt=p, answer=a)) for p, a in zip(PROMPTS, answers, strict=True)]
    problems.write_text("\n".join(lines))
    end = collections.Counter("".join(texts[0])).most_common(1)[0][0]
    command = ["--no-compile-cache", "train", "reward-data", "--model", str(model.path), "--source"]
    command += [str(problems), "--out", str(out), "--n", str(ROWS), "--pattern", "[a-zA-Z}]"]
    command += ["--step", end, "--max-new-tokens", str(NEW), "--seed", "3"]
    assert main(command) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert ["".join(row["steps"]) for row in rows] == [text for row in texts for text in row]
    for row, answer in zip(rows, np.repeat(answers, ROWS), strict=True):
        assert all(step.count(end) == step.endswith(end) for step in row["steps"])
        right = re.findall("[a-zA-Z}]", "".join(row["steps"]))[-1:] == [answer]
        assert row["labels"] == [int(right)] * len(row["steps"])
    assert len({row["labels"][0] for row in rows}) == 2
    assert len(read_steps([out], model, chat=False)) == len(rows)
    assert main(command) == 1
    assert "exists: give another --out" in capsys.readouterr().err
    out.unlink()
    problems.write_text('{"prompt": "p", "answer": 3}\n')
    assert main(command) == 1
    assert not out.exists()
    assert 'line 1: expected {"prompt": a text, "answer": a text}' in capsys.readouterr().err
