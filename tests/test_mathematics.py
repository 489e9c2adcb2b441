"""The grader of mathematics: final answers are found, read without running them, and compared."""

import json
import random
import sys
import time
from fractions import Fraction

import pytest

from lookahead_jax.eval.scorers.bounded_terms import Unreadable
from lookahead_jax.eval.scorers.latex_answers import read_answer
from lookahead_jax.eval.scorers.latex_terms import term
from lookahead_jax.eval.scorers.mathematics import final_answer, is_same, same_answer
from lookahead_jax.eval.scorers.term_values import equal, proportional
from lookahead_jax.eval.tasks.base import Source
from lookahead_jax.eval.tasks.registry import TASKS

RIGHT = {
    "17": ["17.0", "017", "$17$", "17.", r"\frac{34}{2}", "x = 17", r"17^\circ", r"17\%", "17%",
           r"\$17", r"17\text{ cm}^2", "17 inches", r"17\ \mathrm{m}", r"\boxed{17}"[7:-1],
           r"\mathbf{17}", r"\textbf{(17)}", "A=17", "20-3=17", r"\text{Area}=17", "+17",
           r"\textbf{(C)}\ 17", r"17\ \text{ miles}\text{ or so}", r"17\text{ or so}"],
    "12,345": ["12345", r"12,\!345", "12{,}345", r"12\,345", r"\$12,345.00", "12 345", r"12\;345"],
    r"\frac{3}{8}": ["3/8", r"\dfrac38", r"\tfrac{3}{8}", r"\frac 38", "0.375", ".375",
                     r"\frac{-3}{-8}", r"3\cdot8^{-1}", r"37.5\times10^{-2}"],
    r"2\frac{1}{3}": [r"\frac{7}{3}", "2 1/3", r"2\tfrac13", r"2+\frac13", "2 1/3 inches"],
    "5.615": ["5 123/200"],
    r"\frac{\sqrt{2}}{2}": [r"\frac{1}{\sqrt2}", r"\sqrt{\frac12}", r"\sin 45\cdot0+2^{-1/2}",
                            r"\sin\frac{\pi}{4}", "sqrt(2)/2", r"\sqrt[4]{\frac14}"],
    r"90^\circ": ["90", r"90^{\circ}", "90 degrees", "90°"],
    r"(x+2)(y-1)": ["xy-x+2y-2", "(y - 1)(x + 2)", r"\left(x+2\right)\left(y-1\right)"],
    r"\tan x": [r"\frac{\sin x}{\cos x}", r"\frac{1}{\cot{x}}", r"\tan(x)"],
    "3-4i": ["-4i+3", "3 - 4 i"],
    "31_5": ["31_{5}"],
    "y=3x-1": ["3x-1", "y = -1 + 3x", "3x - y - 1 = 0", "6x-2y=2", "f(x)=3x-1"[5:]],
    "2,-7": ["-7, 2", r"\{2,-7\}", r"2 \text{ or } -7", "x=2, x=-7", "2 and -7", r"-2.5\pm4.5"],
    r"3\pm\sqrt{5}": [r"3+\sqrt5,3-\sqrt5", r"\{3 - \sqrt{5}, 3 + \sqrt{5}\}", r"3\mp\sqrt5"],
    r"\left(1,\frac{\pi}{3}\right)": [r"(1, \frac\pi3)", r"(1,\pi/3)", r"\langle1,\pi/3\rangle"],
    "(2,5]": [r"2<x\le5", r"x\in(2,5]", r"\left( 2, 5 \right]", r"5 \ge t > 2"],
    r"(-\infty,0)\cup[4,\infty)": [r"[4,+\infty) \cup (-\infty, 0)"],
    r"[4,\infty)": [r"x\geq 4", r"4\leqslant x"],
    r"\begin{pmatrix} 1/2 \\ -3 \end{pmatrix}": [
        r"\begin{bmatrix}0.5\\[2pt]-3\end{bmatrix}", r"\begin{pmatrix}\frac12\\ -3\end{pmatrix}"],
    r"\text{Tuesday}": ["Tuesday", "tuesday.", r"\textbf{Tuesday}", r"\mathrm{Tuesday}"],
    r"\text{(B)}": ["B", "(B)", r"\text{B}", r"\textbf{(B)}\ 12", "(B) A and C",
                      "(B) 2f(A)"],
    r"\binom{6}{2}": ["15", r"\frac{6!}{4!\,2!}"],
    r"\log_2 x": [r"\frac{\ln x}{\ln 2}"],
    r"\lfloor\pi\rfloor+|{-2}|": ["5"],
    "2^{n+1}": [r"2\cdot2^n", "4^{(n+1)/2}"],
    r"\exp(2^{2^3}x)": ["e^{256x}", r"\exp^2(2^{-2^{-2}}2^{29/4}x)"],
    r"(1+\sqrt{5})^{10}": [r"(6+2\sqrt5)^5"],
}  # fmt: skip
WRONG = {
    "17": ["-17", "18", "16", "1.7", "17x", "17,5", "(17)(2)", "20-4=17", "2x=17", "", "17_8",
           "17i", "17.0001", "seventeen", r"\sqrt{17}", "17!", "__import__('os')", "17 m",
           "(17,0)", "1 7", r"1\quad 7", "x = 1 7", "0 17", r"\text{not }17",
           r"\text{less than } 17", r"\text{not }\text{quite }17", r"17, \text{or } 18", "1 .7"],
    "1234": ["1 23 4", "12 34", "1 2 3 4", "1 2345"],
    "23/3": ["2 1/3 inches"],
    r"\frac{1}{3}": ["0.333", "0.3333333333", "3", r"\frac{1}{-3}", r"1\frac13"],
    r"7\pi": ["21.99", "7", r"\pi^7"],
    "p-q": ["q-p", "p+q", "p"],
    "31_5": ["31", "31_6", "16"],
    "x=5": ["y=5", "2x=5", "x=-5"],
    "y=3x-1": ["y=3x+1", "3x=1", "y=0"],
    "2,-7": ["2", "2,7", "2,-7,0", "(2,-7)", "2,2"],
    "(2,5]": ["(2,5)", "[2,5]", "(5,2]", "2,5", r"2\le x\le5"],
    "(2,5)": [r"\begin{pmatrix}2\\5\end{pmatrix}", "(5,2)"],
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}": [r"\begin{pmatrix} 1 & 2 \end{pmatrix}"],
    r"\text{Tuesday}": ["Thursday", "Tues", "yadseuT"],
    r"\text{(B)}": ["(C)", "b", "12", r"\text{(B) or (C)}", "(B), (C)", "(B) or C", "(B)(C)"],
    "east": ["seat", "west"],
    r"\sqrt{x^2}": ["x"],
    "10^{600}": ["10^{600}+1"],
}  # fmt: skip


