"""The drafter with another tokenizer, against restatements in plain Python."""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.drafters._draft_text import DraftText
from lookahead_jax.drafters._vocabulary_map import LONGEST, VocabularyMap
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.model.decoder import Block, embed, forward, logits
from tests import tiny
from tests.drafted import NO_DEFAULTS

BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
TEXT = (
    "def total(values):\n    return sum(values)  # Größe in €, 中文 🙂🙂\n"
    "print(total([123, 4567]))\n"
)
# Few tokens in common; the euro sign is two tokens of the one and one of the other.
DRAFT = tiny.byte_pair(
    BYTES, ["return", " va", "lues", "Gr", "€", "1234", "中", " su", "ota"], ["<end>"]
)
TARGET = tiny.byte_pair(
    BYTES[::-1],
    [" return", " values", "def", "pr", "öß", "中文", "12", "🙂", "tot", "al"],
    ["<end>"],
)


def vocabularies(capacity: int = 100) -> VocabularyMap:
    return VocabularyMap(DRAFT, TARGET, DRAFT.vocab_size, capacity=capacity)


def test_a_text_comes_back_when_its_draft_tokens_are_translated():
    """Each split of the text, inside characters too: what is said to begin is what is missing."""
    mapped, ids = vocabularies(), DRAFT.encode(TEXT)
    data, ends = TEXT.encode(), list(itertools.accumulate(len(mapped.texts[i]) for i in ids))
    for at, begun in itertools.product(range(len(ids)), range(3)):
        begin = (ends[at - 1] if at else 0) + begun
        if begin > ends[at]:
            continue
        spelled = b"".join(mapped.target_texts[t] for t in mapped.translate(ids[at:], begun))
        assert spelled == data[begin:]


def test_tokens_of_equal_text_map_directly():
    mapped = vocabularies()
    of_text = {TARGET.token_bytes(i): i for i in range(TARGET.vocab_size)}
    for token in range(DRAFT.vocab_size):
        assert mapped.direct[token] == of_text.get(DRAFT.token_bytes(token), -1)
    end, hidden = DRAFT.token_id("<end>"), DRAFT.token_id("return")
    assert mapped.translate([end]) == [TARGET.token_id("<end>")]
    assert mapped.translate([hidden]) == TARGET.encode("return")
    assert mapped.translate(DRAFT.encode("€")) == TARGET.encode("€")
    assert (len(DRAFT.encode("€")), len(TARGET.encode("€"))) == (1, 3)
    assert mapped.translate(DRAFT.encode("🙂")) == TARGET.encode("🙂")
    assert (len(DRAFT.encode("🙂")), len(TARGET.encode("🙂"))) == (4, 1)


def runs(draft: list[int], target: list[int]) -> list[tuple[list[int], list[int]]]:
    """Both texts cut wherever both have a token boundary."""

    def cuts(tokenizer, ids):
        return [0, *itertools.accumulate(len(tokenizer.token_bytes(i)) for i in ids)]

    a, b = cuts(DRAFT, draft), cuts(TARGET, target)
    return [
        (draft[a.index(begin) : a.index(end)], target[b.index(begin) : b.index(end)])
        for begin, end in itertools.pairwise(sorted(set(a) & set(b)))
    ]


def test_ngrams_are_learned_where_the_tokenizers_differ():
    """Token by token: the draft tokens are those of the whole text, and it is then translated."""
    mapped, target = vocabularies(), TARGET.encode(TEXT)
    text = DraftText(DRAFT, mapped, [])
    for end, token in enumerate(target, 1):
        text.append([token])
        text.read()
        read = b"".join(mapped.target_texts[i] for i in target[:end])
        whole = read.decode(errors="ignore")
        assert text.ids == DRAFT.encode(whole)
        assert whole.encode() + text.unread == read
    *settled, _ = text.ids
    both = runs(settled, target)
    for draft, spelled in both:
        assert mapped.translate(draft) == spelled
    assert mapped.translate(settled) == target[: sum(len(spelled) for _, spelled in both)]
    unlearned = [run for run in both if vocabularies().translate(run[0]) != run[1]]
    assert {(len(draft), len(spelled)) for draft, spelled in unlearned} >= {(2, 1), (3, 2)}


def test_the_ngram_seen_least_recently_is_dropped():
    mapped = vocabularies(capacity=2)
    for draft in ((5, 6), (6, 7), (5, 6), (7, 8), (1,) * (LONGEST + 1)):
        mapped.learn(draft, (300,))
    assert len(mapped) == 2
    assert mapped.translate([5, 6, 7, 8]) == [300, 300]
    usual = mapped.direct.tolist()
    assert mapped.translate([6, 7]) == usual[6:8]
    mapped.learn((5,), (301,))  # seen to be spelled otherwise, then as usual
    assert mapped.translate([5]) == [301]
    mapped.learn((5,), (usual[5],))
    assert mapped.translate([5]) == usual[5:6]


def model_of(tokenizer: Tokenizer, seed: int = 0, **overrides) -> Model:
    config = tiny.config(vocab_size=tokenizer.vocab_size, num_hidden_layers=1, **overrides)
    return Model(
        params=tiny.params(config, seed), config=config, tokenizer=tokenizer,
        generation=NO_DEFAULTS, path=Path("draft"),
    )  # fmt: skip


