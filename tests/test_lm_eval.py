"""The harness's questions: what is scored, what is generated, and (where it is installed) a run."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax import lm_eval
from lookahead_jax.eval.harness.model import HarnessModel, Settings, sampling_of

ROOT = Path(__file__).parent.parent
PAIRS = [([5, 6, 7, 8, 9, 10, 11, 12] * 4, [13, 14]), ([40, 50], [60, 70, 80]), ([7] * 20, [9])]


@pytest.fixture(scope="module")
def model():
    arguments = dict(policy="snapkv", policy_window=4, budget="8", batch_size="2", device="cuda:0")
    return HarnessModel(Settings.of(arguments))


def test_log_likelihoods_are_the_full_cache_s(model):
    found = model.loglikelihoods(PAIRS)
    config = model.model.config
    tokens = lk.pad_batch(
        [context + continuation for context, continuation in PAIRS], config=config
    )
    logits = lk.token_logits(model.model.params, jnp.asarray(tokens), config=config)
    for i, (context, continuation) in enumerate(PAIRS):
        total, greedy = found[i]
        before = len(context) - 1
        raw = np.asarray(logits[i, before : before + len(continuation)], np.float64)
        log_p = raw - np.log(np.exp(raw - raw.max()).sum(-1, keepdims=True)) - raw.max()
        expected = log_p[np.arange(len(continuation)), continuation].sum()
        assert total == pytest.approx(expected, rel=1e-5)
        assert greedy == (raw.argmax(-1) == continuation).all()


@pytest.mark.slow
def test_eviction_touches_log_likelihoods_only_when_asked(model):
    plain = model.loglikelihoods(PAIRS[:1])
    evicting = HarnessModel(
        Settings.of(dict(policy="snapkv", policy_window=4, budget=8, evict_loglikelihood=True))
    )
    cut = evicting.loglikelihoods(PAIRS[:1] * 2)
    assert abs(cut[0][0] - plain[0][0]) > 1e-3
    assert cut[0] == pytest.approx(cut[1])


@pytest.mark.slow
def test_generation_has_the_policy_and_stops_where_it_is_told(model):
    text = "import os\nimport sys\n\n\ndef main():\n    print(os.path.join("
    requests = [
        (text, {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}),
        (text, {"until": [], "max_gen_toks": 8}),
        ("x = 1\n", {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}),
    ]
    found = model.generate(requests)
    assert all("\n" not in found[i] for i in (0, 2))
    expected = lk.generate(model.model, [text] * 2, policy=model.policy, budget=8, max_new_tokens=8)
    assert found[1] == expected.text[0]


def test_settings_and_texts():
    with pytest.raises(ValueError, match="unknown model argument 'polcy'"):
        Settings.of({"polcy": "snapkv"})
    assert Settings.of({"batch_size": "auto:4"}).batch_size == 8
    assert sampling_of({"do_sample": False, "temperature": 0.7}).temperature == 0
    assert sampling_of({"temperature": 0.7, "top_p": 0.9}).top_p == 0.9


def test_a_text_that_brings_its_bos_gets_no_second(model):
    assert model.encode("<s>x", None) == model.encode("<s>x", False)
    assert model.encode("x", None) == model.encode("x", True)
    assert model.prefix_token == 0


def test_without_the_harness_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert lm_eval.main() == 1
    assert "pip install 'lookahead-jax[lm-eval]'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_harness_runs_unmodified(tmp_path):
    pytest.importorskip("lm_eval", reason="extra lm-eval")
    command = [
        sys.executable, "-m", "lookahead_jax.lm_eval", "run", "--model", "lookahead",
        "--model_args", "policy=snapkv,policy_window=4,budget=16,drafter=prompt_lookup",
        "--tasks", "mini_generate,mini_choice,mini_perplexity",
        "--include_path", "tests/fixtures/harness", "--output_path", str(tmp_path), "--log_samples",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    (path,) = tmp_path.rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    assert results["mini_choice"]["acc,none"] == 1.0
    assert results["mini_perplexity"]["word_perplexity,none"] > 1
    assert 0 <= results["mini_generate"]["exact_match,none"] <= 1