@pytest.mark.parametrize("answer", RIGHT)
def test_the_same_answer_in_other_words(answer):
    assert [g for g in [answer, f" ${answer}$ ", *RIGHT[answer]] if not is_same(g, answer)] == []


@pytest.mark.parametrize("answer", WRONG)
def test_another_answer(answer):
    assert [g for g in WRONG[answer] if is_same(g, answer)] == []


def test_any_other_digit_is_wrong():
    for answer in RIGHT:
        digits = [i for i, c in enumerate(answer) if c.isdigit()]
        other = [f"{answer[:i]}{(int(answer[i]) + 1) % 10}{answer[i + 1 :]}" for i in digits]
        assert [g for g in other if is_same(g, answer)] == []


def _drawn(rng: random.Random, depth: int) -> tuple[str, Fraction]:
    """A LaTeX term of numbers, and its value by rational arithmetic."""
    if depth == 0:
        number = rng.randint(0, 20)
        return (f"{number}.5", Fraction(2 * number + 1, 2)) if number > 15 else (
            str(number), Fraction(number))  # fmt: skip
    (a, x), (b, y) = _drawn(rng, depth - 1), _drawn(rng, depth - 1)
    kind = rng.randrange(6)
    if kind == 0 and y:
        return rf"\frac{{{a}}}{{{b}}}", x / y
    if kind == 1:
        return f"({a})^{{2}}", x * x
    if kind == 2:
        return f"({a})({b})", x * y
    if kind == 3:
        return rf"{{{a}}}\cdot-({b})", -x * y
    return (f"-({a})-({b})", -x - y) if kind == 4 else (f"{a}+({b})", x + y)


