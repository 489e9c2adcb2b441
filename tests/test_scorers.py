"""Our scorers against the published ones (tests/fixtures/make_scorers.py ran those)."""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from lookahead_jax.eval.scorers import infinitebench, limited_run, longproc, rouge, text
from lookahead_jax.eval.scorers.program_tests import share_of_tests

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


def test_numbers_of_any_length_are_scored():
    nines = "9" * 5000  # int() refuses more than 4300 digits
    assert infinitebench.longest_run(f"007, 0, {nines}", ["7", "0", "9"]) == 2 / 3
    assert infinitebench.last_integer(nines, ["9"]) == 0
    assert infinitebench.first_number(nines, ["9"]) == 0
    game = {"nums": [1, 2, 3, 4], "target": 10}
    for steps in (
        f"{nines} + 1 = 2\n2 + 2 = 4\n4 + 4 = 8",
        f"{'9' * 400} / 1 = 2\n" + "1 + 1 = 2\n" * 2,
    ):
        answer = f"<Solution>{steps.strip()}</Solution>"
        assert longproc.countdown(answer, "", game)["accuracy"] == 0
    right = "<Solution>01 + 2 = 3\n3 + 3 = 6\n6 + 4 = 10</Solution>"
    assert longproc.countdown(right, "", game)["accuracy"] == 1
    trip = {"ground_truth_cities": "Rome**Oslo", "ground_truth_durations": "3**4"}
    plan = "European cities for 6 days\nDay 1-3: Rome\nDay 3: fly from Rome to Oslo\nDay 3-6: Oslo"
    score = functools.partial(longproc.travel_planning, reference="x", metadata=trip)
    assert score(f"<Plan>{plan}</Plan>")["accuracy"] == 1
    for ours, theirs in (
        ("for 6", f"for {nines}"),
        ("-6", f"-{nines}"),
        ("Day 3: ", f"Day {nines}: "),
    ):
        score(f"<Plan>{plan.replace(ours, theirs)}</Plan>")
    assert score(f"<Plan>{plan.replace('-6', '-' + nines)}</Plan>")["accuracy"] == 0


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
        return limited_run.run_limited(["/bin/sh", "-c", script], "in", folder=tmp_path, **limits)

    monkeypatch.setenv("SECRET", "x")
    assert "SECRET" not in run("env")
    assert run("cat") == "in"
    assert run("exit 3") is None
    assert run("head -c 1000000000 /dev/zero > big") is None
    assert (tmp_path / "big").stat().st_size <= 2**26
    assert run("head -c 1000000000 /dev/zero") is None, "nor does it fill our memory"
    begin = time.perf_counter()
    assert run(f"sleep {MARK} &", seconds=20) == ""
    assert run("sleep 60", seconds=1) is None
    assert time.perf_counter() - begin < 15
    assert not marked_processes(), "what was left is killed, too"


def test_the_share_of_tests_that_a_program_passes():
    add = "def add(a, b):\n    return a + b\n"
    reward = share_of_tests(["assert add(2, 3) == 5", "assert add(2, 2) == 5", "add()"])
    assert reward(add[:8], add[8:]) == 1 / 3
    assert reward(add, "raise SystemExit") == 0, "a program that ends early passes nothing"
    assert reward("", "no program") == 0
    double = "print(2 * int(input()))"
    reward = share_of_tests([("3\n", "6"), ("4", "9\n")], program=lambda prompt, text: text)
    assert reward("Double a number.", double) == 0.5
    loop = share_of_tests([("1", "2")], seconds=1)
    assert loop("while True:\n", "    pass") == 0
    with pytest.raises(ValueError, match="give at least one test"):
        share_of_tests([])


MARK = "314159265"  # seconds of sleep, by which a test finds its processes


def marked_processes():
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if MARK.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def isolated():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(limited_run.isolation())


@pytest.fixture(params=["namespaces", "none"])
def shell(request, tmp_path, monkeypatch):
    """Runs a script under limits, with and without namespaces."""
    if request.param == "none":
        monkeypatch.setattr(limited_run, "isolation", lambda: ())
    elif not isolated():
        pytest.skip("this system allows no namespaces")

    def run(script, **limits):
        return limited_run.run_limited(["/bin/sh", "-c", script], "", folder=tmp_path, **limits)

    return run


def test_no_process_survives_its_command(shell):
    """Not even one in a session of its own, of a command that ends or of one that is stopped."""
    assert shell(f"setsid sleep {MARK} & sleep 0.1; echo x", seconds=5) == "x\n"
    assert not marked_processes()
    assert shell(f"setsid sleep {MARK} & setsid sh -c 'sleep {MARK}' & wait", seconds=1) is None
    assert not marked_processes()


@pytest.mark.skipif(not isolated(), reason="this system allows no namespaces")
def test_a_program_sees_neither_this_process_nor_a_network(tmp_path):
    def run(script):
        return limited_run.run_limited(["/bin/sh", "-c", script], "", folder=tmp_path, seconds=5)

    outside = subprocess.Popen(["sleep", "60"], env={"SECRET": "hidden"})
    try:
        script = "cat /proc/[0-9]*/environ; umount /proc; cat /proc/[0-9]*/environ; echo end"
        seen = run(f"({script}) 2>/dev/null")
        assert seen.endswith("end\n")
        assert "SECRET" not in seen
        assert run(f"kill -9 {outside.pid} {os.getpid()} -1 2>/dev/null; true") is not None
        assert run(f"kill -9 {outside.pid} && echo killed") is None
        assert outside.poll() is None
        assert int(run("ls -d /proc/[0-9]* | wc -l")) < 6, "only its own processes"
        assert run("tail -n +3 /proc/net/dev | cut -d: -f1").split() == ["lo"]
        assert run("grep CapEff /proc/self/status").split()[1] == "0" * 16
    finally:
        outside.kill()
        outside.wait()


def test_a_system_without_namespaces_is_warned_about(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    limited_run.isolation.cache_clear()
    try:
        with pytest.warns(UserWarning, match="programs that the model writes can use the network"):
            assert limited_run.isolation() == ()
    finally:
        limited_run.isolation.cache_clear()


BUSY = """
import sys, threading, time
from pathlib import Path
from lookahead_jax.eval.scorers.limited_run import run_limited

for _ in range(80):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
for script in ("(echo forked)", "for i in $(seq 200); do sleep 5 & done; echo all"):
    print(run_limited(["/bin/sh", "-c", script], "", folder=Path(sys.argv[1])))
"""


def test_a_user_of_many_threads_may_fork_but_not_without_end(tmp_path):
    command = [sys.executable, "-B", "-c", BUSY, str(tmp_path)]
    if os.getuid() == 0:  # for whom there is no such limit
        if shutil.which("setpriv") is None:
            pytest.skip("root needs setpriv to be somebody else")
        reads = ("--inh-caps=+dac_override", "--ambient-caps=+dac_override")
        command = ["setpriv", "--reuid=12345", "--clear-groups", *reads, *command]
    root = Path(__file__).parents[1]
    said = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["forked", "None"]
