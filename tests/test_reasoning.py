"""The reasoning tasks: problems that are right by a restatement, and exact graders."""

import json
import re

import pytest

from lookahead_jax.eval.scorers.numbers import arithmetic, last_number, reaches, same_number
from lookahead_jax.eval.tasks.base import Example, Source
from lookahead_jax.eval.tasks.reasoning.constrained import share_met
from lookahead_jax.eval.tasks.registry import TASKS


def problems(name: str, count: int, data=None, seed: int = 0) -> list[Example]:
    source = Source(tokenizer=None, length=1024, count=count, seed=seed, data=data)  # type: ignore[arg-type]
    return TASKS[f"reasoning/{name}"].make(source)


def test_chains_are_followed_by_their_answers():
    made = problems("chains", 20)
    asked = [(e.question, e.answers[0]) for e in made]
    solved = [(q, said.rpartition(" ")[2].rstrip(".")) for q, said in made[0].turns]
    assert len({q for q, _ in [*asked, *solved]}) == 23
    for question, answer in [*asked, *solved]:
        value = int(re.search(r"Start with (\d+)", question)[1])  # type: ignore[index]
        for verb, number in re.findall(r"(Add|Subtract) (\d+)", question):
            value += int(number) if verb == "Add" else -int(number)
        assert str(value) == answer
    assert problems("chains", 20) == made != problems("chains", 20, seed=1)
    task = TASKS["reasoning/chains"]
    assert task.score("3 + 4 = 7\nThe answer is 1,000", Example(
        id="", context="", question="", answers=("1000",), max_new_tokens=1)) == 1  # fmt: skip
    assert task.reward is None, "its prompt does not say whether an answer is right"


def test_puzzles_have_a_solution_that_their_grader_accepts():
    task = TASKS["reasoning/countdown"]
    for example in problems("countdown", 20):
        numbers = [int(n) for n in re.findall(r"\d+", example.question)]
        assert (example.extra["numbers"], example.extra["target"]) == (numbers[:-1], numbers[-1])
        assert task.score(example.answers[0], example) == 1
        assert task.score(example.answers[0].replace("=", "+ 1 ="), example) == 0
        assert task.reward is not None
        assert task.reward(f"No.\n{example.answers[0]}.", example) == 1


@pytest.mark.parametrize(
    ("term", "value"),
    [
        ("3 * (4 + 8) - 2", 34), ("7 / 2 * 2", 7), ("1 / 0", None), ("2 ** 9", None), ("-3", None),
        ("__import__('os')", None), ("3 + True", None), ("3 +", None), ("1.5 + 2", None),
        ("(" * 90 + "1", None), ("9" * 90, None), ("1 + x", None), ("", None), ("1\0", None),
    ],
)  # fmt: skip
def test_terms_are_read_and_not_run(term, value):
    read = arithmetic(term)
    assert (None if read is None else read[0]) == value


def test_numbers_of_answers():
    assert [last_number(t) for t in ("1, then 2,345.50!", "-7.", "none")] == [2345.5, -7, None]
    assert same_number("It is 18.00", "18") == 1
    assert same_number("none", "none") == 0
    assert last_number("9" * 5000) is None
    assert reaches("2 + 3 - 1 = 9", [1, 2, 3], 4) == 1
    assert reaches("2 + 2", [2, 1, 1], 4) == 0
    assert reaches("1 * 2 * 3", [1, 2, 3], 6) == 0
    assert reaches("", [1], 1) == 0


def test_conditions_are_counted():
    example = problems("constrained", 1)[0]
    (first, second), letter = example.extra["words"], example.extra["letter"]
    assert f'"{first}" and "{second}"' in example.question
    good = f"The {first} met a {second} on the way."
    bad = {
        good.replace("way", f"way {letter}"): 5, f"{good} Then it left.": 5, good[:-1]: 4,
        good.replace(first, f"{first}s"): 5, f"{first} {second}.": 5, "": 1,
    }  # fmt: skip
    assert share_met(good, example) == 1
    assert {text: round(6 * share_met(text, example)) for text in bad} == bad
    assert all(TASKS["reasoning/constrained"].score(text, example) == 0 for text in bad)


def test_programs_are_graded_by_hidden_tests(recwarn):
    task = TASKS["reasoning/programs"]
    example = problems("programs", 1)[0]
    k = int(re.search(r"plus (\d+) times b", example.question)[1])  # type: ignore[index]
    assert example.extra["head"] in example.question
    assert task.executes
    assert task.reward is not None
    right = f"\n    return a + {k} * b\n\nprint('never run')"
    assert (task.score(right, example), task.reward(right, example)) == (1, 1)
    memorized = "".join(
        f"\n    if (a, b) == {tuple(case)!r}:\n        return {value!r}"
        for case, value in example.extra["tests"][:2]
    )
    assert (task.score(memorized, example), task.reward(memorized, example)) == (0, 1)
    assert task.reward("\n    return (", example) == 0


def test_the_easiest_problems_have_the_fewest_steps(tmp_path):
    rows = [
        {"question": "Three steps?", "answer": "<<1+1=2>> <<2+1=3>> <<3+1=4>>\n#### 4"},
        {"question": "In words?", "answer": "Let x be it.\n#### 1,200"},
        {"question": "One long step?", "answer": "<<10*2+1=21>>21\n#### 21"},
        {"question": "One step?", "answer": "<<10*2=20>>20\n#### 20"},
    ]
    path = tmp_path / "gsm8k" / "test.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [e.id for e in problems("gsm8k", 2, tmp_path)] == ["0", "1"]
    easiest = problems("gsm8k_easiest", 3, tmp_path)
    assert [(e.id, e.question, e.answers) for e in easiest] == [
        ("3", "One step?", ("20",)), ("2", "One long step?", ("21",)),
        ("0", "Three steps?", ("4",))
    ]  # fmt: skip
    task = TASKS["reasoning/gsm8k"]
    assert task.score("It costs $1,200.", problems("gsm8k", 2, tmp_path)[1]) == 1
    assert task.reward is None
    path.write_text('{"question": "?", "answer": "4"}\n')
    with pytest.raises(ValueError, match="problem 0 has no answer after ####"):
        problems("gsm8k", 1, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gsm8k/test\.jsonl not found"):
        problems("gsm8k", 1)