def test_terms_have_their_value():
    rng = random.Random(0)
    for _ in range(60):
        text, value = _drawn(rng, 3)
        found = term(text)
        assert Fraction(int(found.p), int(found.q)) == value, text
    assert [int(term(t)) for t in ("-2^2", "2^{3^2}", "12/3/2", "3!!/6!", "1-2-3")] == [
        -4, 512, 2, 1, -4]  # fmt: skip


def test_values_decide_where_forms_differ():
    assert equal(term(r"\sqrt{2}+\sqrt{3}"), term(r"\sqrt{5+2\sqrt6}"))
    assert not equal(term(r"\sqrt{2}+\sqrt{3}"), term(r"\sqrt{5+2\sqrt6}+10^{-90}"))
    assert equal(term(r"\sqrt{\sin^2 1+\cos^2 1-1}"), term("0"))
    for zero in (r"\sqrt2\sqrt3-\sqrt6", r"\sin^2x+\cos^2x-1"):
        assert equal(term(zero), term("0")), zero
        assert equal(term(zero), term(r"\sqrt{5}-\sqrt[4]{25}")), zero
        assert equal(term(f"({zero})+10^{{-120}}"), term("10^{-120}")), zero
    for small in ("e^{-300}", "10^{-120}+e^{-300}", r"\pi\cdot10^{-110}", r"x\pi^{-400}"):
        assert not equal(term(small), term("0")), small
        assert not equal(term(small), term(f"2({small})")), small
        assert equal(term(small), term(rf"\frac{{{small}}}{{\sqrt2}}2^{{1/2}}")), small
    assert equal(term(r"\arccos x"), term(r"\frac{\pi}{2}-\arcsin x")), "real from -1 to 1 only"
    assert not equal(term("x"), term("|x|"))
    assert not equal(term(r"\frac{x}{x-x^2}"), term(r"\frac{1}{1+x}"))
    assert not equal(term("n!"), term("n")), "too few points with a value are not enough"
    assert proportional(term("2x-4"), term("6-3x"))
    assert not proportional(term("2x-4"), term("6-2x"))


@pytest.mark.parametrize(
    "text",
    [
        "9^9^9^9", "e^{e^{e^{10}}}", r"\sqrt{2^{16000}}", "3!!!!", r"\binom{10^9}{3}", "9" * 401,
        "x^x^x^x^2", "(" * 300, "{" * 300, "|" * 300, r"\frac" * 70, "1,2," * 40, r"\frac{1}{0}",
        "__import__('os').system('true')", r"\log 0", "1 2", "x^", "²", ".", r"\0", r"\sin", "",
        r"\infty!(", r"1<x>2", r"\begin{pmatrix}1", "x ! = 3 = 4",
        r"\lfloor(\pi^{4000})^{4000}\rfloor", r"2^{\sin({{{e^{4000}}^{4000}}^{4000}}^{4000})}",
        r"\arcsin(\sin({{(\pi^{4000})^{4000}}^{4000}}))", "2" + "^-2" * 130, r"2^{2^{2^{2^x}}}",
        "e" + "^{-e" * 28 + "}" * 28, r"\exp(-" * 28 + "1" + ")" * 28, r"(10^{4000})^{4000\pi}",
    ],
)  # fmt: skip
def test_hostile_texts_are_refused_at_once(text):
    start = time.process_time()
    with pytest.raises(Unreadable):
        read_answer(text)
    assert not is_same(text, "5")
    assert not is_same(text, "x+5")
    assert time.process_time() - start < 2


def test_large_values_take_no_time():
    start = time.process_time()
    for text in (r"2^{x^{1000}}", r"\exp(\exp(\exp(x)))", "(n!)!", r"\sin(10^{3000})", "x^{3999}"):
        assert not is_same(text, "x+5")
    assert time.process_time() - start < 3


