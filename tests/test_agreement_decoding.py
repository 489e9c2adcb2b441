"""`lookahead eval agreement --evict-every`: caches that are cut while the answer is read."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.decoding.eviction import DecodeEviction, opening_sums
from lookahead_jax.decoding.sampling import GREEDY, sampling_rows
from lookahead_jax.decoding.state import start
from lookahead_jax.decoding.step import decode_burst
from lookahead_jax.eval.agreement.agreement import main, run
from lookahead_jax.eval.agreement.config import AgreementConfig
from lookahead_jax.eval.agreement.prompts import read_prompts
from lookahead_jax.eval.grid.config import method_of
from lookahead_jax.prefilling.batching import pad_batch
from lookahead_jax.prompts.read import read_prompt
from tests import tiny

H2O, QUESTION = "h2o:window=3", "snapkv:window=4,kernel=3,observers=question"
BUDGET, EVERY = 8, 6
PROMPT, RESPONSE = "a bat sat on a mat; ", "the cat ran after it, and home"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of bytes without a chat template, a prompt with its answer, and a run."""
    folder = tmp_path_factory.mktemp("decoding")
    (folder / "model").mkdir()
    tiny.save_bytes_model(folder / "model", num_hidden_layers=2)
    row = {"prompt": PROMPT, "response": RESPONSE, "id": "given"}
    (folder / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    run(config(folder))
    return folder


def config(folder, **changes) -> AgreementConfig:
    defaults = dict(
        prompts=folder / "prompts.jsonl", out=folder / "run", model=str(folder / "model"),
        policies=(H2O,), budgets=(BUDGET,), evict_every=EVERY, responses="given",
    )  # fmt: skip
    return AgreementConfig(**{**defaults, **changes})


def stored(out) -> list[dict]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


@dataclasses.dataclass(frozen=True)
class Force:
    """Chooses the tokens of a text, and records the logits that it overrules."""

    def __call__(self, state, logits, last):
        text, at, seen = state
        (row,) = at  # the batch has one row, which has emitted the tokens before `at`
        seen = jax.lax.dynamic_update_slice(seen, logits[:, None], (0, row, 0))
        wanted = jax.lax.dynamic_slice_in_dim(text, row, 1, axis=1)
        return (text, at + 1, seen), jax.nn.one_hot(wanted[:, 0], logits.shape[-1]) * 100.0


def token_by_token(model, spec, budget) -> np.ndarray:
    """Log-probabilities [Y, V]: the decoding loop emits the answer, one token in a step."""
    policy, count = method_of(spec).policy, len(RESPONSE)
    eviction = DecodeEviction(policy=policy, budget=budget, interval=EVERY)
    prompt = model.tokenizer.encode(PROMPT)
    read = read_prompt(
        model.params, jnp.asarray(pad_batch([prompt], config=model.config)), config=model.config,
        policy=policy, budget=budget, new_tokens=count, room=count, with_scores=True,
    )  # fmt: skip
    answer = jnp.asarray([model.tokenizer.encode(RESPONSE)], jnp.int32)
    sums, seen = opening_sums(eviction, read), jnp.zeros((1, count, 256), jnp.float32)
    seen = seen.at[:, 0].set(read.logits)
    state = start(
        read.cache, jax.nn.one_hot(answer[:, 0], 256), width=count, seen=None,
        sampling=sampling_rows([GREEDY], [0], 256), limit=jnp.asarray([count], jnp.int32),
        eos=jnp.asarray([-2], jnp.int32), sums=sums,
    )  # fmt: skip
    state = dataclasses.replace(state, steering=(answer.copy(), jnp.ones(1, jnp.int32), seen))
    state = decode_burst(
        model.params, state, config=model.config, steps=count, eviction=eviction, steer=Force()
    )
    np.testing.assert_array_equal(state.tokens, answer)
    return np.asarray(jax.nn.log_softmax(state.steering[2][0]), np.float64)


def test_a_row_is_what_decoding_token_by_token_gives(folder):
    model, (row,) = lk.load(folder / "model"), stored(folder / "run")
    text = [*model.tokenizer.encode(PROMPT), *model.tokenizer.encode(RESPONSE)]
    tokens = jnp.asarray([text], jnp.int32)
    logits = lk.token_logits(model.params, tokens, config=model.config)[0, len(PROMPT) - 1 : -1]
    full = np.asarray(jax.nn.log_softmax(logits), np.float64)
    cut = token_by_token(model, H2O, BUDGET)
    same = cut.argmax(-1) == full.argmax(-1)
    kl = (np.exp(full) * (full - cut)).sum(-1)
    # The prompt's own pass gives the first token's logits: they see nothing of the cut.
    assert kl[0] < 1e-6 < 1e-3 < kl[1:].max()
    assert row["kl"] == pytest.approx(kl.mean(), rel=1e-3)
    assert row["same"] == pytest.approx(same.mean())
    assert row["followed"] == pytest.approx(np.cumprod(same).mean())
    assert (row["answer_tokens"], row["f1"]) == (len(RESPONSE), None)


def test_a_run_resumes_and_its_table_has_no_f1(folder, capsys):
    before = (folder / "run" / "rows.jsonl").read_bytes()
    run(config(folder))
    assert (folder / "run" / "rows.jsonl").read_bytes() == before
    printed = capsys.readouterr().out
    assert printed.startswith("Prompts, and their tokens: 1 all prompts (50 to 50).")
    assert "KL divergence" in printed
    assert "F1" not in printed
    with pytest.raises(ValueError, match=r"no prompt has 51 \(for the largest budget\) to"):
        run(config(folder, budgets=(50,)))
    for changes in ({"evict_every": 7}, {"responses": "own"}, {"response_tokens": 9}):
        with pytest.raises(ValueError, match="other settings"):
            run(config(folder, **changes))


@pytest.mark.slow
def test_the_models_own_answer_is_written_again(folder):
    """A short prompt is taken where prompt and answer may exceed the budget."""
    changes = dict(responses="own", response_tokens=33, policies=(QUESTION,), out=folder / "own")
    run(config(folder, **changes, budgets=(BUDGET, 52)))
    cut, whole = stored(folder / "own")
    assert whole["kl"] < 1e-6  # a budget that never cuts
    assert [whole[name] for name in ("same", "followed", "f1", "answer_tokens")] == [1, 1, 1, 33]
    assert cut["kl"] > 1e-4
    model = lk.load(folder / "model")
    written = [
        lk.generate(model, [PROMPT], policy=policy, max_new_tokens=33, **settings).text[0].split()
        for policy, settings in (
            (lk.make_policy("full"), {}),
            (method_of(QUESTION).policy, {"budget": BUDGET, "evict_every": EVERY}),
        )
    ]
    assert (cut["f1"] == 1.0) == (sorted(written[0]) == sorted(written[1]))
    assert cut["f1"] < 1


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "x"}, "it has no answer: `response`, or a last message of the assistant"),
        (
            {"messages": [{"role": "user", "content": "x"}]},
            "its last message is not the assistant's",
        ),
        ({"messages": []}, "its last message is not the assistant's"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "it has no answer"),
    ],
)
def test_a_file_without_answers_is_one_error(folder, tmp_path, row, problem):
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    tokenizer = lk.load(folder / "model").tokenizer
    with pytest.raises(ValueError, match=f"line 1: {problem}"):
        read_prompts(tmp_path / "p.jsonl", tokenizer, count=5, shortest=1, longest=99, answers=True)


