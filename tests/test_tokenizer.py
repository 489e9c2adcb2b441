"""Text, streams and chat templates; chat.json holds what transformers renders."""

import concurrent.futures
import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lookahead_jax.checkpoints import chat_template
from lookahead_jax.checkpoints.template_worker import TemplateWorker
from lookahead_jax.checkpoints.tokenizer import Tokenizer, _package_errors

FIXTURES = Path(__file__).parent / "fixtures"
LLAMA3 = FIXTURES / "models" / "llama3"
CHATS = json.loads((FIXTURES / "chat.json").read_text())
BYTE_LEVEL = Tokenizer.load(LLAMA3)


def sentencepiece_like():
    """Llama 2's arrangement: spaces as U+2581, unknown characters as byte tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["\u2581", *"abcd", "\u2581a", "\u2581b", "ab"]
    merges = [("\u2581", "a"), ("\u2581", "b"), ("a", "b")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, {}, {})


TOKENIZERS = {"byte_level": BYTE_LEVEL, "sentencepiece": sentencepiece_like()}


def test_encode_adds_special_tokens_on_request():
    text = "def main():\n    return 1"
    with_bos = BYTE_LEVEL.encode(text)
    assert with_bos[0] == BYTE_LEVEL.token_id("<|begin|>") == 1
    assert BYTE_LEVEL.encode(text, special=False) == with_bos[1:]
    assert BYTE_LEVEL.decode(with_bos) == text
    assert BYTE_LEVEL.decode(with_bos, skip_special=False) == "<|begin|>" + text
    assert BYTE_LEVEL.special_ids == {0, 1, 2}
    assert BYTE_LEVEL.vocab_size == 320
    assert BYTE_LEVEL.special_tokens["eos_token"] == "<|end|>"
    assert BYTE_LEVEL.token_id("no such token") is None


def test_offsets_point_into_the_text():
    text = "def f(x): return '\U0001f600'"
    ids, offsets = BYTE_LEVEL.encode_with_offsets(text)
    assert len(ids) == len(offsets)
    assert offsets[0] == (0, 0)
    for token, (start, end) in list(zip(ids, offsets, strict=True))[1:]:
        piece = BYTE_LEVEL.decode([token])
        assert piece == text[start:end] or "\ufffd" in piece
    smile = text.index("\U0001f600")
    assert sum(span == (smile, smile + 1) for span in offsets) == 4


def test_text_that_cannot_be_encoded():
    with pytest.raises(ValueError, match="cannot be tokenized"):
        BYTE_LEVEL.encode("\ud800")


def test_panics_of_the_tokenizers_package_are_errors():
    """A panic of its Rust code is a BaseException, which would pass through every handler.

    The regular expression takes exponential time, until the package's own limit panics.
    """
    backend = tokenizers.Tokenizer.from_file(str(LLAMA3 / "tokenizer.json"))
    slow = tokenizers.Regex("(a|aa)+$")
    backend.pre_tokenizer = pre_tokenizers.Split(slow, "isolated")
    tokenizer = Tokenizer(backend, {}, {})
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets):
        with pytest.raises(ValueError, match=r"cannot be tokenized .*retry-limit"):
            encode("a" * 200 + "!")
    with pytest.raises(KeyboardInterrupt), _package_errors("the text cannot be tokenized"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_streamed_text_adds_up(name, data):
    """Of texts, and of arbitrary tokens: broken characters, special tokens, everything.

    Except arbitrary byte tokens of sentencepiece, where an invalid byte undoes those before it.
    """
    tokenizer = TOKENIZERS[name]
    first = 0 if name == "byte_level" else 259
    if data.draw(st.booleans()):
        ids = tokenizer.encode(data.draw(st.text("ab d\u00e9\u4f60\U0001f600\n")))
    else:
        token = st.integers(first, tokenizer.vocab_size - 1) | st.sampled_from([1, 2])
        ids = data.draw(st.lists(token, max_size=12))
    skip = data.draw(st.booleans())
    stream = tokenizer.stream(skip_special=skip)
    pieces = [stream.push(token) for token in ids]
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special=skip)


def test_stream_gives_characters_as_soon_as_they_are_whole():
    ids = BYTE_LEVEL.encode("a\u00e9b", special=False)
    stream = BYTE_LEVEL.stream()
    assert [stream.push(token) for token in ids] == ["a", "", "\u00e9", "b"]
    assert stream.finish() == ""


def test_stream_keeps_spaces_of_sentencepiece_words():
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer.encode("a b </s> ab")
    stream = tokenizer.stream()
    assert "".join(stream.push(token) for token in ids) == tokenizer.decode(ids)


def metaspace():
    """Mistral's newer arrangement: the decoder of Metaspace, bytes of unknown characters."""
    backend = tokenizers.Tokenizer.from_str(TOKENIZERS["sentencepiece"].backend.to_str())
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    return Tokenizer(backend, {}, {})