def test_a_failure_of_sympy_is_a_wrong_answer():
    failing = r"\sqrt[\lceil \exp(400)\rceil]{\lceil \frac{x}{n}\rceil}"
    with pytest.raises(ArithmeticError):
        read_answer(failing)
    for text in (failing, r"\arctan(\tan(10^{4000}))", r"\lfloor n/2\rfloor!"):
        assert not is_same(text, r"\frac{n!}{2}")
    assert is_same(r"\lfloor n\rfloor!+\sin^2n+\cos^2n", r"\lfloor n\rfloor!+1"), "poles left out"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}, or \boxed{\{1, 2\}} it is", r"\{1, 2\}"),
        (r"first \boxed{1}, then \boxed{2 and the text ends", "1"),
        (r"\boxed{6}, which is in \boxed{}.", "6"),
        (r"\boxed{\boxed{7}}", "7"), (r"\boxed 7", "7"), (r"\fbox{8}", "8"),
        (r"\boxed{\text{a \} b}}", r"\text{a \} b}"), ("} } \\boxed{3} {", "3"),
        ("The answer is 3.\nThe final answer is $x = \\frac{3}{4}$. Yes 5.", r"x = \frac{3}{4}"),
        ("**Answer:** no\nAnswer: 3.5 apples. Bye", "3.5 apples"),
        ("the answer is: **42.** I think", "42"), ("I get 3, then 1,234.", "1,234"),
        ("nothing", None), ("", None),
    ],
)  # fmt: skip
def test_the_final_answer_of_a_text(text, answer):
    assert final_answer(text) == answer


def test_long_texts_are_read_in_one_pass():
    start = time.process_time()
    for text in (
        "\\(" * 16_000,
        "\n" * 40_000,
        "$" + "\\$" * 16_000,
        " " * 40_000 + ":" + " " * 40_000,
    ):
        final_answer("the answer is " + text)
    assert final_answer("\\boxed{" * 20_000 + " 5 and 6") == "6"
    assert not is_same("1+" * 20_000, "5")
    assert time.process_time() - start < 2


def _source(data, count: int = 2) -> Source:
    return Source(tokenizer=None, length=512, count=count, seed=0, data=data)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "file", "rows", "limit"),
    [
        (
            "math500", "math500/math500.json",
            [{"problem": "What is $1/4+1/4$?", "solution": "...", "answer": r"\frac{1}{2}",
              "subject": "Algebra", "level": 1, "unique_id": f"test/algebra/{i}.json"}
             for i in range(3)],
            4096,
        ),
        (
            "aime24", "aime24/aime24.jsonl",
            [{"id": 60 + i, "problem": "What is $30+3$?", "solution": "...", "answer": "033",
              "url": "...", "question": "..."} for i in range(3)],
            16384,
        ),
    ],
)  # fmt: skip
def test_problems_come_from_the_published_files(name, file, rows, limit, tmp_path, monkeypatch):
    task, path = TASKS[f"reasoning/{name}"], tmp_path / file
    with pytest.raises(FileNotFoundError, match=f"{path.name}.* not found in"):
        task.make(_source(tmp_path))
    path.parent.mkdir()
    text = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
    path.write_text(text)
    made = task.make(_source(tmp_path))
    field = {"math500": "unique_id", "aime24": "id"}[name]
    assert [e.id for e in made] == [str(row[field]) for row in rows[:2]]
    assert made[0].context == (
        f"{rows[0]['problem']}\n"
        r"Please reason step by step, and put your final answer within \boxed{}."
    )
    assert (made[0].question, made[0].max_new_tokens, task.binary) == ("", limit, True)
    right = {"math500": r"It is $\boxed{0.5}$.", "aime24": r"\boxed{33}"}[name]
    assert task.score(right, made[0]) == 1  # type: ignore[misc]
    assert task.score(right.replace("3", "4").replace("5", "6"), made[0]) == 0  # type: ignore[misc]
    path.write_text(text.replace('"answer"', '"solved"'))
    with pytest.raises(ValueError, match="has no field 'answer'"):
        task.make(_source(tmp_path))
    monkeypatch.setitem(sys.modules, "sympy", None)
    for call in (lambda: task.make(_source(tmp_path)), lambda: same_answer("5", "5")):
        with pytest.raises(ModuleNotFoundError, match=r"needs sympy: pip install .*\[math\]"):
            call()
