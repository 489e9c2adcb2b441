"""`generate` end to end on a tiny checkpoint with a tokenizer: text, stops, reports, devices."""

import dataclasses
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders

from lookahead_jax.checkpoints.load import load
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.decoding.step import decode
from lookahead_jax.engine.engine import Engine
from lookahead_jax.engine.requests import Request
from lookahead_jax.generation import inputs
from lookahead_jax.generation.generate import generate
from lookahead_jax.generation.output_text import OutputRow
from lookahead_jax.generation.score import score
from lookahead_jax.host.integers import whole_id
from lookahead_jax.model.sharding import batch_sharding, make_mesh, param_shardings
from lookahead_jax.policies.oracle import Oracle
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.prefilling import batching
from lookahead_jax.prompts.read import read_prompt
from tests import tiny

POLICY = SnapKV(window=4, pool="avg", kernel=3)
CHECKPOINT = Path(__file__).parent / "fixtures" / "models" / "llama3"
TEXT = "the cache forgets what the answer does not need, and keeps the rest of it"


@pytest.fixture(scope="module")
def model():
    return load(CHECKPOINT, dtype=jnp.float32)


@pytest.fixture(scope="module")
def plain(model):
    return generate(model, [TEXT], policy=POLICY, budget=16, max_new_tokens=24, eos_ids=())


def test_report_counts_what_was_kept(model, plain):
    length = len(model.tokenizer.encode(TEXT))
    layers, heads = model.config.num_layers, model.config.num_kv_heads
    assert plain.prompt_tokens == [length]
    assert plain.cache.kept_per_head == [[[16] * heads] for _ in range(layers)]
    assert plain.kept.shape == (layers, 1, heads, 16)
    assert plain.cache.bytes == layers * heads * 128 * (2 * model.config.head_dim * 4 + 4)
    assert plain.text == [model.tokenizer.decode(plain.tokens[0])]
    assert plain.finish == ["length"]
    assert plain.timing.eviction_overhead_s is None


def test_full_bytes_are_those_of_the_rows_own_tokens(model, plain):
    """Neither the padding of a row to the longest, nor that of the batch, nor empty slots."""
    (prompt,), first = plain.prompt_ids, plain.tokens[0][0]
    result = generate(
        model, [prompt, prompt[:20]], policy=POLICY, budget=16, max_new_tokens=66, eos_ids=[first]
    )
    per_entry = plain.cache.bytes // 128
    assert result.cache.full_bytes == per_entry * (len(prompt) + 66 + 20 + 66)


def test_a_full_cache_has_no_slots_for_the_padding(model):
    """704 tokens are read as 1,024. With 24 new ones they need 728 entries, and get 768 slots."""
    prompt = np.random.default_rng(0).integers(1, 300, 704).tolist()
    result = generate(model, [prompt], policy=make_policy("full"), max_new_tokens=24, eos_ids=())
    per_entry, rest = divmod(result.cache.full_bytes, 728)
    assert rest == 0
    assert result.cache.bytes == 768 * per_entry
    assert (result.kept[0, 0, 0, :704] == np.arange(704)).all()


def test_new_tokens_take_the_slots_of_the_padding(model, plain):
    """33 tokens read as 64, and 90 new ones: 128 slots hold them, and the tokens stay the same."""
    prompt, full = plain.prompt_ids[0][:33], make_policy("full")
    result = generate(model, [prompt], policy=full, max_new_tokens=90, eos_ids=())
    read = read_prompt(
        model.params, jnp.asarray(batching.pad_batch([prompt], config=model.config)),
        config=model.config, policy=full, budget=0, new_tokens=90,
    )  # fmt: skip
    expected = decode(model.params, read.cache, read.logits, config=model.config, max_new_tokens=90)
    assert read.cache.slots == 256
    assert result.cache.bytes == read.cache.bytes // 2
    assert result.tokens[0] == np.asarray(expected.tokens[0]).tolist()


@pytest.mark.parametrize("burst", [1, 5])
def test_streamed_pieces_are_the_text_whatever_the_burst(model, plain, burst):
    pieces = []
    result = generate(
        model, [TEXT], policy=POLICY, budget=16, max_new_tokens=24, eos_ids=(), burst=burst,
        on_text=lambda row, piece: pieces.append((row, piece)),
    )  # fmt: skip
    assert result.tokens == plain.tokens
    assert "".join(piece for _, piece in pieces) == plain.text[0] == result.text[0]
    assert {row for row, _ in pieces} == {0}