CONTINUED = {**TOKENIZERS, "metaspace": metaspace()}
CONTINUATIONS = ["    return a", "b", " b", "  ", "\u00e9", "\n\u4f60 </s> a", ""]


@pytest.mark.parametrize("name", CONTINUED)
@pytest.mark.parametrize("prompt", ["def f(a):\n", "a b", "ab </s>", "\u4f60", "a <s> </s><s>", ""])
def test_a_continuation_keeps_what_it_begins_with(name, prompt):
    """A text cut anywhere: prompt and continuation add up, spaces at the seam included."""
    tokenizer = CONTINUED[name]
    for continuation in CONTINUATIONS:
        whole = tokenizer.encode(prompt + continuation)
        for cut in range(len(whole) + 1):
            end = cut  # a character that the prompt leaves incomplete comes with the rest
            while (text := tokenizer.decode(whole[:end])).endswith("\ufffd"):
                end -= 1
            rest = tokenizer.decode_continuation(whole[:cut], whole[cut:])
            assert text + rest == tokenizer.decode(whole)


@pytest.mark.parametrize("name", CONTINUED)
@pytest.mark.parametrize("text", ["world", " world", "    x", "\nx", "\n\n", "\u00e9", ""])
def test_a_text_behind_another_is_joined_as_it_is(name, text):
    """Llama 2 puts a space in front of each text: "Hello" and "world" would be two words."""
    tokenizer = CONTINUED[name]
    ids = tokenizer.encode("Hello", special=False) + tokenizer.encode_behind(text)
    assert tokenizer.decode(ids) == "Hello" + text
    if name == "byte_level":  # puts nothing in front
        assert tokenizer.encode_behind(text) == tokenizer.encode(text, special=False)


def test_a_continuation_behind_a_long_prompt_without_text():
    """Special tokens and stray bytes at the prompt's end: its last words are further ahead."""
    tokenizer = TOKENIZERS["sentencepiece"]
    word, space, end = (tokenizer.token_id(t) for t in ("\u2581a", "\u2581", "</s>"))
    assert tokenizer.decode_continuation([word, *[end] * 99], [word]) == " a"
    assert tokenizer.decode_continuation([end] * 99, [word]) == "a"
    assert tokenizer.decode_continuation([word], [space, space, space, word]) == "    a"
    three = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "\u4f60".encode()]
    for cut in (0, 1, 2):  # bytes of a character that the prompt left incomplete
        prompt = [word, *three * 9, *three[:cut]]
        assert tokenizer.decode_continuation(prompt, [*three[cut:], word]) == "\u4f60 a"


@pytest.mark.parametrize("case", CHATS, ids=lambda case: case["text"][:20])
def test_chat_templates_render_as_transformers_does(case):
    tokenizer = Tokenizer(
        BYTE_LEVEL.backend, BYTE_LEVEL.special_tokens, {"default": case["template"]}
    )
    rendered = tokenizer.render_chat(
        case["messages"], tools=case["tools"], add_generation_prompt=case["add_generation_prompt"]
    )
    assert rendered == case["text"]


def directory(tmp_path, **settings):
    shutil.copy(LLAMA3 / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


USER = [{"role": "user", "content": "hi"}]


def test_template_sources(tmp_path):
    assert Tokenizer.load(directory(tmp_path)).chat_templates == {}
    assert Tokenizer.load(directory(tmp_path, chat_template="one")).render_chat(USER) == "one"
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    tokenizer = Tokenizer.load(directory(tmp_path, chat_template=named))
    assert tokenizer.render_chat(USER) == "d"
    mapping = {entry["name"]: entry["template"] for entry in named}
    by_name = Tokenizer.load(directory(tmp_path, chat_template=mapping))
    assert by_name.chat_templates == tokenizer.chat_templates
    assert tokenizer.render_chat(USER, tools=[{}]) == "t"
    assert tokenizer.render_chat(USER, tools=[{}], template="default") == "d"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ mood }}")
    assert Tokenizer.load(tmp_path).render_chat(USER, mood="!") == "!"


DECLARED = json.loads((FIXTURES / "tokenizers.json").read_text())["declared"]


