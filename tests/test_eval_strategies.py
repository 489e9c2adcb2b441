"""Strategies as an axis of the evaluation: rows, rewards, and the table at equal tokens."""

import functools
import json

import jax
import numpy as np
import pytest

from lookahead_jax.checkpoints.load import load
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.eval.grid import run as runner
from lookahead_jax.eval.grid.config import CONFIGS, RunConfig, cells
from lookahead_jax.eval.grid.prompts import assemble
from lookahead_jax.eval.grid.rows import MEASURED, ROWS, GridCell, RowFile, key_of, read_rows
from lookahead_jax.eval.grid.strategies import decoding_of, seed_of
from lookahead_jax.eval.intervals import of_pairs
from lookahead_jax.eval.report import report, strategies
from lookahead_jax.eval.report.cells import Report
from lookahead_jax.eval.tasks.base import Example, Task
from lookahead_jax.eval.tasks.registry import TASKS
from lookahead_jax.generation.generate import generate
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.strategies.registry import STRATEGIES, make_strategy
from lookahead_jax.strategies.search import search
from tests import tiny
from tests.test_report import row

BEST = "best_of_n:n=2,temperature=5.0"


def letters(prediction: str, example: Example) -> float:
    """A reward that differs from text to text; examples have letters of their own."""
    return sum(prediction.count(letter) for letter in example.extra["letters"]) / 100


def make(source) -> list[Example]:
    return [
        Example(
            id=str(i), context="", question=f"Say {word}", max_new_tokens=8, answers=("x",),
            extra={"letters": word},
        )
        for i, word in enumerate(["abcdefghijklmn", "opqrstuvwxyz", "ABCDEFGHIJ"])
    ]  # fmt: skip


def asked(grade, example, prompt: str, text: str) -> float:
    return grade(text, example)