MODEL = model_of(DRAFT)


SIZE = 256  # tokens that the draft model sees at most


@jax.jit
def scores_after(ids: jax.Array, size: jax.Array) -> jax.Array:
    """The logits behind the first `size` of the ids [SIZE], without a cache."""
    at = jnp.arange(SIZE, dtype=jnp.int32)
    positions = jnp.where(at < size, at, -1)[None]
    x = embed(MODEL.params, ids[None], config=MODEL.config)
    block = Block(x, positions, jnp.full(1, SIZE, jnp.int32))
    hidden = forward(MODEL.params, block, None, config=MODEL.config).hidden[:, size - 1][:, None]
    return logits(MODEL.params, hidden, config=MODEL.config)[0, 0]


def expected(drafter, request, steps: int) -> list[int]:
    """The greedy continuation of what it has read, in target tokens."""
    ids, begun = drafter._opening(drafter._requests[request].text)
    texts = [DRAFT.token_bytes(i) for i in range(DRAFT.vocab_size)]
    shared = {TARGET.token_bytes(i) for i in range(TARGET.vocab_size)}
    chain = []
    for _ in range(steps):
        padded = np.zeros(SIZE, np.int32)
        padded[: len(ids) + len(chain)] = ids + chain
        scores = np.asarray(scores_after(jnp.asarray(padded), jnp.int32(len(ids) + len(chain))))
        if begun and not chain:
            allowed = [t == begun or (t.startswith(begun) and t not in shared) for t in texts]
            scores = np.where(allowed, scores, -np.inf)
        chain.append(int(scores.argmax()))
    return drafter._map.translate(chain, len(begun))


def test_proposals_are_the_greedy_continuation_whatever_was_accepted():
    """Of one drafter that goes back again and again, and of new ones that read the text at once."""
    made = dict(model=MODEL, tokenizer=TARGET, tokens=4, least=1e-30, window=SIZE)
    drafter, rest = make_drafter("other_vocabulary", **made), iter(TARGET.encode(TEXT * 4))
    fresh = make_drafter("other_vocabulary", **made)
    text = list(itertools.islice(rest, 7))
    drafter.begin(0, text)
    lagging = kept = 0
    for turn, size in enumerate([1, 1, 2, 1, 3, 1, 40, 1, 2, 1, 1, 5] * 2):
        draft = drafter.propose(0, 16, 16)
        assert draft.tokens.tolist() == expected(drafter, 0, 4)
        assert draft.parents.tolist() == list(range(-1, len(draft.tokens) - 1))
        fresh.begin(turn, text)
        assert fresh.propose(turn, 16, 16).tokens.tolist() == expected(fresh, turn, 4)
        fresh.end(turn)
        begun = drafter._opening(drafter._requests[0].text)[1]
        lagging += bool(begun)
        accepted = draft.tokens.tolist()[: size % 4] if turn % 3 else []
        kept += len(accepted)
        new = [*accepted, *itertools.islice(rest, size)]
        drafter.observe(0, new)
        text += new
    assert lagging > 3
    assert kept > 5
    drafter.end(0)
    with pytest.raises(ValueError, match="has not begun"):
        drafter.propose(0, 4, 4)


def test_a_text_beyond_the_window_goes_on_with_its_end():
    drafter = make_drafter("other_vocabulary", model=MODEL, tokenizer=TARGET, tokens=4, window=SIZE)
    target = TARGET.encode(TEXT * 4)
    drafter.begin(0, target)
    state = drafter._requests[0]
    for _ in range(3):
        drafter.propose(0, 4, 4)
        ids, _ = drafter._opening(state.text)
        seen = ids[state.first :]
        assert SIZE // 2 <= len(seen) <= SIZE - 4
        assert state.cached[: len(seen)] == seen
        assert np.asarray(state.cache.next_pos)[0] <= SIZE
        drafter.observe(0, target[:60])


def test_what_it_needs_is_named():
    with pytest.raises(ValueError, match=r"needs the tokenizer of the model that it.*tokenizer="):
        make_drafter("other_vocabulary", model=MODEL)
    with pytest.raises(ValueError, match=r"the draft model draft has no tokenizer.json"):
        without = dataclasses.replace(MODEL, tokenizer=None)
        make_drafter("other_vocabulary", model=without, tokenizer=TARGET)
    with pytest.raises(ValueError, match=r"the target has no tokenizer.json.*draft_model"):
        make_drafter("other_vocabulary", model=MODEL, tokenizer=None)
    for wrong in ({"tokens": 0}, {"least": 0.0}, {"window": 100}, {"capacity": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            make_drafter("other_vocabulary", model=MODEL, tokenizer=TARGET, **wrong)


def test_a_prompt_teaches_other_requests_nothing():
    mapped, target = vocabularies(), TARGET.encode(TEXT)
    text = DraftText(DRAFT, mapped, target)
    spelled = [list(draft) for draft, _ in runs(text.ids[:-1], target)]

    def learned():
        return any(mapped.translate(d) != vocabularies().translate(d) for d in spelled)

    assert not learned()
    text.append(target)  # the same, as output
    text.read()
    assert learned()