@pytest.mark.parametrize("case", DECLARED, ids=lambda case: case["name"])
def test_tokens_declared_beside_tokenizer_json(tmp_path, case):
    shutil.copy(LLAMA3 / "tokenizer.json", tmp_path)
    for name, content in case["files"].items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.special_tokens == case["special_tokens"]
    assert [tokenizer.encode(text, special=False) for text in case["texts"]] == case["ids"]
    assert tokenizer.vocab_size == case["vocab_size"]
    assert tokenizer.encode_chat([{"role": "user", "content": "her"}]) == case["chat"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bos_token": 3}, "3 is not a token"),
        ({"bos_token": {"text": "a"}}, "is not a token"),
        ({"bos_token": {"content": "<x>", "rstrip": 1}}, "flags of token '<x>'"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder must map"),
        ({"added_tokens_decoder": {"x": {"content": "<x>"}}}, "'x' is not the id"),
        ({"added_tokens_decoder": {"-1": {"content": "<x>"}}}, "'-1' is not the id"),
        ({"added_tokens_decoder": {"320": "<x>"}, "extra_special_tokens": 3}, "extra_special_tok"),
        (
            {"added_tokens_decoder": {"999": {"content": "<x>"}}},
            "declared as token 999, but .* 320",
        ),
        (
            {"added_tokens_decoder": {"2": {"content": "<|begin|>"}}},
            "declared as token 2, but .* 1",
        ),
    ],
)
def test_malformed_declarations(tmp_path, settings, message):
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"):
        Tokenizer.load(directory(tmp_path, **settings))


def test_templates_in_files_of_their_own(tmp_path):
    path = directory(tmp_path, chat_template="from settings")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (path / "additional_chat_templates" / "note.txt").write_text("x")
    # As in transformers 5.24, files replace the templates of tokenizer_config.json.
    assert Tokenizer.load(path).chat_templates == {"tool_use": "tools"}
    (path / "chat_template.jinja").write_text("usual")
    tokenizer = Tokenizer.load(path)
    assert tokenizer.chat_templates == {"default": "usual", "tool_use": "tools"}
    assert tokenizer.render_chat(USER, tools=[{}]) == "tools"
    outside = tmp_path.parent / "outside.jinja"
    outside.write_text("secret")
    (path / "additional_chat_templates" / "x.jinja").symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of the directory"):
        Tokenizer.load(path)
    shutil.rmtree(path / "additional_chat_templates")
    (path / "additional_chat_templates").symlink_to(tmp_path.parent)
    with pytest.raises(ValueError, match="folder is a link"):
        Tokenizer.load(path)


def test_templates_in_the_hugging_face_cache(tmp_path):
    snapshot, blobs = directory_of_cache(tmp_path)
    (snapshot / "additional_chat_templates").mkdir()
    (blobs / "hash").write_text("rag")
    (snapshot / "additional_chat_templates" / "rag.jinja").symlink_to("../../../blobs/hash")
    assert Tokenizer.load(snapshot).chat_templates == {"rag": "rag"}


def directory_of_cache(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shutil.copy(LLAMA3 / "tokenizer.json", blobs / "json")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/json")
    return snapshot, blobs


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_files_that_are_too_large(tmp_path, name):
    path = directory(tmp_path)
    with open(path / name, "wb") as file:
        file.truncate(64 * 2**20 + 1 if name == "tokenizer.json" else 2**20 + 1)
    with pytest.raises(ValueError, match=f"{name}: refused, larger than"):
        Tokenizer.load(path)


def test_template_text_that_is_too_large(tmp_path):
    with pytest.raises(ValueError, match="refused, more than 100 chat templates or one of more"):
        Tokenizer.load(directory(tmp_path, chat_template="a" * (2**20 + 1)))
    many = [{"name": str(i), "template": "a"} for i in range(101)]
    with pytest.raises(ValueError, match="refused, more than 100 chat templates or one of more"):
        Tokenizer.load(directory(tmp_path, chat_template=many))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template 'default' .it has: none."),
        ("{{ raise_exception('roles must alternate') }}", "failed: roles must alternate"),
        ("{% if %}", "failed: "),
        ("{{ messages[0].content + 1 }}", "failed: "),
        ("{{ ''.__class__.__mro__ }}", "failed: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "failed: .*'append'.* is unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "failed: Range too big"),
        ("{% include 'x' %}", "failed: no loader"),
    ],
)
def test_failing_templates(template, message):
    templates = {} if template is None else {"default": template}
    tokenizer = Tokenizer(BYTE_LEVEL.backend, {}, templates)
    with pytest.raises(ValueError, match=message):
        tokenizer.render_chat(USER)


