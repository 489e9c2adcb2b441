"""Searches with a drafter: the texts and the limits on work of the same search without one."""

from typing import Any

import numpy as np
import pytest

from lookahead_jax.checkpoints.load import load
from lookahead_jax.cli.main import main
from lookahead_jax.decoding.host_drafter import Draft
from lookahead_jax.decoding.row_error import RowError
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.strategies.drafted_rows import _exhausted
from lookahead_jax.strategies.registry import make_strategy
from lookahead_jax.strategies.search import search
from tests import tiny

PROMPTS = ["abc def", "hello hello world"]
ROWS, NEW = 3, 12
NEVER = (9999,)  # no token; the programs are those of a search with an end token
SAMPLING = Sampling(temperature=0.8, repetition_penalty=1.2)  # a penalty reads the text so far


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    tiny.save_chat_model(folder)
    return load(folder)


def reward(prompt: str, text: str) -> float:
    return (sum(ord(c) * (i + 1) for i, c in enumerate(prompt[:1] + text)) * 7919 % 1009) / 1009


def found(model, name, prompts=tuple(PROMPTS), seeds=(5, 6), n=ROWS, strategy=(), **options):
    settings: dict[str, Any] = dict(
        policy=make_policy("full"), max_new_tokens=NEW, eos_ids=NEVER, sampling=SAMPLING,
        reward=None if name in ("first_finish", "self_consistency") else reward,
    )  # fmt: skip
    made = make_strategy(name, n=n, **dict(strategy))
    return search(model, list(prompts), strategy=made, seeds=list(seeds), **settings | options)


def texts(result):
    return [[(c.tokens, c.text, c.finish, c.score) for c in row] for row in result.candidates]


def spent(result) -> np.ndarray:
    """Tokens and forwards [2] of each prompt."""
    return np.array([[work.tokens, work.forwards] for work in result.work], np.int64)


@pytest.fixture(scope="module")
def whole(model):
    return found(model, "best_of_n")


class Recall:
    """A host drafter that knows whole texts, and proposes what followed the same beginning."""

    def __init__(self):
        self.known: set[tuple[int, ...]] = set()
        self.open: dict[int, list[int]] = {}
        self.fails = False

    def begin(self, request, prompt):
        self.open[request] = list(prompt)

    def observe(self, request, tokens):
        self.open[request] += tokens

    def propose(self, request, nodes, depth):
        if self.fails:
            raise RuntimeError("out of order")
        text = tuple(self.open[request])
        whole = max((k for k in self.known if k[: len(text)] == text), key=len, default=())
        chain = np.array(whole[len(text) :][: min(nodes, depth)], np.int32)
        return Draft(chain, np.arange(len(chain), dtype=np.int32) - 1)

    def end(self, request):
        self.known.add(tuple(self.open.pop(request)))


@pytest.fixture(scope="module")
def recall(model):
    """It has seen the samples of all seeds below."""
    drafter = Recall()
    found(model, "best_of_n", drafter=drafter, draft_nodes=8)
    return drafter


def pieces(model, whole) -> dict[str, Any]:
    """A step, a stop string and an end token that occur inside of some texts, not of all."""
    letters = [c for row in whole.candidates for x in row for c in set(str(x.text)[1:-3])]
    step = max(sorted(set(letters)), key=letters.count)
    text = str(whole.candidates[0][1].text)
    samples = [[c.tokens for c in row] for row in whole.candidates]

    def first(token):  # where each prompt's first sample ends
        return [min([*row, token].index(token) for row in group) for group in samples]

    tokens = {v for group in samples for row in group for v in row}
    eos = max(sorted(v for v in tokens if min(first(v)) < NEW - 2), key=lambda v: sum(first(v)))
    return dict(step=step, stop=[text[4:6]], eos=(eos,))


@pytest.mark.parametrize(
    ("name", "ends", "kind"),
    [
        ("best_of_n", "stop", "recall"),
        ("first_finish", "eos", "recall"),
        ("particles", "eos", "recall"),
        ("particles", "stop", "prompt_lookup"),
    ],
)
def test_texts_and_tokens_are_those_without_a_drafter(model, whole, recall, name, ends, kind):
    inside = pieces(model, whole)
    options: dict[str, Any] = dict(
        stop=inside["stop"] if ends == "stop" else (),
        eos_ids=inside["eos"] if ends == "eos" else NEVER,
    )
    if "particles" in name:
        options["strategy"] = dict(step=inside["step"], max_steps=5)
    plain = found(model, name, **options)
    drafter = recall if kind == "recall" else kind
    drafted = found(model, name, drafter=drafter, draft_nodes=8, **options)
    assert texts(drafted) == texts(plain) != texts(whole)
    assert drafted.chosen == plain.chosen
    assert spent(drafted)[:, 0].tolist() == spent(plain)[:, 0].tolist()
    assert not recall.open
    saved = spent(plain)[:, 1] - spent(drafted)[:, 1]
    assert saved.min() >= 0
    assert kind != "recall" or saved.max() > 0
    # The order of the prompts changes nothing.
    turned = found(model, name, PROMPTS[::-1], (6, 5), drafter=drafter, draft_nodes=8, **options)
    assert texts(turned) == texts(plain)[::-1]