def score(prediction: str, example: Example) -> float:
    return float(len(set(prediction)) > 6)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A finished run of a task with a reward of its own, and one without."""
    folder = tmp_path_factory.mktemp("strategies")
    tiny.save_chat_model(folder, num_hidden_layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        for name, reward in (("mine/own", letters), ("mine/none", None)):
            task = Task(name=name, make=make, score=score, binary=True, reward=reward)
            patch.setitem(TASKS, name, task)
        made = RunConfig(
            out=folder / "run", models=(str(folder),), policies=("full",), tasks=("mine",),
            lengths=(64,), strategies=("none", "none:temperature=5.0", BEST), count=3, batch=2,
            most_tokens=12, oracle_reward=True, views=0,
        )  # fmt: skip
        runner.run(made)
        yield made


def test_rows_are_the_searches_of_their_examples(config):
    rows = {key_of(row): row for row in read_rows(config.out / ROWS, MEASURED)}
    model = load(config.models[0])
    examples = make(None)
    full, sampling = make_policy("full"), Sampling(temperature=5.0)
    for task in ("mine/own", "mine/none"):
        made = list(cells(config, config.models[0], task, 64))
        assert [cell.strategy for cell in made] == [*config.strategies]
        example = examples[2]
        prompts = [assemble(example, model.tokenizer, limit=64, chat=True).whole] * 2
        seeds = [seed_of(config.seed, example)] * 2
        greedy, drawn, best = (rows[cell, "2"] for cell in made)
        options = dict(policy=full, max_new_tokens=8)
        said = generate(model, prompts, **options)
        assert greedy["predicted_answer"] == said.text[0]
        assert (greedy["work_tokens"], greedy["work_forwards"]) == (8, 7)
        said = generate(model, prompts, seeds=seeds, sampling=sampling, **options)
        assert drawn["predicted_answer"] == said.text[0]
        reward = letters if task == "mine/own" else score
        found = search(
            model, prompts, strategy=make_strategy("best_of_n", n=2), seeds=seeds, most_tokens=12,
            reward=functools.partial(asked, reward, example),
            sampling=sampling, **options,
        )  # fmt: skip
        assert best["predicted_answer"] == found.text[0]
        assert (best["work_tokens"], best["work_forwards"]) == (12, 5)
        assert [c["text"] for c in best["candidates"]] == [c.text for c in found.candidates[0]]
        compared = [c["compared"] for c in best["candidates"]]
        assert compared == [reward(str(c.text), example) for c in found.candidates[0]]
        assert best["reward"] == ("task" if task == "mine/own" else "oracle")
        assert best["ttft_s"] is None


def test_runs_with_strategies_resume_and_old_rows_have_none(config, tmp_path, monkeypatch):
    lines = (config.out / ROWS).read_bytes().splitlines(keepends=True)
    monkeypatch.setattr(runner.Answerer, "answer", None)  # nothing is left to answer
    runner.run(config)
    assert (config.out / ROWS).read_bytes() == b"".join(lines)
    old = json.loads(lines[0])
    for name in ("strategy", "work_tokens", "work_forwards"):
        del old[name]
    (tmp_path / ROWS).write_text(json.dumps(old) + "\n")
    (read,) = read_rows(tmp_path / ROWS, MEASURED)
    assert key_of(read)[0].strategy == "none"
    assert strategies.table(Report([tmp_path])) == ""


def test_without_an_oracle_a_strategy_leaves_the_task_out(config, tmp_path, capsys):
    without = RunConfig(**{**vars(config), "oracle_reward": False, "out": tmp_path})
    made = cells(without, "m", "mine/none", 64)
    assert [cell.strategy for cell in made] == [*config.strategies[:2]]
    drafted = RunConfig(**{**vars(config), "drafters": ("trie", "suffix"), "out": tmp_path})
    found = [(c.drafter, c.strategy) for c in cells(drafted, "m", "mine/own", 64)]
    assert found.count(("none", BEST)) == 1
    assert ("trie", BEST) not in found
    with pytest.raises(ValueError, match="other settings"):
        runner.open_run(RunConfig(**{**vars(config), "most_tokens": 13}))


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("best", "unknown strategy 'best'"),
        ("none:n=3", "unknown setting 'n'; known: temperature"),
        ("beam:temperature=1", "chooses tokens by its own rule: leave sampling out"),
        ("best_of_n:temperature=0", "draws samples: give a temperature above 0"),
        ("best_of_n:n=2,n=3", "a setting stands there twice"),
        ("best_of_n:n", "settings are name=value"),
        ("best_of_n:temperature=hot", "temperature is not a number"),
    ],
)
def test_impossible_strategies_are_named(tmp_path, spec, complaint):
    with pytest.raises(ValueError, match=complaint):
        RunConfig(out=tmp_path, strategies=(spec,))


def test_limits_below_the_rows_of_a_strategy_are_named_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="most_tokens must be at least 8, not 4"):
        RunConfig(out=tmp_path, strategies=("best_of_n:n=8",), most_tokens=4)
    assert decoding_of("latr:lookahead=10,20,n=3").strategy == make_strategy(
        "latr", lookahead="10,20", n=3
    )


def test_strategies_that_need_another_model_say_so_at_the_start(config, tmp_path):
    routed = RunConfig(**{**vars(config), "strategies": ("arbitrage",), "out": tmp_path})
    with pytest.raises(ValueError, match="arbitrage needs a small model: give --draft-model"):
        runner.run(routed)
    predicted = {**vars(config), "policies": ("kv_prediction",), "out": tmp_path}
    with pytest.raises(ValueError, match="kv_prediction reads for no strategy"):
        RunConfig(**predicted)


def test_every_strategy_can_be_named_in_a_grid():
    for name in STRATEGIES:
        assert decoding_of(name).strategy == make_strategy(name)
    assert decoding_of("best_of_n:n=2,top_k=5").sampling == Sampling(temperature=0.8, top_k=5)
    for name in ("strategies_checked", "strategies_numbers"):
        shipped = json.loads((CONFIGS / f"{name}.json").read_text())
        for spec in shipped["strategies"]:
            decoding_of(spec)
        assert all(name in TASKS for name in shipped["tasks"])


# ---- the table ----------------------------------------------------------------------------------


def candidates(*texts):
    """(text, tokens, what the strategy compares, score)"""
    names = ("text", "new_tokens", "compared", "score")
    return {"candidates": [dict(zip(names, text, strict=True)) for text in texts]}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Greedy, beam, and votes and rewards of three candidates, on four examples."""
    folder = tmp_path_factory.mktemp("compared")
    file = RowFile(folder / ROWS)
    base = GridCell("m", "full", 0, "reasoning/a", 100, "none", "seen")
    work = lambda tokens: {"work_tokens": tokens, "work_forwards": 9}  # noqa: E731
    greedy = [0, 1, 0, 1]
    file.append([row(base, i, float(s), **work(10)) for i, s in enumerate(greedy)])
    beam = base._replace(strategy="beam:n=2")
    scores = zip([1, 1, 1, 0], [20, 22, 33, 5], strict=True)
    file.append([row(beam, i, float(s), ttft=None, **work(t)) for i, (s, t) in enumerate(scores)])
    votes = base._replace(strategy="self_consistency:n=3")
    texts = candidates(("is 1", 10, 1.0, 0.0), ("is 2", 10, 2.0, 1.0), ("so 2", 12, 2.0, 1.0))
    file.append([row(votes, i, 1.0, ttft=None, **work(32), **texts) for i in range(4)])
    best = base._replace(strategy="best_of_n:n=3")
    texts = candidates(("a", 10, 0.5, 0.0), ("b", 10, 0.7, 1.0), ("c", 12, 0.6, 0.0))
    oracle = {"reward": "oracle"}
    file.append([row(best, i, 1.0, ttft=None, **work(32), **texts, **oracle) for i in range(4)])
    file.close()
    return folder


