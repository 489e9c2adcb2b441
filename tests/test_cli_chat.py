"""Chats on the command line: the template, the document, and what is pinned of them."""

import json
import re

import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.checkpoints.token_ranges import token_ranges
from lookahead_jax.cli.encoded import chat_messages, encode_chat_prompt, pinned_spans
from lookahead_jax.cli.main import main
from lookahead_jax.cli.options import PromptOptions
from tests import tiny

QUESTION = "which colour?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tiny.save_chat_model(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return lk.load(folder)


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text("Café: the door is red, <|end|> they say.\n\n")
    return path


def test_the_document_stands_before_the_question(model, document):
    (prompt,) = PromptOptions(
        prompt=QUESTION, chat=True, system="Be brief.", document=document
    ).read(model)
    start, end = "<|start|>", "<|end|>"
    text = "Café: the door is red, <|end|> they say.\n\nwhich colour?"
    assert prompt.text == (
        f"{start}system\nBe brief.{end}\n{start}user\n{text}{end}\n{start}assistant\n"
    )
    messages = chat_messages(QUESTION, document.read_text(), "Be brief.")
    assert prompt.ids == model.tokenizer.encode_chat(messages)
    # The document's <|end|> is ordinary text: only the template's two act.
    assert prompt.ids.count(model.tokenizer.token_id(end)) == 2
    assert prompt.text[: prompt.offsets[prompt.before_user][0]].endswith(f"{start}user\n")
    assert [m["role"] for m in chat_messages("a", None, None)] == ["user"]


def test_every_token_knows_its_characters(model, document):
    messages = chat_messages(QUESTION, document.read_text(), None)
    prompt = encode_chat_prompt(model, messages)
    assert len(prompt.offsets) == len(prompt.ids)
    decode = model.tokenizer.decode
    for ids, (start, end) in zip(prompt.ids, prompt.offsets, strict=True):
        piece = decode([ids], skip_special=False)
        assert prompt.text[start:end] == ("é" if piece == "\ufffd" else piece)
    (span,) = token_ranges(prompt.text, prompt.offsets, "Café")
    assert decode(prompt.ids[slice(*span)]) == "Café"
    assert span[1] - span[0] == 5  # the accented letter is two bytes
    with pytest.raises(ValueError, match="a part of a prompt must not be empty"):
        token_ranges(prompt.text, prompt.offsets, "")


def test_generate_answers_a_chat_and_keeps_what_is_pinned(folder, model, document, capsys):
    args = ["generate", "--model", str(folder), "--chat", "--prompt", QUESTION, "--budget", "56"]
    args += ["--document", str(document), "--system", "Be brief.", "--max-new-tokens", "4"]
    pins = ["--pin-system", "--pin", "door is", "--policy-arg", "window=4"]
    assert main([*args, *pins, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    messages = chat_messages(QUESTION, document.read_text(), "Be brief.")
    prompt = encode_chat_prompt(model, messages)
    spans = pinned_spans(prompt, ["door is"], system=True)
    assert spans[0] == (0, prompt.before_user)
    assert model.tokenizer.decode(prompt.ids[slice(*spans[1])]) == "door is"
    policy = lk.make_policy("snapkv", window=4)
    want = lk.generate(model, [prompt.ids], pin=[spans], policy=policy, budget=56, max_new_tokens=4)
    assert found["tokens"] == want.tokens
    assert set(np.concatenate([np.arange(*span) for span in spans])) <= set(want.kept[0, 0, 0])


def test_inspect_shows_a_chat(folder, document, tmp_path):
    out = tmp_path / "page.html"
    args = ["inspect", "--model", str(folder), "--chat", "--prompt", QUESTION, "--out", str(out)]
    args += ["--document", str(document), "--max-new-tokens", "1", "--mark", "door is red"]
    assert main(args) == 0
    data = json.loads(re.search(r'id="data">(.*?)</script>', out.read_text(), re.S)[1])
    text = "".join(segment[0] for segment in data["segments"])
    assert text.startswith("<|start|>user\nCafé: the door is red, <|end|> they say.")
    assert data["marks"] == [[text.index("door is red") + 1 - 8, text.index(", <|end") + 1 - 8]]


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--prompt", "a", "--document", "x"], 2, "--system and --document are parts of a chat"),
        (["--prompt", "a", "--system", "x"], 2, "add --chat"),
        (["--tokens", "a.npy", "--chat"], 2, "--chat takes a text"),
        (["--prompt", "a", "--pin-system"], 2, "--pin-system pins the system message of a chat"),
        (["--prompt", "abc", "--pin", "d"], 1, "--pin: the prompt does not contain 'd'"),
        (["--prompt", "a", "--pin", ""], 2, "--pin takes a text that is not empty"),
        (["--prompt", "a" * 300, "--pin", "a"], 1, "row 0 pins 300 tokens and the budget is 256"),
        (["--prompt", "a", "--chat", "--document", "absent.txt"], 1, "absent.txt"),
    ],
)
def test_misuse_is_one_line(args, status, message, folder, capsys):
    assert main(["generate", "--model", str(folder), *args]) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_model_without_a_template_says_so(tmp_path, capsys):
    tiny.save_bytes_model(tmp_path)
    args = ["generate", "--model", str(tmp_path), "--chat", "--prompt", "a"]
    assert main(args) == 1
    assert f"{tmp_path} has no chat template: take a model for chats" in capsys.readouterr().err
