"""The tasks shared/...: answers found in the prompt's text, scores, sizes, questions of one cut."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.eval.grid import run as runner
from lookahead_jax.eval.grid.config import RunConfig
from lookahead_jax.eval.grid.prompts import assemble
from lookahead_jax.eval.grid.rows import MEASURED, ROWS, read_rows
from lookahead_jax.eval.tasks.base import Source, scored
from lookahead_jax.eval.tasks.registry import TASKS, find_task
from tests import tiny

NAMES = [task.name for task in find_task("shared")]
RULES = {
    f"shared/{name}{place}"
    for name in ("instructions", "recited")
    for place in ("", "_behind", "_pinned")
}
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(lk.EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of one layer that reads bytes, with a chat template."""
    folder = tmp_path_factory.mktemp("model")
    tiny.save_chat_model(folder, num_hidden_layers=1, max_position_embeddings=2048)
    return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def made(name, tokenizer, length=None, count=None, seed=0):
    count = count or (4 if name.endswith("_many") else 2)
    length = length or (1500 if "uuids" in name else 900)
    source = Source(tokenizer=tokenizer, length=length, count=count, seed=seed, data=None)
    return TASKS[name].make(source)


def solve(example) -> tuple[str, ...]:
    """The answers, from what the prompt says."""
    asked = re.findall(r'"([^"]+)"', example.question)
    if example.turns:
        ordinal, request = re.search(r"the (\w+) (\w+ about .*)\.", example.question).groups()
        same = [text for said, text in example.turns if said.endswith(f" and a {request}.")]
        return (f"{asked[0]} {same[ORDINALS.index(ordinal)].split(' ', 1)[1]}",)
    if "JSON" in example.context:
        return (json.loads(example.context[example.context.index("{") :])[asked[0]],)
    if "strings" in example.context:
        first, last = asked
        lines = [
            line
            for line in example.context.split("\n")
            if line.startswith(f"{first}-") and line.endswith(f"-{last}")
        ]
        assert len(lines) == 1
        return (lines[0].removeprefix(f"{first}-"),)
    (value,) = re.findall(r"\d+", example.question)
    holds = {value}
    for name, said in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", example.context):
        holds |= {name} if said in holds else set()
    return tuple(sorted(holds - {value}))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in RULES])
def test_answers_follow_from_the_text(name, tokenizer):
    for example in made(name, tokenizer):
        assert tuple(sorted(example.answers)) == solve(example)
        right = ", ".join(example.answers)
        assert scored(TASKS[name], right, example)[0] == 1
        for wrong in ("", "no idea", right[1:-1]):
            assert scored(TASKS[name], wrong, example)[0] < 1
        assert scored(TASKS[name], "no idea", example)[0] == 0
        if "hops" in name:
            share = 1 / len(example.answers)
            assert scored(TASKS[name], example.answers[0], example)[0] == pytest.approx(share)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_fill_the_length_and_are_functions_of_their_seed(name, tokenizer):
    length = 2100 if "uuids" in name else 1000
    examples = made(name, tokenizer, length)
    for example in examples:
        whole = assemble(example, tokenizer, limit=length, chat=True).whole
        assert 0.9 * length < len(whole) + example.max_new_tokens <= length
        text = tokenizer.decode(whole)
        said = [part for turn in example.turns for part in turn]
        for part in (*said, example.context, example.question, example.prefix):
            assert part in text, "nothing is cut out"
    assert examples == made(name, tokenizer, length)
    count = 4 if name.endswith("_many") else 1
    assert examples[0] != made(name, tokenizer, length, count=count, seed=1)[0]
    with pytest.raises(ValueError, match="100 tokens are too few for this task"):
        made(name, tokenizer, 100)


def test_one_other_string_begins_and_one_ends_like_the_right_one(tokenizer):
    for example in made("shared/prefix_suffix", tokenizer):
        first, last = re.findall(r'"([^"]+)"', example.question)
        lines = example.context.split("\n")
        assert sum(line.startswith(f"{first}-") for line in lines) == 2
        assert sum(line.endswith(f"-{last}") for line in lines) >= 2


def test_contexts_are_shared_by_equally_many_questions(tokenizer):
    many = [name for name in NAMES if name.endswith("_many")]
    assert len(many) == 5
    for name in many:
        assert {e.group for e in made(name.removesuffix("_many"), tokenizer)} == {""}
        groups: dict[str, list] = {}
        for example in made(name, tokenizer, count=9):
            groups.setdefault(example.group, []).append(example)
        assert [len(group) for group in groups.values()] == [4, 4]
        for group in groups.values():
            assert len({e.context for e in group}) == 1
            assert len({e.question for e in group}) == 4
        # More examples are others in addition.
        assert made(name, tokenizer, count=4) == groups["0"]
    with pytest.raises(ValueError, match="--count 3: this task asks 4 questions of each context"):
        made("shared/kv_many", tokenizer, count=3)


