"""What the clients of a load test send, and which answers are right; no input or output here.

An exchange follows from its seed alone, so two servers can be sent the same requests.
"""

import dataclasses
import json
import random
from collections.abc import Callable
from typing import Any

NEW_TOKENS = (8, 64)
SHORT, LONG = (80, 600), (1800, 2400)  # characters of a prompt
LONG_SHARE, REPEATED_SHARE = 0.1, 0.15
REPEATED = 8  # prompts that several clients send
REFUSED = frozenset({429, 503})  # explicit refusals that any request may get
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """A request, how its client behaves, and the statuses that are right answers."""

    kind: str
    sent: bytes
    """All that the client sends, from the head on; some kinds stop in the middle."""
    statuses: frozenset[int] = frozenset({200}) | REFUSED
    stream: bool = False
    slow: bool = False
    """The client reads its answer in small pieces, with pauses."""
    leaves_after: int | None = None
    """The client leaves after this many pieces of text; 0: without waiting for the first one."""
    resets: bool = False
    """It leaves with a reset instead of an orderly end."""
    closes: bool = False
    """The server may end the connection without an answer: no request has arrived."""
    json_error: bool = True
    """A refusal has OpenAI's form; what is no HTTP is refused as text."""
    choices: int = 1
    """That the answer has."""
    needs_done: bool = True
    """A stream ends with [DONE], as OpenAI's do."""


