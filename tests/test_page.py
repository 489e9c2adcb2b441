"""The chat page: alone, and in a browser in front of a server."""

import contextlib
import re

import pytest

from lookahead_jax.engine.engine import Engine
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.server.page import _PAGE
from tests.browser import CHROMIUM, browsing
from tests.serving import NAME, Gate, chat_model, running, until

NEW, PROMPT, BUDGET = 24, 64, 12
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
KEY = "sesame"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("model"), TEMPLATE)


@pytest.fixture(scope="module")
def engine(model):
    return Engine(
        model, policy=SnapKV(window=4, pool="avg", kernel=3), budget=BUDGET, rows=2,
        max_new_tokens=NEW, max_prompt_tokens=PROMPT, burst=4,
    )  # fmt: skip


def get(server, path):
    with contextlib.closing(server.connect()) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()


def test_the_page_needs_no_key_and_no_other_server(model, engine):
    with running(model, engine, keys=[KEY]) as server:
        status, headers, text = get(server, "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert text == _PAGE
    assert "://" not in text
    assert not re.search(r"(src|href)=(?!\"data:)|@import|url\(| style=| on\w+=", text)
    rules = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    for name in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", rules[name])


def test_the_page_can_be_switched_off(model, engine):
    with running(model, engine, keys=[KEY], with_page=False) as server:
        assert get(server, "/")[0] == 404


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with browsing(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


def visible(tab, id):
    return tab.run(f"at('{id}').checkVisibility()")


def turns(tab):
    """Text and numbers of every turn."""
    return tab.run("[...document.querySelectorAll('article')].map(turn => "
                   "[turn.children[1].textContent, turn.children[2].textContent])")  # fmt: skip


def say(tab, text, count):
    """Types a message and sends it; returns when there are `count` turns and the last has ended."""
    tab.run("at('text').focus()")
    tab.type(text)
    tab.press("Enter")
    tab.until(f"document.querySelectorAll('article').length === {count} && running === null")
    assert not visible(tab, "error"), tab.run("at('error').textContent")


def answer_to(server, *said):
    """What the server answers to a conversation."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    body = {"model": NAME, "messages": messages, "max_tokens": NEW}
    answer = server.send("POST", "/v1/chat/completions", body, Authorization=f"Bearer {KEY}")[1]
    return answer["choices"][0]["message"]["content"], answer["usage"]


def test_a_conversation_in_a_browser(model, engine, tab):
    with running(model, engine, keys=[KEY]) as server:
        tab.open(f"http://127.0.0.1:{server.port}/")
        tab.until("at('unlock').checkVisibility()")
        assert tab.run("at('error').textContent") == "This server needs an API key"
        tab.type("wrong")  # the field has the focus
        tab.press("Enter")
        tab.until("at('error').textContent === 'This key is wrong'")
        for unsendable in (
            "schl\u00fcssel",
            "\u043a\u043b\u044e\u0447",
            "sesame\u2026",
            "two words",
        ):
            tab.run("at('key').select()")
            tab.type(unsendable)
            tab.press("Enter")
            tab.until("at('error').textContent.startsWith('A key has only ASCII characters')")
            assert visible(tab, "unlock")
            tab.run("at('error').textContent = ''")
        tab.run("at('key').select()")
        tab.type(KEY)
        tab.press("Enter")
        tab.until(f"at('model').textContent === '{NAME}'")
        assert not visible(tab, "error")
        assert not visible(tab, "unlock")
        say(tab, "<b>abc</b>", 2)
        first, usage = answer_to(server, "<b>abc</b>")
        (question, _), (answer, numbers) = turns(tab)
        assert (question, answer) == ("<b>abc</b>", first)
        assert numbers.startswith(f"kept {BUDGET} of {len('u:<b>abc</b>;a:')} prompt tokens (")
        assert f"{NEW} new tokens · 1.00 tokens per step" in numbers
        assert usage["lookahead"] == {"kept_entries": BUDGET, "steps": NEW - 1}
        tab.run("at('new').click()")
        assert turns(tab) == []
        say(tab, "ab", 2)
        first, _ = answer_to(server, "ab")
        say(tab, "cd", 4)
        second, usage = answer_to(server, "ab", first, "cd")
        assert [text for text, _ in turns(tab)] == ["ab", first, "cd", second]
        assert f"of {usage['prompt_tokens']} prompt tokens" in turns(tab)[3][1]
        addresses = [
            event["params"]["request"]["url"]
            for event in tab.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        own = (f"http://127.0.0.1:{server.port}/", "about:blank", "data:,")
        assert all(address.startswith(own) for address in addresses)
        entries = [event["params"] for event in tab.events if event["method"] == "Log.entryAdded"]
        assert [entry["entry"]["text"] for entry in entries if "401" not in str(entry)] == []


def test_stop_and_errors_in_a_browser(model, engine, tab, monkeypatch):
    with running(model, engine) as server:
        tab.open(f"http://127.0.0.1:{server.port}/")
        tab.until("model !== null")
        with Gate.before(engine, monkeypatch) as gate:
            tab.type("abc")
            tab.press("Enter")
            gate.allow_until_a_row_runs()
            tab.until("document.querySelectorAll('article')[1].children[1].textContent !== ''")
            assert visible(tab, "stop")
            assert not visible(tab, "send")
            tab.press("Escape")
            tab.until("running === null")
            until(lambda: engine._queue._cancelled)
            gate.allow(1)
            until(lambda: engine.alive == 0)
        (_, _), (text, numbers) = turns(tab)
        assert 0 < len(text) < NEW
        assert numbers == "stopped"
        tab.run("at('new').click()")
        tab.type("a" * PROMPT)
        tab.press("Enter")
        tab.until("at('error').checkVisibility()")
        assert "begin a new conversation, or shorten" in tab.run("at('error').textContent")
        assert turns(tab) == []
        assert tab.run("at('text').value") == "a" * PROMPT  # nothing typed is lost
    tab.press("Enter")
    tab.until("at('error').textContent.includes('cannot be reached')")
    assert turns(tab) == []
