"""The command lines of benchmarks/: one mechanism, and a help text for every option."""

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import common
import pytest
from common import Help

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    work: Annotated[Path, Help("folder")]
    tokens: Annotated[tuple[int, ...], Help("lengths")] = (8, 16)
    card: Annotated[str, Help("card", ("h100", "h200"))] = "h200"
    chunk: Annotated[int | None, Help("rows at 50 %")] = None
    section: Annotated[tuple[str, ...], Help("section", repeated=True)] = ()
    again: Annotated[bool, Help("repeat")] = False
    until: Annotated[float, Help(None)] = 1.5


def parsed(*args):
    return common.parse(Options, "What it does.", ["--work", "w", *args])


def test_options_are_the_fields_of_a_dataclass():
    assert parsed() == Options(work=Path("w"))
    assert parsed(
        "--tokens", "4", "5", "--card", "h100", "--chunk", "3", "--again",
        "--section", "a", "--section", "b", "--until", "2",
    ) == Options(
        work=Path("w"), tokens=(4, 5), card="h100", chunk=3, again=True, section=("a", "b"),
        until=2.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "args", [["--card", "v5e"], ["--chunk", "x"], ["--nothing"], ["--tokens"]], ids=str
)
def test_anything_else_is_refused(args, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(*args)
    assert stopped.value.code == 2
    assert args[0] in capsys.readouterr().err


def test_help_shows_defaults_and_hides_what_is_internal(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    assert "lengths (default: 8 16)" in text
    assert "rows at 50 %" in text
    assert "--until" not in text


def test_a_report_names_the_options_that_matter(tmp_path):
    options = parsed("--tokens", "4")
    report = common.settings(options, "work", "until")
    assert list(report) == ["tokens", "card", "chunk", "section", "again"]
    common.save(tmp_path / "new" / "report.json", report)
    assert json.loads((tmp_path / "new" / "report.json").read_text())["tokens"] == [4]


def test_one_module_has_the_import_path_and_the_options():
    for path in BENCHMARKS.glob("*.py"):
        text = path.read_text("utf-8")
        own = path.name == "common.py"
        assert ("sys.path" in text or "argparse" in text) == own, path.name
        assert ("def main()" in text) == ("parse(Options, __doc__)" in text), path.name


@pytest.mark.slow
@pytest.mark.parametrize("program", ["gpu.py", "trie.py", "against_transformers.py"])
def test_a_program_runs_without_an_installation(program, tmp_path):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / program), "--help"],
        cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "options:" in done.stdout


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_functions_are_called_with_the_arguments_they_take(path):
    """Calls within a file; most programs take too long, or need a device, to be run here."""
    tree = ast.parse(path.read_text("utf-8"))
    functions = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if not isinstance(call.func, ast.Name) or call.func.id not in functions:
            continue
        takes, place = functions[call.func.id], f"{path.name}:{call.lineno}"
        if takes.vararg is None:
            assert len(call.args) <= len(takes.args), f"{place}: too many positional arguments"
        names = {argument.arg for argument in (*takes.args, *takes.kwonlyargs)}
        given = {keyword.arg for keyword in call.keywords} - {None}
        assert takes.kwarg is not None or given <= names, f"{place}: {given - names} are unknown"