LOOP = "{%% for i in range(99999) %%}%s{%% endfor %%}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP % "{% for j in range(99999) %}{% endfor %}", "longer"),
        ("{% set n = namespace(s='aa') %}" + LOOP % "{% set n.s = n.s + n.s %}", "memory|longer"),
        ("{{ 'a' * 10 ** 12 }}", "memory"),
        ("{{ messages[0].content * 40000000 }}", "80000000 characters, more than 67108864"),
        ("{{ 'a'.ljust(10 ** 12) }}", "memory"),
        ("{{ 10 ** (10 ** 9) }}", "memory|longer"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ " + "(" * 10_000 + ")" * 10_000 + " }}", "recursion"),
    ],
)
def test_templates_without_bounds(monkeypatch, template, message):
    """They are ended, and the next template renders."""
    monkeypatch.setattr(chat_template, "_worker", functools.cache(lambda: TemplateWorker(2.0)))
    tokenizer = Tokenizer(BYTE_LEVEL.backend, {}, {"default": template, "good": "good"})
    with pytest.raises(ValueError, match=f"chat template failed: .*({message})"):
        tokenizer.render_chat(USER)
    assert tokenizer.render_chat(USER, template="good") == "good"


def test_templates_render_in_many_threads():
    tokenizer = Tokenizer(BYTE_LEVEL.backend, {}, {"default": "{{ messages[0].content }}"})
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        chats = [[{"content": str(i) * 10_000}] for i in range(50)]
        texts = list(pool.map(tokenizer.render_chat, chats))
    assert texts == [chat[0]["content"] for chat in chats]


def test_an_interrupted_chat_is_not_the_answer_of_the_next(monkeypatch):
    worker = TemplateWorker()
    assert worker.render("a", {}) == "a"
    exchange = TemplateWorker._exchange

    def interrupted(process, request):
        process.stdin.write(request)
        process.stdin.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TemplateWorker, "_exchange", staticmethod(interrupted))
        with pytest.raises(KeyboardInterrupt):
            worker.render("b", {})
    assert TemplateWorker._exchange is exchange
    assert worker.render("c", {}) == "c"


def test_chats_that_cannot_be_rendered():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    tokenizer = Tokenizer(BYTE_LEVEL.backend, {}, {"default": "{{ messages }}"})
    for use in (tokenizer.render_chat, tokenizer.encode_chat):
        with pytest.raises(ValueError, match="nested more than 100 deep"):
            use([{"content": nested}])
    many = tokenizers.Tokenizer.from_file(str(LLAMA3 / "tokenizer.json"))
    many.add_special_tokens(["<" * n for n in range(2, 3000)])
    with pytest.raises(ValueError, match="control tokens are prefixes of one another"):
        Tokenizer(many, {}, {}).encode("<<", plain=True)


def test_a_forked_process_renders_in_a_process_of_its_own(monkeypatch):
    """The pipes of the first one belong to its parent."""
    worker = TemplateWorker()
    assert worker.render("a", {}) == "a"
    first = worker._process
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: 1)
        assert worker.render("b", {}) == "b"
        assert worker._process is not first
        worker.close()
    assert first.poll() is None
    first.communicate()


@pytest.mark.parametrize("template", [3, [3], [{"name": "x"}], [{"name": "x", "template": None}]])
def test_malformed_templates(tmp_path, template):
    with pytest.raises(ValueError, match="neither text nor named texts"):
        Tokenizer.load(directory(tmp_path, chat_template=template))


def test_template_that_is_not_text(tmp_path):
    (directory(tmp_path) / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: not UTF-8"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"model": {"type": "X"}}'])
def test_malformed_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a valid tokenizer"):
        Tokenizer.load(tmp_path)


def test_no_tokenizer(tmp_path):
    assert Tokenizer.load(tmp_path) is None


def test_truncation_and_padding_settings_are_dropped(tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(LLAMA3 / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "def main(): pass"
    assert Tokenizer.load(tmp_path).encode(text) == BYTE_LEVEL.encode(text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_bytes_of_tokens_add_up_to_the_text(name):
    tokenizer = TOKENIZERS[name]
    text = "ab \u00e9\n\U0001f600b\u20ac \x00a"
    ids = tokenizer.encode(text, special=False)
    pieces = [tokenizer.token_bytes(token) for token in ids]
    assert b"".join(pieces).decode() == (" " + text if name == "sentencepiece" else text)
    assert any(len(piece) == 1 and piece[0] >= 0x80 for piece in pieces)  # a part of a character
    assert tokenizer.token_bytes(1) in (b"<|begin|>", b"<s>")
    assert tokenizer.token_bytes(tokenizer.vocab_size) is None
