"""`lookahead eval agreement`: cut caches against the full one, on prompts of a file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.eval.agreement.agreement import main, run
from lookahead_jax.eval.agreement.config import AgreementConfig
from lookahead_jax.eval.agreement.prompts import read_prompts
from lookahead_jax.eval.agreement.table import table
from lookahead_jax.eval.grid.config import method_of
from lookahead_jax.generation.score import forced_logits
from lookahead_jax.prefilling.batching import pad_batch
from lookahead_jax.prompts.read import read_prompt
from tests import tiny

POLICIES = (
    "snapkv:window=4,kernel=3",
    "streaming_llm",
    "laq:draft=prompt,draft_tokens=4,draft_window=4,kernel=3",
)
BUDGETS = (8, 20)
NEW = 6
TEXTS = ["a bat sat on a mat; " * 2, "the cat ran after it and then ran home"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of bytes without a chat template, two prompts of different lengths, and a run."""
    folder = tmp_path_factory.mktemp("agreement")
    (folder / "model").mkdir()
    tiny.save_bytes_model(folder / "model")
    rows = [
        {"prompt": TEXTS[0], "category": "long", "id": "first"},
        {"turns": [TEXTS[1], "unused"], "category": "short"},
        {"prompt": "too short", "category": "short"},
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(config(folder))
    return folder


def config(folder, **changes) -> AgreementConfig:
    defaults = dict(
        prompts=folder / "prompts.jsonl", out=folder / "run", model=str(folder / "model"),
        policies=POLICIES, budgets=BUDGETS, response_tokens=NEW,
    )  # fmt: skip
    return AgreementConfig(**{**defaults, **changes})


def stored(folder) -> dict:
    lines = (folder / "run" / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {(row["id"], row["policy"], row["budget"]): row for row in rows}


def test_rows_are_what_real_eviction_gives(folder):
    """Each policy cuts the cache while reading, the same answer is forced, in a second program."""
    model = lk.load(folder / "model")
    shared = dict(config=model.config)
    rows = stored(folder)
    assert len(rows) == 2 * len(POLICIES) * len(BUDGETS)
    for name, text in zip(("first", "2"), TEXTS, strict=True):
        tokens = jnp.asarray(pad_batch([model.tokenizer.encode(text)], config=model.config))
        full = read_prompt(
            model.params, tokens, policy=lk.make_policy("full"), budget=0, new_tokens=NEW, **shared
        )
        answer = lk.decode(
            model.params, full.cache.fork(1), full.logits, max_new_tokens=NEW, **shared
        ).tokens
        expected = forced(model, full, answer)
        for spec in POLICIES:
            for budget in BUDGETS:
                policy = method_of(spec).policy
                cut = read_prompt(
                    model.params, tokens, policy=policy, budget=budget, new_tokens=NEW, **shared
                )
                got = forced(model, cut, answer)
                same = got.argmax(-1) == expected.argmax(-1)
                row = rows[name, spec, budget]
                kl = (np.exp(expected) * (expected - got)).sum(-1).mean()
                assert row["kl"] == pytest.approx(kl, rel=1e-4, abs=1e-6)
                assert row["same"] == pytest.approx(same.mean())
                assert row["followed"] == pytest.approx(np.cumprod(same).mean())
                written = lk.decode(
                    model.params, cut.cache, cut.logits, max_new_tokens=NEW, **shared
                ).tokens
                words = [model.tokenizer.decode(t[0].tolist()).split() for t in (written, answer)]
                assert (row["f1"] == 1.0) == (sorted(words[0]) == sorted(words[1]))
    assert rows["first", "streaming_llm", 8]["kl"] > 0.01  # cutting changes something


def forced(model, read, answer) -> np.ndarray:
    """Log-probabilities [Y, V] at the tokens of the answer."""
    logits = forced_logits(model.params, read.cache, read.logits, answer, config=model.config)
    return np.asarray(jax.nn.log_softmax(logits[0]))


def test_a_run_resumes_and_grows(folder, capsys):
    before = (folder / "run" / "rows.jsonl").read_bytes()
    run(config(folder))
    assert (folder / "run" / "rows.jsonl").read_bytes() == before
    printed = capsys.readouterr().out
    assert printed == (folder / "run" / "table.md").read_text()
    assert printed.startswith("Prompts, and their tokens: 2 all prompts (38 to 40), 1 long")
    run(config(folder, policies=("streaming_llm", "knorm"), budgets=(20,)))
    after = (folder / "run" / "rows.jsonl").read_bytes()
    assert after.startswith(before)
    assert len(after.splitlines()) == len(before.splitlines()) + 2
    with pytest.raises(ValueError, match="other settings"):
        run(config(folder, response_tokens=NEW + 1))


def test_the_table_has_means_with_intervals():
    row = {
        "id": "a",
        "category": "",
        "policy": "p",
        "budget": 8,
        "prompt_tokens": 9,
        "modules": None,
    }
    values = {"kl": 0.5, "same": 1.0, "followed": 1.0, "f1": 0.0}
    rows = [row | values, row | values | {"id": "b", "kl": 1.5}]
    lines = table(rows, ["p"], [8]).splitlines()
    assert lines[0] == "Prompts, and their tokens: 2 all prompts (9 to 9)."
    assert "| p | 1.000 (-5.353 to 7.353) |" in lines  # t of one degree of freedom: 12.706
    assert "| p | 0.000 (0.000 to 0.000) |" in lines


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "line 1: expected a JSON object"),
        ('{"text": "x"}', "line 1: it has no `messages`, no `prompt` and no `turns`"),
        ('{"prompt": "x"}', r"no prompt has 9 .* to 99 tokens: change --categories, --budgets or"),
    ],
)
def test_a_bad_file_is_one_error(folder, tmp_path, line, problem):
    path = tmp_path / "p.jsonl"
    path.write_text(line + "\n")
    tokenizer = lk.load(folder / "model").tokenizer
    with pytest.raises(ValueError, match=problem):
        read_prompts(path, tokenizer, count=5, shortest=9, longest=99)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--policies", "full"], "only policies that cut a cache"),
        (["--policies", "speckv"], "only policies that cut a cache"),
        (["--budgets", "0"], "--budgets must be numbers of at least 1"),
        (["--policies", "kvzip"], "only policies that cut a cache"),
        (["--policies", "laq", "--response-tokens", "4"], "--response-tokens 8 or more"),
        (
            ["--policies", "incremental:knorm:every=64"],
            "cuts the prompt while it is read, which no comparison",
        ),
        (["--policies", "rerotate:snapkv"], "--policies rerotate:snapkv: a comparison reads which"),
        (["--budgets", "8", "8"], "--budgets names one value twice"),
        (["--count", "0"], "--count must be at least 1"),
        (["--policies", "lookaheadkv"], "give their folder as --lookahead"),
    ],
)
def test_bad_options_are_one_line(folder, tmp_path, capfd, options, problem):
    given = ["--prompts", str(folder / "prompts.jsonl"), "--out", str(tmp_path / "run")]
    assert main([*given, "--model", str(folder / "model"), *options]) != 0
    assert problem in capfd.readouterr().err