def plan(dice: random.Random, *, text: str, model: str, well_behaved: bool) -> Exchange:
    """The next exchange of a client, on prompts cut from `text`.

    `well_behaved` clients send nothing but greedy chats as streams, which every server knows.
    """
    if well_behaved:
        messages = [{"role": "user", "content": _prompt(dice, text, repeated=False)}]
        body = {
            "model": model, "messages": messages, "max_tokens": dice.randint(*NEW_TOKENS),
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        return Exchange(kind="stream", sent=_post(CHAT, body), stream=True, needs_done=False)
    kind = dice.choices(list(_MIX), [weight for weight, _ in _MIX.values()])[0]
    return _MIX[kind][1](kind, dice, text, model)


def _prompt(dice: random.Random, text: str, *, repeated: bool = True) -> str:
    if repeated and dice.random() < REPEATED_SHARE:
        dice = random.Random(dice.randrange(REPEATED))
    length = dice.randint(*(LONG if dice.random() < LONG_SHARE else SHORT))
    begin = dice.randrange(len(text) - length)
    return text[begin : begin + length]


def _ordinary(dice: random.Random, text: str, model: str, **fields: Any) -> bytes:
    """A request with some of the fields that clients use."""
    body: dict[str, Any] = {"model": model, "max_tokens": dice.randint(*NEW_TOKENS)}
    prompt, path = _prompt(dice, text), dice.choice([CHAT, TEXT])
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    if dice.random() < 0.5:
        body |= {"temperature": 0.8, "top_p": 0.95, "seed": dice.randrange(1000)}
    if dice.random() < 0.1:
        body["n"] = 2
    if dice.random() < 0.1:
        body |= {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
    if dice.random() < 0.05:
        body["response_format"] = {"type": "json_object"}
    if dice.random() < 0.1:
        body["stop"] = ["\n\n"]
    return _post(path, body | fields)


def _whole(kind: str, dice: random.Random, text: str, model: str) -> Exchange:
    sent = _ordinary(dice, text, model)
    asked = json.loads(sent.partition(b"\r\n\r\n")[2]).get("n", 1)
    return Exchange(kind=kind, sent=sent, choices=asked)


def _stream(kind: str, dice: random.Random, text: str, model: str) -> Exchange:
    """One choice, so that gaps are those of one continuation."""
    fields = {"stream": True, "n": 1, "stream_options": {"include_usage": True}}
    return Exchange(kind=kind, sent=_ordinary(dice, text, model, **fields), stream=True)


def _slow(kind: str, dice: random.Random, text: str, model: str) -> Exchange:
    """A long stream: of every token, the five likeliest too."""
    body = {
        "model": model, "prompt": _prompt(dice, text), "max_tokens": NEW_TOKENS[1], "logprobs": 5,
        "stream": True,
    }  # fmt: skip
    return Exchange(kind=kind, sent=_post(TEXT, body), stream=True, slow=True)


def _leaves(kind: str, dice: random.Random, text: str, model: str) -> Exchange:
    stream = dice.random() < 0.7
    sent = _ordinary(dice, text, model, stream=stream)
    pieces = dice.randint(0, 4) if stream else 0
    return Exchange(
        kind=kind, sent=sent, stream=stream, leaves_after=pieces, resets=dice.random() < 0.5
    )


def _refused(
    status: int, make: Callable[[random.Random, str], bytes], **more: Any
) -> Callable[[str, random.Random, str, str], Exchange]:
    """A kind whose requests, made from dice and the model's name, are refused with `status`."""

    def exchange(kind: str, dice: random.Random, text: str, model: str) -> Exchange:
        statuses = frozenset({status}) | REFUSED
        return Exchange(kind=kind, sent=make(dice, model), statuses=statuses, **more)

    return exchange


def _post(path: str, body: Any, *, kind: str = "application/json", length: Any = None) -> bytes:
    """A whole request; `length` replaces the true length of its body."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [
        f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {kind}",
        f"Content-Length: {len(content) if length is None else length}", "", "",
    ]  # fmt: skip
    return "\r\n".join(head).encode() + content


def _wrong_types(dice: random.Random, model: str) -> bytes:
    field, value = dice.choice(
        [
            ("prompt", {"a": 1}), ("max_tokens", "many"), ("temperature", [0]), ("n", -1),
            ("stop", 7), ("stream", "perhaps"), ("logit_bias", {"x": "y"}), ("seed", 1e400),
        ]
    )  # fmt: skip
    return _post(TEXT, {"model": model, "prompt": "a", field: value})


def _deep(dice: random.Random, model: str) -> bytes:
    nested = b"[" * 100_000 + b"]" * 100_000
    alone = dice.random() < 0.5
    return _post(TEXT, nested if alone else b'{"model": "m", "prompt": %s}' % nested)


def _bad_head(dice: random.Random, model: str) -> bytes:
    heads = [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"HELLO", b"POST / HTTP/1.1\r\n: x"]
    return dice.choice(heads) + b"\r\n\r\n"


def _bad_chunks(dice: random.Random, model: str) -> bytes:
    head = _post(TEXT, b"", length=0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    return head + b"not a length\r\n"


_MIX: dict[str, tuple[float, Callable[[str, random.Random, str, str], Exchange]]] = {
    "whole": (20, _whole),
    "stream": (36, _stream),
    "slow": (8, _slow),
    "leaves": (14, _leaves),
    "broken_json": (2, _refused(400, lambda d, m: _post(TEXT, b'{"model": "m", "prompt": "a'))),
    "not_utf8": (1, _refused(400, lambda d, m: _post(CHAT, b'{"model": "\xff\xfe"}'))),
    "wrong_types": (3, _refused(400, _wrong_types)),
    "deep": (2, _refused(400, _deep)),
    "unknown_field": (
        1,
        _refused(400, lambda d, m: _post(TEXT, {"model": m, "prompt": "a", "surprise": 1})),
    ),
    "unknown_model": (1, _refused(404, lambda d, m: _post(TEXT, {"model": "?", "prompt": "a"}))),
    "unknown_path": (1, _refused(404, lambda d, m: _post("/v1/nothing", {"model": m}))),
    "too_long": (
        2,
        _refused(400, lambda d, m: _post(TEXT, {"model": m, "prompt": "word " * 20_000})),
    ),
    "huge": (
        1,
        _refused(413, lambda d, m: _post(TEXT, {"model": m, "prompt": "word " * 2**20})),
    ),
    "claims_huge": (0.5, _refused(413, lambda d, m: _post(TEXT, b"{", length=10**12))),
    "no_json": (1, _refused(415, lambda d, m: _post(TEXT, b"a=b", kind="text/plain"))),
    "bad_head": (1, _refused(400, _bad_head, json_error=False)),
    "bad_length": (
        1,
        _refused(400, lambda d, m: _post(TEXT, b"{}", length="many"), json_error=False),
    ),
    "bad_chunks": (1, _refused(400, _bad_chunks, json_error=False)),
    "huge_head": (
        1,
        _refused(400, lambda d, m: b"GET / HTTP/1.1\r\nX: " + b"x" * 2**18, json_error=False),
    ),
    "half_body": (0.5, _refused(408, lambda d, m: _post(TEXT, b'{"model": ', length=64))),
    "half_head": (
        0.5,
        _refused(408, lambda d, m: b"POST /v1/completions HTTP/1.1\r\nHo", closes=True),
    ),
}
KINDS = tuple(_MIX)