def test_the_answer_of_a_chat_is_its_last_message(tmp_path):
    """Without what the template puts after it; the first `answer_tokens` are taken."""
    tokenizer = lk.load(lk.EMBEDDED_MODEL).tokenizer
    tokenizer = dataclasses.replace(tokenizer, chat_templates={"default": TEMPLATE})
    messages = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    read = dict(count=5, shortest=1, longest=99, answers=True)
    (prompt,) = read_prompts(tmp_path / "p.jsonl", tokenizer, **read)
    assert tokenizer.decode(prompt.ids) == "user: How?\nassistant: "
    assert tokenizer.decode(prompt.answer) == "So."
    (short,) = read_prompts(tmp_path / "p.jsonl", tokenizer, answer_tokens=1, **read)
    assert (short.ids, short.answer) == (prompt.ids, prompt.answer[:1])


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--evict-every", "0"], "--evict-every must be at least 1"),
        (["--responses", "given"], "--responses given is for --evict-every: give it too"),
        (
            ["--evict-every", "4", "--policies", "tova"],
            "--policies tova: policy Tova cannot evict while decoding: use streaming_llm, h2o,",
        ),
        (
            ["--evict-every", "4", "--policies", "triattention"],
            "policy TriAttention cannot evict while decoding",
        ),
    ],
)
def test_bad_options_are_one_line(folder, tmp_path, capfd, options, problem):
    given = ["--prompts", str(folder / "prompts.jsonl"), "--out", str(tmp_path / "run")]
    assert main([*given, "--model", str(folder / "model"), *options]) != 0
    assert problem in capfd.readouterr().err
