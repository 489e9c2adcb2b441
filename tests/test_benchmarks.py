"""Tasks from files in the benchmarks' formats (tiny, self-made), and generated ones."""

import dataclasses
import json
from pathlib import Path

import pytest

import lookahead_jax as lk
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.eval.grid.prompts import assemble, truncate
from lookahead_jax.eval.tasks import infinitebench, longbench, longproc
from lookahead_jax.eval.tasks.base import Example, Source, listed, scored
from lookahead_jax.eval.tasks.registry import TASKS, find_task

FIXTURES = Path(__file__).parent / "fixtures"
DATA = FIXTURES / "benchmarks"
PROMPTS = json.loads((FIXTURES / "scorers.json").read_text("utf-8"))["prompts"]
TOKENIZER = Tokenizer.load(lk.EMBEDDED_MODEL)
SPECIAL = "<|start|>"


def made(name, length=700, count=2, data=DATA):
    source = Source(tokenizer=TOKENIZER, length=length, count=count, seed=3, data=data)
    return TASKS[name].make(source)


def whole(example):
    return example.context + example.question


ROW = {
    "context": "CONTEXT {x}", "input": "The largest number of func_7(-3) ?", "answer": ["B"],
    "options": ["one", "two", "three", "four"], "answers": ["a"],
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in PROMPTS if n in TASKS])
def test_prompts_are_the_harness_s_but_for_white_space(name, tmp_path):
    """lm-evaluation-harness strips what LongBench's own file has at prompts' ends, and doubles
    fewer line breaks before few-shot questions."""
    path = tmp_path / f"{name}.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(ROW) + "\n")
    (example,) = made(name, data=tmp_path)
    same = ("trec", "triviaqa", "samsum")
    expected, ours = PROMPTS[name], whole(example)
    if name.endswith(same):
        expected, ours = expected.replace("\n\n", "\n"), ours.replace("\n\n", "\n")
    assert ours.strip() == expected.strip()
    assert example.context.endswith(ROW["context"])


def test_all_benchmarks_are_there():
    assert len(longbench.FORMS) == 16
    assert len(longbench.E_TASKS) == 13
    assert len(infinitebench.FORMS) == 12
    assert sum(map(len, longproc.LONGPROC_SIZES.values())) == 16
    assert len(find_task("ruler")) == 13
    with pytest.raises(ValueError, match=r"families: .*longbench"):
        find_task("rule")


PERFECT = {
    "longbench/hotpotqa": "1707",
    "longbench_e/hotpotqa": "1707",
    "longbench/trec": "\nIndividual\nQuestion: Date",
    "longbench/samsum": "Ann and Bo will have tea.",
    "longbench/lcc": "\n    return total\n",
    "longbench_v2": "The correct answer is (C) green",
    "infinitebench/passkey": "It is 71432.",
    "infinitebench/longbook_choice_eng": "C",
    "infinitebench/math_calc": "[1, 3, 2]",
    "longproc/countdown_0.5k": "<Solution>\n13+5=18\n18/3=6\n6*7=42\n</Solution>",
    "longproc/html_to_tsv_0.5k": "```tsv\nname\tyear\nthe mill\t1707\n```",
}


@pytest.mark.parametrize("name", list(PERFECT))
def test_a_right_answer_scores_one_and_a_wrong_one_less(name):
    task, example = TASKS[name], made(name)[0]
    assert scored(task, PERFECT[name], example)[0] == pytest.approx(1.0, abs=1e-6)
    worst, beside = scored(task, "Z 0", example)
    assert worst < 0.2
    assert ("extraction_rate" in beside) == name.startswith("longproc")
    prompt = assemble(example, TOKENIZER, limit=10_000, chat=False)
    assert TOKENIZER.decode(prompt.whole) == whole(example)
    both = TOKENIZER.decode(prompt.context) + TOKENIZER.decode(prompt.question)
    assert both == (whole(example) if example.question else "")


def test_mt_bench_has_turns_and_no_score():
    (example,), task = made("mt_bench"), TASKS["mt_bench"]
    assert (example.id, example.context) == ("81", "Write a line about a mill.")
    assert task.score is None
    second = task.follow(example, " It turns.\n")
    assert (second.id, second.context) == ("81:2", "Now make it rhyme.")
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chatty = dataclasses.replace(TOKENIZER, chat_templates={"default": template})
    prompt = assemble(second, chatty, limit=100, chat=True)
    assert TOKENIZER.decode(prompt.whole) == (
        "<user>Write a line about a mill.<assistant>It turns.<user>Now make it rhyme.<assistant>"
    )
    assert not prompt.question
    assert task.follow(second, "It turns.") is None


GENERATED = [task.name for task in find_task("ruler")] + ["ruler_like/cwe", "needle", "needle_like"]


