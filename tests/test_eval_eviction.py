"""The grid with eviction while decoding: the answers of `lk.generate`, and what cannot follow."""

import dataclasses
from pathlib import Path

import jax
import pytest

import lookahead_jax as lk
from lookahead_jax.eval.grid import run as runner
from lookahead_jax.eval.grid.config import RunConfig
from lookahead_jax.eval.grid.rows import MEASURED, ROWS, read_rows
from lookahead_jax.eval.tasks.base import Example
from lookahead_jax.eval.tasks.registry import TASKS, Task

BUDGET, EVERY, NEW = 12, 8, 32
GRID = dict(
    tasks=("counting",), budgets=(BUDGET,), lengths=(64,), count=2, batch=2, evict_every=EVERY
)
PROMPTS = ("x = [1, 2, 3, 4, 5, 6, 7, 8]\nfor i in x:\n    print(", "def add(a, b):\n    return ")


def made(source) -> list[Example]:
    return [
        Example(id=str(i), context=text, question="", max_new_tokens=NEW)
        for i, text in enumerate(PROMPTS)
    ]


def test_answers_are_those_of_generate(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setitem(TASKS, "counting", Task(name="counting", make=made, score=None))
    asked = []
    generate = lk.generate
    monkeypatch.setattr(
        lk,
        "generate",
        lambda *a, **k: asked.append((k["policy"], k["evict_every"])) or generate(*a, **k),
    )
    config = RunConfig(out=tmp_path / "run", policies=("full", "keydiff"), **GRID)
    runner.run(config)
    full, keydiff = lk.make_policy("full"), lk.make_policy("keydiff")
    assert set(asked) == {(full, None), (keydiff, EVERY)}
    model = lk.load(lk.EMBEDDED_MODEL)
    prompts = [model.tokenizer.encode(text) for text in PROMPTS]  # type: ignore[union-attr]
    result = generate(
        model, prompts, policy=keydiff, budget=BUDGET, max_new_tokens=NEW, evict_every=EVERY
    )
    rows = list(read_rows(config.out / ROWS, MEASURED))
    answers = {(row["policy"], row["id"]): row["predicted_answer"] for row in rows}
    assert [answers["keydiff", str(i)] for i in range(2)] == result.text
    assert any(answers["keydiff", str(i)] != answers["full", str(i)] for i in range(2))
    with pytest.raises(ValueError, match=r"other settings \(evict_every: 8, now None\)"):
        runner.run(dataclasses.replace(config, evict_every=None))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"policies": ("full", "snapkv", "expected_attention")}, "policies=expected_attention, "
         "evict_every=8: policy ExpectedAttention cannot evict while decoding: use .*keydiff"),
        ({"policies": ("specpc",)}, "policies=specpc, evict_every=8: policy Full cannot evict"),
        ({"policies": ("keydiff",), "evict_every": 0}, "interval must be"),
        ({"policies": ("h2o",), "protocols": ("seen", "hidden")}, "policies=h2o adds up scores"),
        ({"strategies": ("none", "best_of_n:n=2")}, "best_of_n:n=2 evicts from the prompt"),
    ],
)  # fmt: skip
def test_what_cannot_evict_while_decoding_is_refused_by_name(given, complaint):
    with pytest.raises(ValueError, match=complaint):
        RunConfig(out=Path("unused"), **GRID | given)
