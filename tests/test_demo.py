"""The demo: which model it takes, what it asks, and what its table says."""

from pathlib import Path

import pytest

import lookahead_jax as lk
from lookahead_jax.cli import demo_question
from lookahead_jax.cli.main import main
from lookahead_jax.cli.options import ModelOptions
from tests import tiny


def absent(name):
    raise FileNotFoundError(f"model {name} is not installed: pip install it")


def test_the_text_says_the_fact_once_in_its_middle():
    text = demo_question.DOCUMENT.read_text("utf-8")
    assert text.count(demo_question.FACT) == 1
    assert 0.4 < text.index(demo_question.FACT) / len(text) < 0.6
    assert text.count("pepper") == 1
    assert "password" in demo_question.QUESTION


def test_the_model_is_smollm2_where_it_is_installed(monkeypatch, capsys):
    named = ModelOptions(model=Path("elsewhere"))
    monkeypatch.setattr(demo_question, "packaged_file", absent)
    assert demo_question.choose_model(named) is named
    assert capsys.readouterr().err == ""
    assert demo_question.choose_model(ModelOptions()).model is None
    said = capsys.readouterr().err
    assert said == (
        "lookahead: notice: model smollm2 is not installed: pip install it. The demo runs on the "
        "small embedded model instead\n"
    )
    monkeypatch.setattr(demo_question, "packaged_file", lambda name: Path("file.gguf"))
    assert demo_question.choose_model(ModelOptions()).model == Path("smollm2")
    assert capsys.readouterr().err == ""


def test_the_embedded_model_is_asked_what_it_has_learnt():
    model = lk.load(lk.EMBEDDED_MODEL)
    asked = demo_question._about_rows(model)
    text = model.tokenizer.decode(asked.ids)
    assert len(asked.ids) == 1024
    assert asked.about.startswith(text.rpartition("\n")[2])
    words = asked.right.split()
    lines = text.splitlines()
    places = [lines.index(f" - {a} {b}") for a, b in zip(words[::2], words[1::2], strict=True)]
    assert len(places) == 6
    assert min(places) < len(lines) / 2 < max(places)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_a_row_for_every_policy(tmp_path, monkeypatch, capsys):
    tiny.save_chat_model(tmp_path, max_position_embeddings=1024)
    text = demo_question.DOCUMENT.read_text("utf-8")
    middle = text.index(demo_question.FACT)
    shorter = tmp_path / "demo.txt"  # tokens are bytes here
    shorter.write_text(text[middle - 300 : middle + 300])
    monkeypatch.setattr(demo_question, "DOCUMENT", shorter)
    args = ["--model", str(tmp_path), "--max-new-tokens", "4", "--budget", "20"]
    assert main(["demo", *args]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith(demo_question.QUESTION)
    assert lines[1] == "Right answer: pepper"
    content = demo_question.DOCUMENT.read_text().rstrip() + "\n\n" + demo_question.QUESTION
    tokens = lk.load(tmp_path).tokenizer.encode_chat([{"role": "user", "content": content}])
    table = [cells(line) for line in lines[3:7]]
    assert table[0] == ["", "entries kept", "cache", "first token", "tokens/s", "answer"]
    assert [row[:2] for row in table[2:]] == [
        ["full cache", f"{len(tokens):,} of {len(tokens):,}"],
        ["snapkv", f"20 of {len(tokens):,}"],
    ]
    sizes = [float(row[2].removesuffix(" MB")) for row in table[2:]]
    assert sizes[0] > 2 * sizes[1]  # 768 slots and 128, in megabytes of one digit
    assert lines[8].startswith("lookaheadkv is not shown: it needs lookahead modules")
    assert str(tmp_path) in lines[8]
    assert err.count("compiling and running once") == 2


@pytest.mark.slow
def test_the_demo_runs_on_the_embedded_model(monkeypatch, capsys):
    monkeypatch.setattr(demo_question, "packaged_file", absent)
    assert main(["demo"]) == 0
    out = capsys.readouterr().out.splitlines()
    right = out[1].removeprefix("Right answer: ")
    answers = {row[0]: row[-1] for row in map(cells, out[5:8])}
    assert answers["full cache"] == answers["lookaheadkv"] == right != answers["snapkv"]


def test_too_many_tokens_for_the_positions(tmp_path, capsys):
    tiny.save_chat_model(tmp_path, max_position_embeddings=7300)
    assert main(["demo", "--model", str(tmp_path), "--max-new-tokens", "2000"]) == 1
    assert "of the model's 7,300 positions, so at most" in capsys.readouterr().err
