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
from lookahead_jax.eval.harness.model import HarnessModel, Settings
from lookahead_jax.eval.harness.options import GenerationOptions, sampling_of

ROOT = Path(__file__).parent.parent
PAIRS = [([5, 6, 7, 8, 9, 10, 11, 12] * 4, [13, 14]), ([40, 50], [60, 70, 80]), ([7] * 20, [9])]


@pytest.fixture(scope="module")
def model():
    arguments = dict(policy="snapkv", policy_window=4, budget="8", batch_size="2", device="cpu")
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


TEXT = (
    "import os\nimport sys\n\ndef main():\n    print(os.path.join(sys.argv[1], 'x'))\n\n\n"
    "if __name__ == '__main__':\n    main()\n"
)


def test_windows_are_those_of_the_harness_s_own_models():
    """Numbers of lm-eval 0.4.13's class HFLM with transformers 5.24, float32, max_length=24."""
    short = HarnessModel(Settings.of(dict(max_length=24, batch_size=2, dtype="float32")))
    assert short.rolling_loglikelihoods([TEXT]) == pytest.approx([-114.28470993], abs=1e-3)
    # The harness moves white space from the end of a context to its continuation.
    tokens = short.encode(TEXT.rstrip(), None)
    pairs = [
        (tokens, short.encode(TEXT + continuation, None)[len(tokens) :])
        for continuation in (" x", TEXT[:40])
    ]
    found = short.loglikelihoods(pairs)
    assert [p for p, _ in found] == pytest.approx([-13.17280197, -31.86730957], abs=1e-3)
    # A continuation of max_length tokens just fits: its last token is not read.
    ((total, _),) = short.loglikelihoods([([0], tokens[1:25])])
    assert np.isfinite(total)
    with pytest.raises(ValueError, match="a continuation of 25 tokens exceeds max_length=24"):
        short.loglikelihoods([([0], tokens[1:26])])


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


def test_a_sample_depends_on_its_request_and_repeat_alone(model):
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 6, "until": []}
    repeated = model.generate([("import os\n", options)] * 3)
    assert len(set(repeated)) == 3, "repeats of a request differ, also across batches"
    behind = model.generate([("x = 1\n", options)] + [("import os\n", options)] * 3)
    assert behind[1:] == repeated, "neighbours and places do not matter"
    reseeded = model.generate([("import os\n", options | {"seed": 1})] * 3)
    assert not set(reseeded) & set(repeated)


def test_an_open_assistant_turn_is_continued(model):
    """A task's `gen_prefix` ends the prompt: its turn must not be closed."""
    chat = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "It is"}]
    assert model.render_chat(chat) == "<s>1 + 1It is</s>"
    assert model.render_chat(chat, add_generation_prompt=False) == "<s>1 + 1It is"
    with pytest.raises(ValueError, match=r"no chat template 'tools'; this tokenizer has: default"):
        model.template_source("tools")
    assert "eos_token" in model.template_source(None)


def options_of(**kwargs):
    return GenerationOptions.of(kwargs, default_length=256)


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens"])
def test_every_name_of_the_limit_acts(name):
    assert options_of(**{name: 5}).max_new_tokens == 5
    assert options_of(**{name: None}).max_new_tokens == 256
    assert options_of(max_gen_toks=3, **{name: 5} if name != "max_gen_toks" else {}) == options_of(
        max_new_tokens=3
    )


def test_generation_options_act():
    assert options_of(until="a").stop == ("a",)
    assert options_of(until=["a", "", "b"]).stop == ("a", "b")
    assert options_of(seed=3).seed == 3
    sampled = sampling_of(
        dict(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    )
    assert sampled == lk.Sampling(
        temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2
    )
    penalties = dict(presence_penalty=0.5, frequency_penalty=-0.1)
    assert sampling_of(penalties) == lk.Sampling(**penalties)
    off = dict(temperature=0.7, top_k=0, top_p=1.0, min_p=0.0, num_beams=1, use_cache=True)
    assert options_of(**off).sampling == lk.Sampling(temperature=0.7)
    assert sampling_of({"do_sample": True}).temperature == 1
    greedy = sampling_of({"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.3})
    assert greedy == lk.Sampling(repetition_penalty=1.3), "the penalty changes greedy decoding, too"


@pytest.mark.parametrize(
    ("kwargs", "complaint"),
    [
        ({"num_beams": 10}, "num_beams=10 is not supported; leave it out or set it to 1"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3 is not supported"),
        ({"presence_penalty": "much"}, "presence_penalty must be a number"),
        ({"max_length": 99}, "max_length=99 is not supported; supported: .*max_gen_toks"),
        ({"warmth": 1}, "warmth=1 is not supported"),
        ({"do_sample": True, "temperature": 0.0}, "needs a temperature above 0"),
        ({"top_k": 2.5}, "top_k must be a whole number, got 2.5"),
        ({"do_sample": "false"}, "do_sample must be true or false, got 'false'"),
        ({"top_k": "many", "do_sample": False}, "top_k must be a number"),
        ({"until": 5}, "until must be texts, got 5"),
        ({"until": ["a", 5]}, "until must be texts, got "),
        ({"temperature": "warm"}, "temperature must be a number, got 'warm'"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(kwargs, complaint):
    if "top_k" in kwargs:
        kwargs = kwargs | {"temperature": 1.0}
    with pytest.raises(ValueError, match=complaint):
        options_of(**kwargs)


def test_the_limit_must_leave_room_for_a_prompt(model):
    with pytest.raises(ValueError, match=r"max_gen_toks=9999999 leaves no room for a prompt"):
        model.generate([("x", {"max_gen_toks": 9_999_999})])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"polcy": "snapkv"}, "unknown model argument 'polcy'"),
        ({"device": "mps"}, "device=mps: JAX runs on cpu here"),
        ({"device": "cuda:1"}, "device=cuda:1: JAX runs on cpu here"),
        ({"parallelize": True}, "parallelize is not supported"),
        ({"batch_size": 0}, "batch_size must be a whole number above 0, got 0"),
        ({"max_length": "long"}, "max_length must be a whole number above 0, got 'long'"),
    ],
)
def test_model_arguments_that_cannot_be_followed_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        Settings.of(arguments)


def test_model_arguments_act():
    assert Settings.of({"batch_size": "auto:4"}).batch_size == 8
    assert Settings.of({"batch_size": "auto", "max_batch_size": 4}).batch_size == 4
    for device in ("cuda:0", "cpu"):  # the former is the harness's default
        assert Settings.of({"device": device}) == Settings()
    given = {"device": None, "parallelize": False, "trust_remote_code": True, "policy_window": 4}
    assert Settings.of(given) == Settings(policy_settings=(("window", "4"),))


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