def test_stop_strings_cut_text_and_tokens(model, plain):
    stop = re.search("[ -~]{2}", plain.text[0][5:]).group()  # random bytes around it
    begin = plain.text[0].find(stop)
    for burst in (1, 16):
        pieces = []
        result = generate(
            model, [TEXT, "other words"], policy=POLICY, budget=16, max_new_tokens=24,
            eos_ids=(), stop=[stop], burst=burst,
            on_text=lambda row, piece, pieces=pieces: pieces.append((row, piece)),
        )  # fmt: skip
        assert result.text[0] == plain.text[0][:begin]
        assert "".join(piece for row, piece in pieces if row == 0) == result.text[0]
        assert result.finish[0] == "stop"
        tokens = result.tokens[0]
        assert tokens == plain.tokens[0][: len(tokens)]
        assert stop in model.tokenizer.decode(tokens)
        assert stop not in model.tokenizer.decode(tokens[:-1])


class Letters:
    """A tokenizer of letters, for OutputRow alone; token 1 is special."""

    class Stream:
        def push(self, token):
            return "" if token == 1 else chr(token)

        def finish(self):
            return ""

    def stream(self, *, prompt):
        return self.Stream()

    def special_text(self, token):
        return "<end>" if token == 1 else ""


def test_text_that_may_begin_a_stop_string_is_held_back():
    shown = []
    row = OutputRow(Letters(), stop=["STOP", "ANT"], on_text=shown.append)
    row.feed(map(ord, "a ST"))
    assert shown == ["a "]
    row.feed(map(ord, "R"))
    assert shown == ["a ", "STR"]
    row.feed(map(ord, "ANTx"))
    row.close()
    assert row.text == "a STR"
    assert "".join(shown) == "a STR"
    assert row.tokens == list(map(ord, "a STRANT"))
    with pytest.raises(ValueError, match="empty"):
        OutputRow(Letters(), stop=[""])


def test_what_is_shown_before_the_end_is_all_that_is_certain():
    rng = np.random.default_rng(0)
    for _ in range(200):
        stops = ["".join(rng.choice(list("ab"), rng.integers(1, 6))) for _ in range(3)]
        shown: list[str] = []
        row = OutputRow(Letters(), stop=stops, on_text=shown.append)
        for letter in rng.choice(list("abc"), 12):
            row.feed([ord(letter)])
            if row.stopped:
                break
            ends = [row.text[at:] for at in range(len(row.text))]
            held = next((e for e in ends if any(s.startswith(e) for s in stops)), "")
            assert "".join(shown) + held == row.text


@pytest.mark.parametrize(
    ("stop", "output", "text", "taken"),
    [
        ("<end>", "ab\1cd", "ab", 3),
        ("b<end>c", "ab\1cd", "a", 4),
        ("b<end>", "\1ab\1cd", "a", 4),
        ("bc", "ab\1cd", "a", 4),  # in the text as it is shown
        ("end", "ab\1cd", "ab", 3),
        ("<end>x", "ab\1cd", "abcd", 5),
    ],
)
def test_stop_strings_may_hold_special_tokens(stop, output, text, taken):
    """The text omits them, and a stop string finds them; no portion of the tokens shows more."""
    for size in (1, 2, 9):
        shown = []
        row = OutputRow(Letters(), stop=[stop], on_text=shown.append)
        ids = [ord(letter) for letter in output]
        for begin in range(0, len(ids), size):
            row.feed(ids[begin : begin + size])
        row.close()
        assert row.text == "".join(shown) == text
        assert row.tokens == ids[:taken]
        assert row.stopped == (text != "abcd")


@pytest.mark.parametrize(
    ("stop", "text", "reason"), [([], "ab", "eos"), (["be"], "a", "stop"), (["bex"], "ab", "eos")]
)
def test_an_end_token_that_is_not_special_stays_out_of_the_text(stop, text, reason):
    shown = []
    row = OutputRow(Letters(), stop=stop, end_ids=[ord("e")], on_text=shown.append)
    row.feed(map(ord, "abe"))
    row.close()
    assert row.text == "".join(shown) == text
    assert (row.tokens, row.finish()) == (list(map(ord, "abe")), reason)