def test_strategies_are_compared_at_equal_tokens_on_the_same_examples(compared):
    lines = {line["strategy"]: line for line in strategies.numbers(Report([compared]))}
    beam = lines["beam:n=2"]
    assert beam["work_tokens"][0] == 20
    assert beam["minus_greedy"][0] == 0.25
    # Beam took 20, 22, 33 and 5 tokens: 2, 2, 3 and 1 candidates. Two disagreeing votes: the first.
    votes = beam["equal_tokens"]["self_consistency:n=3"]
    assert votes["tokens"] == (20 + 20 + 32 + 10) / 4
    pairs = [(1, 0), (1, 0), (1, 1), (0, 0)]
    expected = of_pairs([(float(a), float(b)) for a, b in pairs], binary=True)
    assert votes["difference"] == pytest.approx(expected, abs=1e-4)
    best = beam["equal_tokens"]["best_of_n:n=3"]
    assert best["difference"][0] == pytest.approx(np.mean([0, 0, 0, 0]))
    assert lines["none"]["minus_greedy"] is None
    assert lines["none"]["equal_tokens"] == {}


def test_the_report_shows_strategies_and_names_oracles(compared, tmp_path):
    paths = report.write(report.ReportConfig(runs=(compared,), out=tmp_path))
    assert [path.name for path in paths[2:4]] == ["strategies.md", "strategies.json"]
    shown = paths[2].read_text("utf-8").splitlines()
    names = [line.split(" | ")[1] for line in shown if line.startswith("| reasoning")]
    assert names == ["greedy", "beam:n=2", "self_consistency:n=3", "best_of_n:n=3 (oracle)"]
    assert json.loads(paths[3].read_text("utf-8")) == strategies.numbers(Report([compared]))
    page = paths[0].read_text("utf-8")
    assert "best_of_n:n=3 (oracle), 20 tokens: 1.000" in page  # of its first two candidates
    assert "strategy beam:n=2" in page


def test_intervals_of_pairs_against_a_published_one():
    # Agresti & Min 2005, table I: 794 and 570 agree, 150 against 86 do not; Wald's is 0.021, 0.059.
    pairs = [(1.0, 1.0)] * 794 + [(1.0, 0.0)] * 150 + [(0.0, 1.0)] * 86 + [(0.0, 0.0)] * 570
    np.testing.assert_allclose(of_pairs(pairs, binary=True), (0.04, 0.0212, 0.0587), atol=2e-4)
    assert of_pairs([(1.0, 1.0)] * 9, binary=True)[1] < 0
    graded = of_pairs([(0.5, 0.0), (0.5, 0.5)], binary=False)
    np.testing.assert_allclose(graded, (0.25, 0.25 - 12.7062 / 4, 0.25 + 12.7062 / 4), rtol=1e-4)
