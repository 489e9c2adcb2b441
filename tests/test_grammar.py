"""Grammars: masks against enumerated languages, and drafted output against undrafted output."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax import EMBEDDED_MODEL
from lookahead_jax.checkpoints.load import load
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.decoding.allowed import allow_only
from lookahead_jax.decoding.grammar import MAX_GRAMMAR_BYTES, Grammar, GrammarError, words
from lookahead_jax.decoding.sampling import GREEDY, Sampling
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.engine.engine import Engine
from lookahead_jax.engine.requests import Request, RequestError
from lookahead_jax.generation.generate import generate
from lookahead_jax.policies.snapkv import SnapKV
from tests import tiny
from tests.compilations import compilations
from tests.drafted import Shared

POLICY, BUDGET, NEW, END = SnapKV(window=4, pool="avg", kernel=3), 16, 48, 257
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["ann", "anna", "bob"]},
        "ok": {"type": "boolean"},
        "n": {"type": "array", "items": {"enum": [1, 12]}, "maxItems": 2},
    },
    "required": ["name", "ok", "n"],
    "additionalProperties": False,
}
TEXTS = [
    json.dumps({"name": name, "ok": ok, "n": list(n)}).encode()
    for name in ("ann", "anna", "bob")
    for ok in (True, False)
    for count in range(3)
    for n in itertools.product((1, 12), repeat=count)
]
GRAMMAR = Grammar.json_schema(SCHEMA)
SAMPLED = Sampling(temperature=1.2, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save_chat_model(folder, num_hidden_layers=1)
    return load(folder)


def compiled(model, grammar=GRAMMAR, ends=(END,)):
    return grammar.compile(model.tokenizer, vocab_size=258, end_ids=ends)


def flags(mask, vocab=258):
    """The bits of masks [..., W] as bool [..., V]."""
    return np.unpackbits(mask.view(np.uint8), axis=-1, bitorder="little")[..., :vocab].astype(bool)


def expected(model, before: bytes, ends=(END,)):
    """The tokens that continue `before` to the beginning of one of TEXTS, by trying each."""
    allowed = np.zeros(258, bool)
    for token in range(256):
        text = before + model.tokenizer.token_bytes(token)
        allowed[token] = token not in ends and any(t.startswith(text) for t in TEXTS)
    allowed[list(ends)] = before in TEXTS
    return allowed


def ids(model, text: bytes):
    return model.tokenizer.encode(text.decode(), special=False)


@pytest.mark.parametrize("ends", [(END,), (END, 256, 5)])
def test_masks_are_those_of_the_enumerated_language(model, ends):
    for text in TEXTS[::13]:
        row = compiled(model, ends=ends).begin()
        for at, token in enumerate([*ids(model, text), None]):
            np.testing.assert_array_equal(flags(row.mask()), expected(model, text[:at], ends))
            if token is not None:
                row.observe([token])


def test_masks_of_a_tree_are_those_of_each_path(model):
    rng = np.random.default_rng(0)
    row, done = compiled(model).begin(), TEXTS[7][:11]
    row.observe(ids(model, done))
    for _ in range(5):
        tokens, parents = [-1], [-1]
        for text in rng.choice(TEXTS, 4):
            at = 0
            for token in ids(model, text[11:30]):
                tokens.append(token)
                parents.append(at)
                at = len(tokens) - 1
        tokens += [END, 300, -5, *rng.integers(0, 258, 9).tolist()]
        parents += rng.integers(-2, len(tokens) + 2, 12).tolist()
        masks, stays = row.masks(np.asarray(tokens), np.asarray(parents))
        assert stays.all()
        for node in range(len(tokens)):
            path, at = [], node
            while at > 0 and 0 <= parents[at] < at and 0 <= tokens[at] < 256:
                path.append(tokens[at])
                at = parents[at]
            before = done + b"".join(map(model.tokenizer.token_bytes, path[::-1]))
            if at == 0 and any(t.startswith(before) for t in TEXTS):
                np.testing.assert_array_equal(flags(masks[node]), expected(model, before))
            else:
                assert flags(masks[node]).all()
        np.testing.assert_array_equal(flags(row.mask()), expected(model, done))


def test_masks_do_not_depend_on_the_drafts_before():
    """With tokens of several bytes, where llguidance decides between spellings, too."""
    tokenizer = Tokenizer.load(EMBEDDED_MODEL)
    vocab = tokenizer.vocab_size
    form = GRAMMAR.compile(tokenizer, vocab_size=vocab, end_ids=(0,))
    rng = np.random.default_rng(2)
    for _ in range(6):
        row, done, ended = form.begin(), [], False
        while not ended:
            tokens, parents, paths = [-1], [-1], [done]
            for _ in range(12):  # children that the grammar allows, and others
                parent = int(rng.integers(len(tokens)))
                fresh = form.begin()
                fresh.observe(paths[parent])
                allowed = np.flatnonzero(flags(fresh.mask(), vocab)[1:]) + 1
                if allowed.size:
                    tokens.append(int(rng.choice(allowed)))
                    parents.append(parent)
                    paths.append([*paths[parent], tokens[-1]])
            tokens.append(int(rng.integers(1, vocab)))
            parents.append(0)
            masks, stays = row.masks(np.asarray(tokens), np.asarray(parents))
            assert stays.all()
            for mask, path in zip(masks, paths, strict=False):
                fresh = form.begin()
                fresh.observe(path)
                np.testing.assert_array_equal(flags(mask, vocab), flags(fresh.mask(), vocab))
                text = b"".join(map(tokenizer.token_bytes, path))
                assert any(t.startswith(text) for t in TEXTS)
                assert flags(mask, vocab)[0] == (text in TEXTS)
            ended = len(tokens) == 2
            if not ended:
                row.observe([tokens[1]])
                done = paths[1]


def test_masked_logits_are_minus_infinity_where_the_bit_is_0():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 3, 70)).astype(np.float32)
    mask = rng.integers(0, 2**32, (2, 3, words(70)), dtype=np.uint32)
    masked = np.asarray(allow_only(jnp.asarray(logits), jnp.asarray(mask)))
    np.testing.assert_array_equal(masked, np.where(flags(mask, 70), logits, -np.inf))


def run(model, prompts, **options):
    options = {"grammar": GRAMMAR, "max_new_tokens": NEW, **options}
    seeds = list(range(len(prompts)))
    return generate(model, prompts, policy=POLICY, budget=BUDGET, seeds=seeds, **options)


def drafter(model, name, results):
    """A drafter; those on the host have seen the outputs to come."""
    if name == "draft_model":
        return make_drafter(name, model=model)
    made = make_drafter(name)
    if hasattr(made, "observe"):
        for row, (prompt, tokens) in enumerate(
            zip(results.prompt_ids, results.tokens, strict=True)
        ):
            made.begin(row, prompt)
            made.observe(row, tokens)
            made.end(row)
    return made


PROMPTS = ["who?", '{"name": "bob", "ok": true, "n": [1, 12]}', "x" * 15]


@pytest.mark.parametrize(
    ("sampling", "names"),
    [(GREEDY, ("trie",)), (SAMPLED, ("suffix", "recycling"))],
    ids=["greedy", "sampled"],
)
def test_drafted_output_is_undrafted_output_of_the_grammar(model, sampling, names):
    plain = run(model, PROMPTS, sampling=sampling)
    assert plain.finish == ["eos"] * 3
    assert all(text.encode() in TEXTS for text in plain.text)
    for name in names:
        made = drafter(model, name, plain)
        drafted = run(model, PROMPTS, sampling=sampling, drafter=made, draft_nodes=8)
        assert drafted.tokens == plain.tokens, name
        if name in ("trie", "suffix"):
            assert drafted.drafting.mean_accepted > 1.2, name
    if sampling is SAMPLED:
        made = drafter(model, names[0], plain)
        shared = run(model, PROMPTS, sampling=sampling, drafter=made, draft_nodes=Shared(8))
        assert shared.tokens == plain.tokens
        assert shared.drafting.mean_accepted > 1.1


def test_a_draft_model_is_accepted_where_the_grammar_allows_what_it_says(model):
    loose = Grammar.regex("[!-~]{25,30}")
    plain = run(model, PROMPTS, grammar=loose, sampling=SAMPLED)
    made = make_drafter("draft_model", model=model)
    drafted = run(model, PROMPTS, grammar=loose, sampling=SAMPLED, drafter=made, draft_nodes=8)
    assert drafted.tokens == plain.tokens
    assert drafted.drafting.mean_accepted > 1.2


def test_drawn_trees_wait_while_a_row_follows_a_grammar(model):
    made = make_drafter("drawn_model", model=model)
    plain = run(model, PROMPTS, sampling=SAMPLED)
    assert run(model, PROMPTS, sampling=SAMPLED, drafter=made, draft_nodes=8).tokens == plain.tokens


def test_the_first_token_and_the_distribution_are_those_of_allowed_tokens(model):
    """With one allowed token nothing else can be sampled; with top_k=1 the best allowed one is."""
    sampling = Sampling(temperature=100.0, top_k=1)
    greedy = run(model, PROMPTS)
    assert run(model, PROMPTS, sampling=sampling).tokens == greedy.tokens
    biased = Sampling(logit_bias={ids(model, b"z")[0]: 100.0})
    assert all(text.encode() in TEXTS for text in run(model, PROMPTS, sampling=biased).text)


def test_an_output_that_ends_early_is_the_beginning_of_a_text(model):
    short = run(model, PROMPTS, max_new_tokens=7)
    assert short.finish == ["length"] * 3
    assert all(any(t.startswith(text.encode()) for t in TEXTS) for text in short.text)


@pytest.mark.parametrize("name", ["none", "trie"])
def test_mixed_batches_are_rows_alone(model, name):
    grammars = [GRAMMAR, None, Grammar.regex("[ab]{3}-[0-9]{2,4}"), None, GRAMMAR]
    requests = [
        Request(
            prompt="ab" * (i + 1), max_new_tokens=NEW - i, seed=i, grammar=grammar,
            sampling=SAMPLED if i % 2 else GREEDY, logprobs=2 if i == 2 else None,
        )
        for i, grammar in enumerate(grammars)
    ]  # fmt: skip
    engine = Engine(
        model, policy=POLICY, budget=BUDGET, rows=3, max_new_tokens=NEW, max_prompt_tokens=16,
        burst=4, drafter=name, draft_nodes=8 if name == "trie" else None,
    )  # fmt: skip
    engine.warm_up([1], grammars=True)
    before = len(compilations)
    results = engine.run(requests)
    assert len(compilations) == before
    for request, result in zip(requests, results, strict=True):
        (alone,) = engine.run([request])
        assert result.tokens == alone.tokens
        assert result.finish == alone.finish
        if request.grammar is GRAMMAR:
            assert result.text.encode() in TEXTS


def test_a_grammar_of_a_large_vocabulary_writes_what_it_describes(model):
    import lookahead_jax as lk

    embedded = lk.load(lk.EMBEDDED_MODEL)
    grammar = lk.Grammar.lark('start: "answer: " /[a-z]+/ ("," /[0-9]{2}/)?')
    out = lk.generate(
        embedded, ["def f(x):"], grammar=grammar, max_new_tokens=24, budget=32,
        sampling=Sampling(temperature=1.0),
    )  # fmt: skip
    assert out.text is not None
    assert out.text[0].startswith("answer: ")


WRONG = [
    ({"properties": {"a": {"items": {"not": {}}}}}, r"^properties\.a\.items: .*not"),
    ({"anyOf": [{"type": "string"}, {"type": "foo"}]}, r"^anyOf\.1: .*foo"),
    ({"$defs": {"x": {"if": {}}}, "properties": {"b": {"$ref": "#/$defs/x"}}}, r"^\$defs\.x: .*if"),
    ({"uniqueItems": True, "type": "array"}, "^Unimpl.*uniqueItems"),
    ({"properties": {"a": {"type": "string", "pattern": "(?=a)b"}}}, r"^properties\.a: .*look"),
    ({"type": "object", "enum": []}, "nsatisfiable"),
    ({"$ref": "#"}, "^no text follows"),
    ({"type": "string", "pattern": "(" * 2000}, r"^regex parse error.{10,600}$"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "message"), WRONG)
def test_a_wrong_schema_is_named_with_its_place(model, schema, message):
    with pytest.raises(GrammarError, match=message):
        compiled(model, Grammar.json_schema(schema))


def test_what_is_no_grammar_is_refused(model):
    deep: dict = {"type": "integer"}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    wide = {"enum": ["x" * 100 + str(i) for i in range(MAX_GRAMMAR_BYTES // 100)]}
    cases = [
        (Grammar.json_schema("{"), "not a JSON schema"),
        (Grammar.json_schema("[1]"), "not a JSON schema"),
        (Grammar.json_schema(deep), "recursion"),
        (Grammar.json_schema(wide), "bytes, more than"),
        (Grammar.regex("(a"), "regex"),
        (Grammar.lark("start: other"), "other"),
    ]
    for grammar, message in cases:
        with pytest.raises(GrammarError, match=message):
            compiled(model, grammar)
    with pytest.raises(ValueError, match="end token"):
        compiled(model, ends=())
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        GRAMMAR.compile(None, vocab_size=258, end_ids=(END,))


def test_an_engine_refuses_a_wrong_grammar_when_it_is_submitted(model):
    engine = Engine(
        model, policy=POLICY, budget=BUDGET, rows=1, max_new_tokens=4, max_prompt_tokens=16
    )
    request = Request(prompt="a", max_new_tokens=4, grammar=Grammar.regex("["))
    with pytest.raises(RequestError, match="regex") as caught:
        engine.submit(request)
    assert caught.value.field == "grammar"
    assert engine.alive == 0


def test_a_grammar_that_gets_stuck_ends_its_own_request(model):
    """No token spells the letter that must follow: the row fails, its neighbour does not."""
    stuck = Grammar.regex("ab")
    b = ids(model, b"b")[0]
    engine = Engine(
        model, policy=POLICY, budget=BUDGET, rows=2, max_new_tokens=4, max_prompt_tokens=16
    )
    ended, other = engine.run(
        [
            Request(prompt="a", max_new_tokens=4, grammar=stuck, stop_token_ids=[b]),
            Request(prompt="a", max_new_tokens=4, eos_ids=()),
        ]
    )
    assert ended.finish == "error"
    assert "none of the model's tokens" in ended.error
    assert ended.tokens == ids(model, b"a")
    assert other.finish == "length"


def test_a_draft_that_is_too_much_work_ends_the_draft_alone(model):
    """The object has too many rules in one place; the output never goes there."""
    optional = {f"p{i}": {"type": "string"} for i in range(1500)}
    large = {"type": "object", "properties": optional, "additionalProperties": False}
    schema = {"anyOf": [{"enum": ["ok", "no"]}, large]}
    row = compiled(model, Grammar.json_schema(schema)).begin()
    quote, brace, letter = (model.tokenizer.encode(text)[0] for text in '"{o')
    tokens, parents = np.asarray([0, brace, quote, letter]), np.asarray([-1, 0, 0, 2])
    allowed, stays = row.masks(tokens, parents)
    assert stays.tolist() == [True, False, True, True]
    assert (allowed[1] == 0xFFFFFFFF).all()
    row.observe([quote, letter])
    np.testing.assert_array_equal(row.mask(), allowed[3])
    row.observe(model.tokenizer.encode('k"'))
    assert flags(row.mask()).nonzero()[0].tolist() == [END]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"patternProperties": {f"^x{i}$": {} for i in range(65)}}, "65 patterns"),
        ({"type": "integer", "multipleOf": 1_000_003}, "multipleOf: the least common multiple"),
        ({"allOf": [{"multipleOf": p} for p in (7, 11, 13, 17)]}, "multipleOf: the least common"),
        ({"multipleOf": 10**40 + 1}, "multipleOf: the least common multiple"),
        ({"anyOf": [{"type": "string", "pattern": f"a{i}"} for i in range(70)]}, "70 patterns"),
        ({"type": "object", "x-guidance": {"lenient": True}}, "x-guidance is not supported"),
    ],
)
def test_what_would_stall_or_change_the_form_is_refused(model, schema, message):
    with pytest.raises(GrammarError, match=message):
        Grammar.json_schema(schema).check(model.tokenizer)


def test_usual_multiples_are_allowed(model):
    for multiple in (0.01, 5, 10**6, 360, 86_400, 2.5):
        Grammar.json_schema({"type": "number", "multipleOf": multiple}).check(model.tokenizer)
    both = {"allOf": [{"type": "number", "multipleOf": m} for m in (0.01, 7, 1000)]}
    Grammar.json_schema(both).check(model.tokenizer)