def test_text_behind_a_prompt_keeps_its_first_space(model, plain):
    """With a decoder that strips it from a text; a special token stops, and is not shown."""
    tokens = plain.tokens[0]
    stop = next(t for t in tokens[2:] if t not in tokens[:2])
    tokens = tokens[: tokens.index(stop) + 1]
    pieces = [f"x{i}" for i in range(model.config.vocab_size)]
    pieces[tokens[0]], pieces[stop] = "\u2581world", "<|im_end|>"
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [])
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<|im_end|>"])
    other = dataclasses.replace(model, tokenizer=Tokenizer(backend, {}, {}))
    expected = " world" + "".join(pieces[t] for t in tokens[1:-1])
    shown, prompt = [], plain.prompt_ids[0]
    options = dict(max_new_tokens=24, eos_ids=(), stop=["<|im_end|>"])
    result = generate(
        other, [prompt], policy=POLICY, budget=16, on_text=lambda _, text: shown.append(text),
        **options,
    )  # fmt: skip
    assert result.text == ["".join(shown)] == [expected]
    assert (result.tokens, result.finish) == ([tokens], ["stop"])
    engine = Engine(
        other, policy=POLICY, budget=16, rows=1, max_new_tokens=24, max_prompt_tokens=64
    )
    events = []
    request = Request(prompt=prompt, on_event=events.append, **options)
    by_token = dict(max_new_tokens=24, eos_ids=(), stop_token_ids=["<|im_end|>"])
    served, ended = engine.run([request, Request(prompt=prompt, **by_token)])
    assert served.text == ended.text == "".join(event.text for event in events) == expected
    assert served.tokens == ended.tokens == tokens
    assert (served.finish, ended.finish) == ("stop", "eos")


def test_eos_ends_a_row(model, plain):
    eos = plain.tokens[0][7]
    result = generate(model, [TEXT], policy=POLICY, budget=16, max_new_tokens=24, eos_ids=[eos])
    assert result.tokens[0] == plain.tokens[0][: plain.tokens[0].index(eos) + 1]
    assert result.finish == ["eos"]


def test_stop_tokens_come_on_top_of_eos_and_may_be_texts(model, plain):
    options = dict(policy=POLICY, budget=16, max_new_tokens=24)
    stop = plain.tokens[0][7]
    begin = plain.tokens[0].index(stop)
    content = model.tokenizer.backend.id_to_token(stop)
    for given in (stop, content):
        result = generate(model, [TEXT], stop_token_ids=[given], **options)
        assert result.tokens[0] == plain.tokens[0][: begin + 1]
        assert result.finish == ["eos"]
        assert result.text == [model.tokenizer.decode(plain.tokens[0][:begin])]  # as vLLM has it
    assert inputs.end_ids(model, None, [stop, "<|end|>"]) == (2, stop)
    assert inputs.end_ids(model, ["<|begin|>"], [1]) == (1,)


def test_an_eos_token_that_the_checkpoint_does_not_name_is_announced(model):
    other = dataclasses.replace(
        model, generation=dataclasses.replace(model.generation, eos_ids=(5,))
    )
    with pytest.warns(UserWarning, match=r"'<\|end\|>' \(id 2\).*stop_token_ids=") as said:
        generate(other, [TEXT], policy=POLICY, budget=16, max_new_tokens=1)
    assert [warning.filename for warning in said] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inputs.end_ids(other, None, ["<|end|>"]) == (5, 2)
        assert inputs.end_ids(other, ()) == ()
        assert inputs.end_ids(model, None) == (2,)


def test_measured_timing_has_every_part(model):
    result = generate(
        model, [TEXT], policy=POLICY, budget=16, max_new_tokens=4, eos_ids=(), measure=True
    )
    assert result.timing.ttft_s > 0
    assert result.timing.eviction_overhead_s is not None
    assert result.timing.decode_tokens_per_s > 0


def test_repetition_penalty_sees_the_prompt(model):
    hot = Sampling(repetition_penalty=1e6)
    result = generate(
        model, [TEXT], policy=POLICY, budget=16, max_new_tokens=12, eos_ids=(), sampling=hot
    )
    seen = set(model.tokenizer.encode(TEXT))
    for token in result.tokens[0]:
        assert token not in seen
        seen.add(token)


def test_score_agrees_with_the_cache_of_generate(model, plain):
    tokens = np.asarray([model.tokenizer.encode(TEXT)], np.int32)
    scored = score(model, tokens, policy=POLICY, budget=16)
    layers, heads = model.config.num_layers, model.config.num_kv_heads
    assert scored.scores.shape == (layers, 1, heads, tokens.shape[1])
    assert scored.scores.dtype == jnp.float32
    np.testing.assert_array_equal(scored.kept, plain.kept)


