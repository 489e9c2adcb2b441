"""The drafts that benchmarks/spec_acceptance.py replays are accepted as in decoding."""

import jax
import pytest
import spec_acceptance
from drafting import replayed
from drafting_texts import Text

import lookahead_jax as lk
from lookahead_jax.drafters.registry import make_drafter

PROMPT = "def area(width, height):\n    return width * height\n\n\n" * 3


@pytest.fixture(scope="module")
def model():
    return lk.load(lk.EMBEDDED_MODEL, dtype="float32")


@pytest.mark.parametrize("temperature", [0.0, 0.3])
@pytest.mark.parametrize("name", spec_acceptance.DRAFTERS)
def test_a_replay_takes_the_steps_of_decoding(model, name, temperature):
    settings = dict(
        policy=lk.make_policy("full"), max_new_tokens=40, seeds=[5],
        sampling=lk.Sampling(temperature=temperature),
    )  # fmt: skip
    with jax.default_matmul_precision("highest"):
        plain = lk.generate(model, [PROMPT], **settings)
        drafted = lk.generate(
            model, [PROMPT], drafter=make_drafter(name), draft_nodes=8, **settings
        )
    assert drafted.tokens == plain.tokens
    text = Text(plain.prompt_ids[0], plain.tokens[0])
    drafter = spec_acceptance.drafter_of(name, model.config)
    steps = replayed(drafter, text, 8)
    assert steps == drafted.drafting.steps
    assert steps < len(text.truth) - 1  # some drafts were accepted


def test_a_drafter_that_reads_logits_is_refused(model):
    with pytest.raises(SystemExit, match="recycling needs more than the tokens"):
        spec_acceptance.drafter_of("recycling", model.config)


def test_outputs_are_made_once(model, tmp_path, monkeypatch):
    file = tmp_path / "outputs.jsonl"
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    made = spec_acceptance.Outputs(file, model, "embedded", 4).of(prompts[:2], 0.0)
    calls = []
    generate = lk.generate
    monkeypatch.setattr(lk, "generate", lambda *a, **k: calls.append(a[1]) or generate(*a, **k))
    again = spec_acceptance.Outputs(file, model, "embedded", 4).of(prompts, 0.0)
    assert again[:2] == made
    assert calls == [prompts[2:]]
