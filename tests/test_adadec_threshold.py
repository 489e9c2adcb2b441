"""The threshold of adadec: learned by the command, against NumPy over the float64 model."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from lookahead_jax.checkpoints.load import load
from lookahead_jax.strategies.adadec import AdaDec
from lookahead_jax.strategies.registry import make_strategy
from lookahead_jax.train import adadec
from tests import reference, tiny

WORDS = ["The quick brown fox", "jumps over the lazy dog.", "And then again, and again."]


def restated(entropy, chosen, seed):
    """The authors' steps, one token and one Newton step after the other."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(entropy))
    held = order[: -(-len(order) // 5)].tolist()
    rest = order[len(held) :].tolist()
    right, wrong = [i for i in rest if chosen[i]], [i for i in rest if not chosen[i]]
    few = min(len(right), len(wrong))
    used = [i for kind in (right, wrong) for i in rng.choice(np.array(kind), few, replace=False)]
    line = np.zeros(2)
    for _ in range(50):
        gradient, curvature = np.array([line[0], 0.0]), np.diag([1.0, 0.0])
        for i in used:
            x = np.array([entropy[i], 1.0])
            p = 1 / (1 + np.exp(-line @ x))
            gradient += (p - chosen[i]) * x
            curvature += p * (1 - p) * np.outer(x, x)
        line -= np.linalg.solve(curvature, gradient)
    best = (-1.0, 0.0)
    for percent in range(1, 100):
        says = [1 / (1 + np.exp(-line[0] * entropy[i] - line[1])) >= percent / 100 for i in held]
        right_about = np.mean([s == chosen[i] for s, i in zip(says, held, strict=True)])
        best = max(best, (right_about, -percent / 100))
    odds = -best[1] / (1 + best[1])
    return max((np.log(odds) - line[1]) / line[0], 0.0), best[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_learning_restated(seed):
    rng = np.random.default_rng(seed + 10)
    entropy = rng.gamma(1.5, 1.0, 400)
    chosen = rng.random(400) < 1 / (1 + np.exp(2 * entropy - 2.5))
    threshold, accuracy = restated(entropy, chosen, seed)
    learned = adadec.learn_threshold(entropy, chosen, seed=seed)
    assert threshold > 0
    np.testing.assert_allclose(learned.threshold, threshold, rtol=1e-4)  # two optimizers
    assert learned.accuracy == accuracy
    assert learned.tokens == 400


def test_what_cannot_be_learned_is_named():
    entropy = np.linspace(0, 2, 40)
    with pytest.raises(ValueError, match="all of 32 tokens are the model's first choice"):
        adadec.learn_threshold(entropy, np.ones(40, bool))
    with pytest.raises(ValueError, match="none of 32 tokens are the model's first choice"):
        adadec.learn_threshold(entropy, np.zeros(40, bool))
    with pytest.raises(ValueError, match="entropy does not say where it is wrong"):
        adadec.learn_threshold(entropy, entropy > 1)
    # Where hardly any token is chosen, the line crosses below 0.
    few = np.isin(np.arange(200), [0, 5, 10, 15, 20, 60])
    wrong = adadec.learn_threshold(np.linspace(0, 0.2, 200), few, seed=1)
    assert wrong.threshold == 0


def test_the_command_reads_answers_and_prints_the_threshold(tmp_path, capsys, monkeypatch):
    folder, source = tmp_path / "model", tmp_path / "rows.jsonl"
    folder.mkdir()
    tiny.save_bytes_model(folder)
    rows = [{"prompt": a, "response": b} for a in WORDS for b in WORDS if a != b]
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "alone"}]))
    model = load(folder)
    tokenizer: Any = model.tokenizer
    weights = jax.tree.map(lambda a: np.asarray(a, np.float64), model.params)
    entropy, chosen = [], []
    for row in rows:
        prompt = tokenizer.encode(row["prompt"])
        answer = tokenizer.encode_behind(row["response"])
        text = [*prompt, *answer][:40]
        hidden = reference.run(weights, model.config, np.array(text))[1]
        x = hidden @ weights["embed"].T
        log_p = x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        log_p -= x.max(-1, keepdims=True)
        for i in range(len(prompt) - 1, len(text) - 1):
            entropy.append(-(np.exp(log_p[i]) * log_p[i]).sum())
            chosen.append(log_p[i].argmax() == text[i + 1])
    seen = {}

    def learn(entropy, chosen, *, seed):
        seen.update(entropy=entropy, chosen=chosen, seed=seed)
        return adadec.Learned(0.75, 0.5, len(entropy))

    monkeypatch.setattr(adadec, "learn_threshold", learn)
    args = ["--model", str(folder), "--source", str(source), "--max-tokens", "40", "--seed", "3"]
    assert adadec.main(args) == 0
    np.testing.assert_allclose(seen["entropy"], entropy, atol=1e-4)
    assert seen["chosen"].tolist() == chosen
    assert seen["seed"] == 3
    printed = capsys.readouterr()
    assert f"from {len(entropy)} tokens; right about 50.0%" in printed.err
    assert make_strategy("adadec", threshold=printed.out.strip()) == AdaDec(threshold=0.75)

    source.write_text('{"prompt": "alone"}\n')
    assert adadec.main(args) == 1
    assert "no row has an answer" in capsys.readouterr().err
    assert adadec.main([*args, "--limit", "0"]) == 1
    assert "--limit 0 and --max-tokens 40 must be at least 1" in capsys.readouterr().err