def test_oracle_reads_its_own_answer():
    """The two-pass policy keeps what the response's attention under the full cache says."""
    model = tiny.config()
    params, tokens = tiny.params(model), tiny.batch((60, 33), model)
    options = dict(config=model, budget=16, new_tokens=8)
    result = read_prompt(
        params, tokens, policy=Oracle(response_tokens=6), with_scores=True, **options
    )
    full = read_prompt(params, tokens, policy=make_policy("full"), **options)
    response = decode(params, full.cache.fork(1), full.logits, config=model, max_new_tokens=6)
    texts = [
        row[row >= 0].tolist() + answer.tolist()
        for row, answer in zip(np.asarray(tokens), np.asarray(response.tokens), strict=True)
    ]
    # The same answers, read as the last 6 prompt tokens of a longer text by unpooled SnapKV.
    longer = jnp.asarray(batching.pad_batch(texts, config=model))
    window = read_prompt(
        params, longer, policy=SnapKV(window=6, pool="none"), with_scores=True, **options
    )
    for row, length in enumerate((60, 33)):
        np.testing.assert_allclose(
            result.scores[:, row, :, :length], window.scores[:, row, :, :length],
            rtol=1e-4, atol=1e-7,
        )  # fmt: skip
    assert (np.asarray(result.cache.length) == 16).all()


def test_four_devices_keep_and_generate_the_same():
    """Data and tensor axes: the same kept entries and tokens as on one device."""
    model = tiny.config(vocab_size=96)
    params, tokens = tiny.params(model), tiny.batch((60, 33, 61, 20), model)
    mesh = make_mesh(data=2, tensor=2)
    sharded = jax.device_put(params, param_shardings(model, mesh))
    split = jax.device_put(tokens, batch_sharding(mesh))
    results = []
    for p, t in ((params, tokens), (sharded, split)):
        read = read_prompt(p, t, config=model, policy=POLICY, budget=16, new_tokens=16)
        pos = np.asarray(read.cache.pos)
        out = decode(p, read.cache, read.logits, config=model, max_new_tokens=16)
        results.append((pos, np.asarray(out.tokens)))
    assert len(sharded["layers"]["q"].sharding.device_set) == 4
    np.testing.assert_array_equal(results[1][0], results[0][0])
    np.testing.assert_array_equal(results[1][1], results[0][1])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(prompts=[]), "no prompt"),
        (dict(prompts=[[]]), "prompt 0 is empty"),
        (dict(prompts=[[5, 10**6]]), "outside the vocabulary"),
        (dict(prompts=[[5, -3, 7]]), "token id -3"),
        (dict(prompts=[[5, 2**31]]), "outside the vocabulary"),
        (dict(prompts=TEXT), "are a list"),
        (dict(questions="why?"), "are a list"),
        (dict(seeds=[1, 2]), "2 seeds for 1 rows"),
        (dict(burst=0), "burst must be at least 1, not 0"),
        (dict(budget=0), "budget must be 1 to"),
        (dict(budget=2**31), "budget must be 1 to"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, not 0"),
        (dict(prompts=[""]), "prompt 0 is empty"),
        (dict(prompts=[TEXT, ""]), "prompt 1 is empty"),
        (dict(eos_ids=[2**31]), "is not a token id"),
        (dict(eos_ids=[-1]), "-1 is not a token id"),
        (dict(eos_ids=["nothing like it"]), "'nothing like it' is not one token"),
        (dict(stop_token_ids="<|end|>"), r"give \['<|end|>'\]"),
        (dict(stop="return"), r"a list: give \['return'\]"),
        (dict(policy=make_policy("lookaheadkv")), "lookahead modules"),
        (dict(policy=make_policy("h2o"), questions=["a"], evict_every=4), "H2O adds up scores"),
    ],
)
def test_bad_requests_are_named(model, change, complaint):
    with pytest.raises(ValueError, match=complaint):
        generate(model, **{"prompts": [TEXT], **change})


def test_fractions_are_no_token_ids():
    assert whole_id(np.int64(5), "a token") == 5
    with pytest.raises(ValueError, match=r"a token is 5\.5: token ids are integers"):
        whole_id(5.5, "a token")
    with pytest.raises(ValueError, match="top_k must be a whole number"):
        Sampling(top_k=2.5)  # pyright: ignore[reportArgumentType]


def test_surprises_are_announced(model):
    with pytest.warns(UserWarning, match="reduced to 4") as said:
        generate(model, [TEXT], policy=SnapKV(window=32), budget=8, max_new_tokens=1)
    assert [warning.filename for warning in said] == [__file__]  # the caller's line
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, max_position=20))
    with pytest.warns(UserWarning, match="exceed the 20 positions") as said:
        score(short, np.full((1, 21), 5, np.int32), policy=POLICY, budget=8)
    assert [warning.filename for warning in said] == [__file__]
