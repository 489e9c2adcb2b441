"""The scripts of examples/ do what their first lines say."""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
TESTED = {"compress_once", "own_policy", "train_own", "transformations"}


def run(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TESTED


@pytest.mark.slow
def test_a_document_compressed_once_answers_many_questions():
    answers = run("compress_once")
    rows = {"need": "operator", "cache": "value", "text": "state", "option": "number"}
    assert list(answers) == list(rows)
    right = [answers[name] == f"{name} {value}" for name, value in rows.items()]
    assert sum(right) >= 3, answers  # eviction is lossy


@pytest.mark.slow
def test_a_policy_of_ones_own_keeps_what_it_scores():
    results = run("own_policy")
    length = results["novelty"].prompt_tokens[0]
    kept = {name: np.sort(result.kept[..., :96]) for name, result in results.items()}
    assert (results["novelty"].kept >= 0).sum(-1).max() == 96
    assert (kept["novelty"][..., -16:] == np.arange(length - 16, length)).all()
    assert (kept["recent"] == np.arange(length - 96, length)).all()
    assert (kept["novelty"] < length - 96).any()


@pytest.mark.slow
def test_modules_trained_on_own_prompts_are_used(monkeypatch):
    losses, result = run("train_own")
    assert len(losses) == 6
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[1]
    assert len(result.tokens[0]) > 0


@pytest.mark.slow
def test_pure_functions_inside_jit_vmap_and_shard_map():
    one, many = run("transformations")
    assert int(one.argmax()) == 0
    assert many.shape == (jax.device_count(), len(one))
    np.testing.assert_allclose(many, np.broadcast_to(one, many.shape), rtol=1e-4)