def test_the_value_of_a_key_is_what_is_quoted_first(tokenizer):
    for name in ("shared/kv", "shared/kv_uuids_many"):
        example = made(name, tokenizer)[0]
        (right,) = example.answers
        said = {
            right: 1, f'{right}", "other-key": "1111"': 1, f' {right}"}}': 1,
            f'1111", "other-key": "{right}"': 0, f"{right}0": 0, f'"{right}"': 0,
        }  # fmt: skip
        assert {text: scored(TASKS[name], text, example)[0] for text in said} == said


def test_a_chat_s_template_counts(folder):
    tokenizer = Tokenizer.load(folder)
    (example,) = made("shared/mrcr", tokenizer, 1500, count=1)
    whole = assemble(example, tokenizer, limit=1500, chat=True).whole
    assert 1300 < len(whole) + example.max_new_tokens <= 1500


def test_a_repeated_writing_needs_its_code_first(tokenizer):
    task = TASKS["shared/mrcr"]
    example = made(task.name, tokenizer)[0]
    (right,), code = example.answers, example.extra["code"]
    assert len(code) == 4
    assert scored(task, right, example) == (1, {"exact": 1, "begins": 1})
    text = right.removeprefix(code)
    for wrong in (text, f" {right}"):
        assert scored(task, wrong, example) == (0, {"exact": 0, "begins": 0})
    # difflib's ratio: twice the matching characters over all.
    half = text[: len(text) // 2]
    expected = 2 * len(half) / (len(text) + len(half))
    ratio, measures = scored(task, code + half, example)
    assert ratio == pytest.approx(expected)
    assert measures == {"exact": 0, "begins": 1}


def test_instructions_are_counted_one_by_one(tokenizer):
    task = TASKS["shared/instructions"]
    (example,) = made(task.name, tokenizer, count=1)
    asked = {
        "begin": "river", "end": "stone", "use": "music", "number": 317, "lines": 2, "case": "small"
    }  # fmt: skip
    six = dataclasses.replace(example, extra={"asked": asked})
    follows = {
        "river, music\n\n317 by the stone.": "begin end use number lines case",
        "River music 317 stone": "begin end use number",
        "RIVER\nSTONE": "begin end lines",
        "a river of stone and musical 3170": "case",
        "stone\nriver\nmusic\n317": "use number case",
        "": "",
    }
    for text, names in follows.items():
        share, measures = scored(task, text, six)
        assert measures == {name: float(name in names.split()) for name in asked}, text
        assert share == pytest.approx(len(names.split()) / 6)
    lines = example.answers
    recited, first = TASKS["shared/recited"], made("shared/recited", tokenizer, count=1)[0]
    assert (first.context, first.answers) == (example.context, lines)
    assert scored(recited, "\n".join(lines), first)[0] == 1
    share, measures = scored(recited, lines[1], first)
    assert (share, list(measures.values())) == (0.25, [0, 1, 0, 0])
    capital = dataclasses.replace(example, extra={"asked": {"case": "capital"}})
    assert [scored(task, text, capital)[0] for text in ("AB 1", "Ab", "12")] == [1, 0, 0]


def test_instructions_stand_before_or_behind_the_text(tokenizer):
    places = {}
    for name in ("instructions", "instructions_behind", "instructions_pinned"):
        example = made(f"shared/{name}", tokenizer, count=1)[0]
        assert len(example.extra["asked"]) == 4
        at = [example.context.index(line) for line in example.answers]
        places[name] = (max(at) < example.context.index("Text:"), example.pin)
        for line in example.answers:
            assert line in example.pin or not example.pin
    assert places["instructions"] == (True, "")
    assert places["instructions_behind"] == (False, "")
    assert places["instructions_pinned"][0]
    assert places["instructions_pinned"][1]


def run_rows(folder, out, **changes):
    config = RunConfig(
        out=out, models=(str(folder),), policies=("snapkv:window=8",), lengths=(800,),
        max_new_tokens=6, views=0, **changes,
    )  # fmt: skip
    runner.run(config)
    return list(read_rows(out / ROWS, MEASURED))


def test_a_context_is_read_once_for_its_questions(folder, tmp_path, monkeypatch):
    calls, generate = [], lk.generate
    monkeypatch.setattr(
        lk, "generate", lambda m, p, **k: calls.append((len(p), len(k["questions"])))
        or generate(m, p, **k),
    )  # fmt: skip
    grid = dict(tasks=("shared/kv_many",), budgets=(64,), count=8, batch=4)
    rows = run_rows(folder, tmp_path / "run", protocols=("seen", "hidden"), **grid)
    # The first batch of a shape runs twice.
    assert set(calls) == {(1, 4)}
    assert [row["group"] for row in rows] == ["0"] * 4 + ["1"] * 4
    assert {row["protocol"] for row in rows} == {"hidden"}
    model = lk.load(folder)
    examples = {e.id: e for e in made("shared/kv_many", model.tokenizer, 800, count=8)}
    asked = [examples[row["id"]] for row in rows[:4]]
    prompts = [assemble(e, model.tokenizer, limit=800, chat=True) for e in asked]
    expected = generate(
        model, [prompts[0].context], questions=[p.question for p in prompts], budget=64,
        max_new_tokens=6, policy=lk.make_policy("snapkv", window=8),
    )  # fmt: skip
    assert [row["predicted_answer"] for row in rows[:4]] == expected.text
    # Killed in the middle of a group: the context is read again, and no row is written twice.
    lines = (tmp_path / "run" / ROWS).read_bytes().splitlines(keepends=True)
    (tmp_path / "run" / ROWS).write_bytes(b"".join(lines[:6]))
    again = run_rows(folder, tmp_path / "run", protocols=("seen", "hidden"), **grid)
    assert [(r["id"], r["predicted_answer"]) for r in again] == [
        (r["id"], r["predicted_answer"]) for r in rows
    ]
    part = run_rows(folder, tmp_path / "part", protocols=("hidden",), part=1, parts=2, **grid)
    assert {row["group"] for row in part} == {"1"}


def test_what_an_example_pins_is_kept(folder, tmp_path, monkeypatch):
    results, generate = [], lk.generate
    monkeypatch.setattr(
        lk, "generate", lambda *a, **k: results.append(generate(*a, **k)) or results[-1]
    )
    grid = dict(tasks=("shared/instructions_pinned",), budgets=(280,), count=1, batch=1)
    (row,) = run_rows(folder, tmp_path / "run", **grid)
    assert len(row["measures"]) == 4
    model = lk.load(folder)
    (example,) = made("shared/instructions_pinned", model.tokenizer, 800, count=1)
    prompt = assemble(example, model.tokenizer, limit=800, chat=True)
    ((start, end),) = prompt.pin
    assert model.tokenizer.decode(prompt.whole[start:end]) == example.pin
    assert prompt.context[start:end] == prompt.whole[start:end]
    for kept in results[-1].kept.reshape(-1, 280):
        assert set(range(start, end)) <= set(kept.tolist())
    with pytest.raises(ValueError, match="specpc drops tokens of a prompt and can pin none"):
        runner.run(
            RunConfig(
                out=tmp_path / "other", models=(str(folder),), policies=("specpc",),
                draft_model=str(folder), lengths=(800,), **grid,
            )
        )  # fmt: skip
    # Before anything is answered, and whatever the smaller budgets allow.
    for budget in (end - start - 1, end - start):
        changes = dict(policies=("full", "snapkv"), budgets=(280, budget))
        config = RunConfig(
            out=tmp_path / f"{budget}", models=(str(folder),), lengths=(800,), max_new_tokens=1,
            **{**grid, **changes},
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner.ModelRun, "answer", lambda *args: iter([1]))
            if budget == end - start:
                runner.run(config)
                continue
            with pytest.raises(ValueError, match=rf"pinned pins {end - start} tokens: give --bud"):
                runner.run(config)
    lost = dataclasses.replace(example, pin="not there")
    with pytest.raises(ValueError, match="the prompt does not contain 'not there'"):
        assemble(lost, model.tokenizer, limit=800, chat=True)


PROMPTS, QUESTIONS = tiny.prompts((60, 41)), tiny.prompts((5, 3, 7, 4, 2, 6), seed=1)
CUT = dict(policy=lk.make_policy("snapkv", window=4), budget=16, max_new_tokens=12, eos_ids=())
EACH = [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3


def test_questions_of_one_cut_context_are_answered_as_each_alone(folder):
    """Rows of one prompt have its entries, pins included, also while decoding."""
    model, pin = lk.load(folder), [[(7, 12)], [(20, 22)]]
    cut = dict(CUT, evict_every=8)
    together = lk.generate(model, PROMPTS, questions=QUESTIONS, pin=pin, **cut)
    pins = [pin[0]] * 3 + [pin[1]] * 3
    each = lk.generate(model, EACH, questions=QUESTIONS, pin=pins, **cut)
    assert together.prompt_ids == EACH
    assert together.prompt_tokens == [60] * 3 + [41] * 3
    assert together.tokens == each.tokens
    np.testing.assert_array_equal(together.kept, each.kept)
    with pytest.raises(ValueError, match="3 questions for 2 prompts: give one, or equally many"):
        lk.generate(model, PROMPTS, questions=QUESTIONS[:3], **CUT)


@pytest.mark.slow
def test_a_search_reads_a_prompt_once_for_its_questions(folder):
    model = lk.load(folder)
    search = dict(strategy="best_of_n", reward=lambda prompt, text: float(len(set(text))), **CUT)
    together = lk.search(model, PROMPTS, questions=QUESTIONS, **search)
    each = lk.search(model, EACH, questions=QUESTIONS, **search)
    assert together.tokens == each.tokens
    assert together.prompt_tokens == each.prompt_tokens