@pytest.mark.parametrize("name", GENERATED)
def test_generated_prompts_fit_and_hold_their_answers(name):
    task = TASKS[name]
    examples = made(name, length=1200, count=3)
    sizes = []
    for example in examples:
        text = whole(example) + example.prefix
        size = len(TOKENIZER.encode(text)) + example.max_new_tokens
        sizes.append(size)
        assert size <= 1200
        assert all(answer in example.context for answer in example.answers)
        assert task.score(f" {listed(example.answers)}.", example) == 1
        assert task.score("nothing", example) == 0
        # Of one answer a part cannot be found.
        assert "qa" in name or task.binary == (len(example.answers) == 1)
    assert min(sizes) > 0.75 * 1200 or "qa" in name, sizes
    assert len({example.context for example in examples}) == 3
    again = made(name, length=1200, count=3)
    assert [whole(e) for e in again] == [whole(e) for e in examples]


def test_difficulty_is_the_published_one():
    first = {task.name: made(task.name, length=1500, count=1)[0] for task in find_task("ruler")}
    needles = {name: example.context.count("special magic") - 1 for name, example in first.items()}
    assert needles["ruler/niah_single_1"] == needles["ruler/niah_single_3"] == 1
    assert needles["ruler/niah_multikey_1"] == needles["ruler/niah_multivalue"] == 4
    assert needles["ruler/niah_multikey_3"] > 10
    assert len(first["ruler/niah_multiquery"].answers) == 4
    assert first["ruler/niah_single_1"].context.startswith("A special magic number is hidden")
    assert first["ruler/niah_multiquery"].question.startswith("\nWhat are all the special magic n")
    assert first["ruler/vt"].context.count("VAR") == 18  # nine lines each: an example and the task
    assert len(first["ruler/vt"].answers) == 5
    assert len(first["ruler/cwe"].answers) == 10


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"PaulGrahamEssays.json .*no --data folder"):
        made("ruler/niah_single_2", data=None)
    with pytest.raises(FileNotFoundError, match=r"longbench/qasper.jsonl not found in"):
        made("longbench/qasper", data=tmp_path)
    path = tmp_path / "longbench" / "qasper.jsonl"
    path.parent.mkdir()
    path.write_text('{"context": "x"}\n')
    with pytest.raises(ValueError, match="no field 'input'"):
        made("longbench/qasper", data=tmp_path)
    path.write_text("{\n")
    with pytest.raises(ValueError, match="line 1"):
        made("longbench/qasper", data=tmp_path)


def test_needles_stand_at_their_depth():
    for name in ("needle", "own/needle"):
        for i, example in enumerate(made(name, length=1000, count=11)):
            depth = example.extra["depth"]
            assert depth == 10 * i
            if name == "needle":
                at = example.context.index(example.answers[0]) / len(example.context)
            else:
                rows = [TOKENIZER.decode([t]) for t in example.context]
                at = len("".join(rows).split(example.answers[0])[0]) / len("".join(rows))
            assert at == pytest.approx(depth / 100, abs=0.12)


def test_the_middle_goes_as_published():
    text = " ".join(f"word{i}" for i in range(300))
    ids = TOKENIZER.encode(text)
    halves = truncate(text, TOKENIZER, 101, "halves")
    assert halves == TOKENIZER.decode(ids[:50]) + TOKENIZER.decode(ids[-50:])
    joined = truncate(text, TOKENIZER, 101, "joined")
    assert joined == TOKENIZER.decode(ids[:50] + ids[-51:])
    assert truncate(text, TOKENIZER, len(ids), "halves") == text
    example = Example(id="0", context=text, question="\nWhat?", max_new_tokens=4)
    prompt = assemble(example, TOKENIZER, limit=101, chat=False)
    assert TOKENIZER.decode(prompt.question) == "\nWhat?"
    assert len(prompt.context) + len(prompt.question) <= 103
    with pytest.raises(ValueError, match="more than half"):
        assemble(dataclasses.replace(example, question=text), TOKENIZER, limit=101, chat=False)


def test_the_chat_template_goes_around_context_and_question():
    template = (
        "{% for m in messages %}<user>{{ m['content'] | trim }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chatty = dataclasses.replace(TOKENIZER, chat_templates={"default": template})
    example = Example(
        id="0", context="A text.", question="\nWhat? ", prefix=" It is", max_new_tokens=4
    )
    prompt = assemble(example, chatty, limit=99, chat=True)
    assert chatty.decode(prompt.context, skip_special=False) == "<user>A text."
    assert chatty.decode(prompt.question, skip_special=False) == "\nWhat?<end><assistant> It is"
    plain = assemble(dataclasses.replace(example, chat=False), chatty, limit=99, chat=True)
    assert plain == assemble(example, chatty, limit=99, chat=False)
    assert chatty.decode(plain.whole) == "A text.\nWhat?  It is"
