"""Our scorers against the published ones (tests/fixtures/make_scorers.py ran those)."""

import functools
import json
import shutil
import time
from pathlib import Path

import pytest

from lookahead_jax.eval.scorers import infinitebench, longproc, rouge, sandbox, text

GOLDEN = Path(__file__).parent / "fixtures" / "scorers.json"


def golden():
    content = json.loads(GOLDEN.read_text("utf-8"))
    del content["prompts"]  # of test_benchmarks.py
    cases = {}
    for benchmark, found in content.items():
        for case in found:
            cases.setdefault((benchmark, case["scorer"]), []).append(case)
    return cases


CASES = golden()


def ours(benchmark, name, case):
    prediction = case["prediction"]
    if benchmark == "longproc":
        found = getattr(longproc, name)(prediction, case["reference"], case["metadata"] or {})
        assert found == pytest.approx(case["measures"], abs=1e-12), case
        return next(iter(found.values()))
    answers = case["answers"]
    if name in ("choice", "buggy_function"):
        return getattr(infinitebench, name)(prediction, answers, case["options"])
    if name == "classification":
        score = functools.partial(text.classification, classes=case["all_classes"])
        return text.best(score, prediction, answers)
    if name in ("rouge_l", "rouge_lsum"):
        return text.best(getattr(rouge, name), prediction, answers)
    if benchmark == "longbench":
        return text.best(getattr(text, name), prediction, answers)
    module = text if benchmark == "ruler" else infinitebench
    return getattr(module, name)(prediction, answers)


@pytest.mark.parametrize(("benchmark", "name"), list(CASES))
def test_scores_are_the_published_ones(benchmark, name):
    cases = CASES[benchmark, name]
    for case in cases:
        assert ours(benchmark, name, case) == pytest.approx(case["score"], abs=1e-12), case
    assert len({case["score"] for case in cases}) > 1, "the cases tell nothing apart"


def test_a_route_that_ends_early_counts_the_lines_it_has():
    route = "a\nb\nc\nd"
    found = longproc.path_traversal("<Route>a\nb</Route>", route, {})
    assert found == {"accuracy": 0.0, "partial_accuracy": 0.5, "extraction_rate": 1.0}
    wrong = longproc.path_traversal("<Route>a\nx</Route>", route, {})
    assert wrong["partial_accuracy"] == 0.5, "the first wrong line counts, as published"


def test_the_remaining_scorers():
    assert text.letter("**The correct answer is (B)**", "B") == 1
    assert text.letter("The correct answer is C.", "B") == 0
    assert text.letter("B", "B") == 0
    assert infinitebench.longest_run("values: 3, 7, 9", ["3", "7", "8", "1"]) == 0.5
    assert text.code_similarity("# no\n\nx = 1\ny = 2", "x = 1") == 1


PROGRAM = "```c++\nint main() {{ int a; cin >> a; {} cout << a * 2 << endl; }}\n```"
CASES_IO = {"testcases": [[["4"], ["8"]], [["-1"], ["-2"]]]}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_programs_run_under_limits(tmp_path):
    def score(answer):
        return longproc.pseudo_to_code(answer, "", CASES_IO)["accuracy"]

    assert score(PROGRAM.format("")) == 1
    assert score(PROGRAM.format("a++;")) == 0
    assert score(PROGRAM.format("for (;;);")) == 0  # the time limit
    assert score("no program") == 0
    assert score(PROGRAM.format("vector<char> big(1u << 30, 1);")) == 0  # the memory limit


def test_commands_run_under_limits(tmp_path, monkeypatch):
    def run(script, **limits):
        return sandbox.run_limited(["/bin/sh", "-c", script], "in", folder=tmp_path, **limits)

    monkeypatch.setenv("SECRET", "x")
    assert "SECRET" not in run("env")
    assert run("cat") == "in"
    assert run("exit 3") is None
    assert run("head -c 1000000000 /dev/zero > big") is None
    assert (tmp_path / "big").stat().st_size <= 2**26
    assert run("head -c 1000000000 /dev/zero") is None, "nor does it fill our memory"
    begin = time.perf_counter()
    assert run("sleep 60 & echo $! > left", seconds=20) == ""
    assert run("sleep 60", seconds=1) is None
    assert time.perf_counter() - begin < 15
    left = Path("/proc") / (tmp_path / "left").read_text().strip() / "stat"
    assert not left.exists() or left.read_text().split()[2] == "Z", "what was left is killed, too"