@pytest.mark.parametrize("name", ["best_of_n", "first_finish", "particles"])
def test_limits_on_tokens_end_rows_at_the_same_token(model, whole, recall, name):
    inside = pieces(model, whole)
    options: dict[str, Any] = dict(eos_ids=inside["eos"])
    if name == "particles":
        options["strategy"] = dict(step=inside["step"], max_steps=5)
    for most in (ROWS, 3 * ROWS + 1, 7 * ROWS + 2):
        plain = found(model, name, most_tokens=most, **options)
        drafted = found(model, name, most_tokens=most, drafter=recall, draft_nodes=8, **options)
        assert texts(drafted) == texts(plain)
        assert spent(drafted)[:, 0].tolist() == spent(plain)[:, 0].tolist()
        assert spent(drafted)[:, 0].max() <= most


def test_a_limit_on_forwards_is_kept(model, whole, recall):
    for forwards in (1, 2):
        result = found(model, "best_of_n", most_forwards=forwards, most_tokens=30,
                       drafter=recall, draft_nodes=8)  # fmt: skip
        for work, mine, full in zip(result.work, result.candidates, whole.candidates, strict=True):
            assert work.forwards == forwards
            assert work.tokens == sum(len(c.tokens) for c in mine) <= 30
            for cut, text in zip(mine, full, strict=True):
                assert cut.tokens == text.tokens[: len(cut.tokens)]
        assert max(len(c.tokens) for row in result.candidates for c in row) > 1 + forwards


def test_affordable_tokens_are_counted_row_by_row():
    rng = np.random.default_rng(0)
    for _ in range(200):
        new, finished = rng.integers(0, 6, 3), rng.random(3) < 0.5
        left, spent, ends = int(rng.integers(0, 20)), 0, []
        for tokens in range(new.max() + 1):
            active = int((~finished | (new > tokens)).sum())
            if left - spent < active:
                ends = [tokens]
                break
            spent += int((new > tokens).sum())
        assert _exhausted(new, finished, left) == ends


@pytest.mark.parametrize(
    ("strategy", "drafter", "complaint"),
    [
        ("beam", "prompt_lookup", "Beam looks at every token before the next: leave drafter out"),
        ("cautious", "prompt_lookup", "Cautious looks at every token"),
        ("first_finish", "early_exit", "the rows of a search share their prompt"),
        ("first_finish", "drawn_model", "DrawnModel emits other tokens than a search without it"),
    ],
)
def test_drafters_that_cannot_help_are_refused(model, strategy, drafter, complaint):
    made = make_drafter(drafter, **({"model": model} if drafter == "drawn_model" else {}))
    with pytest.raises(ValueError, match=complaint):
        search(model, PROMPTS, strategy=strategy, drafter=made, max_new_tokens=NEW)
    with pytest.raises(ValueError, match="draft_nodes must be 1"):
        search(model, PROMPTS, strategy="beam", draft_nodes=8)


def test_a_failure_ends_the_requests_of_the_drafter(model):
    drafter = Recall()

    def judge(prompt, text):
        raise RuntimeError("no opinion")

    with pytest.raises(RuntimeError, match="no opinion"):
        found(model, "best_of_n", reward=judge, drafter=drafter, draft_nodes=8)
    assert not drafter.open
    drafter.fails = True
    with pytest.raises(RowError, match="out of order"):
        found(model, "best_of_n", drafter=drafter, draft_nodes=8)
    assert not drafter.open


def test_the_command_line_passes_the_drafter(model, monkeypatch):
    given = {}

    def remember(model, **arguments):
        given.update(arguments)
        raise ValueError("enough")

    monkeypatch.setattr("lookahead_jax.search", remember, raising=False)
    args = ["generate", "--model", str(model.path), "--prompt", "a", "--strategy", "first_finish"]
    assert main([*args, "--drafter", "prompt_lookup", "--draft-nodes", "8"]) == 1
    assert (given["drafter"], given["draft_nodes"]) == (make_drafter("prompt_lookup"), 8)
