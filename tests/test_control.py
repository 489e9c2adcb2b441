"""Strategies that control thinking, against restatements that read every text from its start."""

import dataclasses
import json
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.checkpoints.load import load
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.cli.main import main
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.generation.output_text import OutputRow, StreamingDecoder
from lookahead_jax.prefilling.prefill import extend
from lookahead_jax.strategies import verifier as verifiers
from lookahead_jax.strategies.registry import make_strategy
from lookahead_jax.strategies.subtasks import Subtasks, _Thread
from lookahead_jax.strategies.trimr import TrimR, last_sentences
from tests import tiny
from tests.test_arbitrage import reader
from tests.test_strategies import PROMPTS, found, ids, log_softmax, reward

NEW = 24
LONG = 145  # the row's limit in all searches, so that they share their programs
SEEDS = [3, 5]
VISIBLE = 94  # ids below it are one character each
# The tiny model repeats its last token at lower temperatures.
HOT = Sampling(temperature=3.0, logit_bias={v: -100.0 for v in range(VISIBLE, 258)})
NEVER = (999,)  # no token has this id
OPENS, CLOSES = "[!-@]", "[a-z]"  # marks that a random text has


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One token per byte, and it writes visible characters only."""
    folder = tmp_path_factory.mktemp("bytes")
    tiny.save_chat_model(folder, num_hidden_layers=2)
    return load(folder)


@pytest.fixture(scope="module")
def read(model):
    return reader(model)


def draw(model, read, prompt, text, seed):
    """The next character: Gumbel-max with the noise of (seed, position)."""
    tokens = (*prompt, *model.tokenizer.encode(text))
    scores = read(tokens)[0]
    key = jax.random.fold_in(jax.random.key(np.uint32(seed)), len(tokens))
    noise = np.asarray(jax.random.gumbel(key, scores.shape, np.float32))
    best = np.argmax((scores / HOT.temperature + noise)[:VISIBLE])
    return model.tokenizer.decode([int(best)])


def searched(model, strategy, **options):
    settings = dict(sampling=HOT, seeds=SEEDS, max_new_tokens=LONG, most_tokens=NEW, eos_ids=NEVER)
    return found(model, strategy, **{**settings, **options})


def texts(result) -> list[str]:
    return [*map(str, result.text)]


# ---- TrimR --------------------------------------------------------------------------------------


def judge(prompt: str, answer: str, earlier: str | None) -> float:
    """A probability that differs from text to text."""
    return reward(prompt, answer + (earlier or ""))


def trimr(model, read, prompt, seed, rule, verify):
    """One text, the additions to it, and what it has cost."""
    start, text, additions, forwards = ids(model, prompt), "", [], -1
    begin, thoughts, agreed, answer, new = 0, 0, 0, None, 0
    watches = ["thoughts", "loops"]
    while len(text) < NEW:
        text += draw(model, read, start, text, seed)
        forwards, new = forwards + 1, new + 1
        addition = None
        if watches and rule.end in text:
            watches = []
        size, windows = rule.loop_tokens, []
        for n in range(len(text) - new + 1, len(text) + 1):
            now = text[max(n - size, 0) : n]
            windows.append(len(now) == size and sum(text.startswith(now, i) for i in range(n)))
        new = 0
        if "thoughts" in watches and re.match(rule.pattern, text[-1]):
            thought, begin, thoughts = text[begin:-1], len(text) - 1, thoughts + 1
            if len(thought.split()) >= rule.shortest and verify(prompt, thought, None) > 0.5:
                same = answer is not None and verify(prompt, thought, answer) > 0.5
                agreed, answer = agreed + 1 if same else 0, thought
                if agreed >= rule.agreements:
                    addition, watches = rule.mild, ["loops"]
            if not addition and thoughts >= rule.thoughts and len(text) >= rule.share * LONG:
                addition, watches = rule.forced, []
        if watches and max(windows) >= rule.loops:
            addition, watches = rule.forced, []
        if addition is not None and len(text) + len(addition) < NEW:
            text, forwards, new = text + addition, forwards + 1, len(addition)
            additions.append(addition)
    return text, additions, (len(text), forwards)


NO_LOOPS = dict(loop_tokens=NEW)
RULES = {
    "converged": dict(pattern="[A-Z]", agreements=1, shortest=0, thoughts=NEW, **NO_LOOPS),
    "lost": dict(pattern="[A-Z]", agreements=NEW, shortest=0, thoughts=3, share=0.05, **NO_LOOPS),
    "circles": dict(pattern="[A-Z]", shortest=NEW, thoughts=NEW, loop_tokens=2, loops=2),
}


@pytest.mark.parametrize("name", RULES)
def test_trimr_restated(model, read, name):
    rule = TrimR(mild="=>", forced="@#>", end="#>", **RULES[name])
    result = searched(model, rule, verifier=judge)
    added = []
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        text, additions, work = trimr(model, read, prompt, seed, rule, judge)
        assert texts(result)[i] == text
        assert (result.work[i].tokens, result.work[i].forwards) == work
        added += additions
    expected = rule.mild if name == "converged" else rule.forced
    assert expected in added
    other = searched(model, rule, prompts=PROMPTS[::-1], seeds=SEEDS[::-1], verifier=judge)
    assert (texts(other), other.work) == (texts(result)[::-1], result.work[::-1])


def test_additions_count_as_work(model):
    rule = TrimR(mild="=>", forced="@#>", **RULES["converged"])
    for most in (1, 9):
        few = searched(model, rule, verifier=judge, most_tokens=most)
        assert [work.tokens for work in few.work] == [most] * 2
        few = searched(model, rule, verifier=judge, most_forwards=most)
        assert [work.forwards for work in few.work] == [most] * 2


def test_the_verifier_reads_the_last_sentences():
    text = "\n\nWait, no. It is 4! Is it? Yes:\nx = 4.\n"
    assert [last_sentences(text, n) for n in (1, 2, 4, 9)] == [
        "x = 4.", "Yes:\nx = 4.", "It is 4! Is it? Yes:\nx = 4.", text.strip(),
    ]  # fmt: skip


def test_a_model_verifies_by_yes_against_no(model, read):
    verify = lk.model_verifier(model)
    for earlier, form in ((None, verifiers._ANSWERS), ("5", verifiers._AGREES)):
        question = form.format(prompt="2+2?", answer="It is {4}.", earlier=earlier)
        assert all(given in question for given in ("2+2?", "{4}", earlier or ""))
        tokens = model.tokenizer.encode_chat([{"role": "user", "content": question}])
        p = np.exp(log_softmax(read(tuple(tokens))[0]))
        yes, no = (p[model.tokenizer.encode(letter)[0]] for letter in "YN")
        chance = verify("2+2?", "It is {4}.", earlier)
        np.testing.assert_allclose(chance, yes / (yes + no), rtol=1e-3)  # float32 logits
    rule = TrimR(mild="=>", forced="@#>", **RULES["converged"])
    assert searched(model, rule) == searched(model, rule, verifier=verify)


# ---- subtasks -----------------------------------------------------------------------------------


def finished(text, rule):
    """The insides of finished subtasks in a text of one-letter marks, in their order."""
    free, spans = [], []
    for i, letter in enumerate(text):
        if re.match(rule.opens, letter):
            free.append(i + 1)
        elif re.match(rule.closes, letter) and free:
            spans.append((free.pop(), i))
    return [(begin, end) for begin, end in spans if begin < end]


def thread_of(rule):
    return _Thread(rule, slots=10**6)


class Characters:
    """A tokenizer whose tokens are characters."""

    def special_text(self, token: int) -> str:
        return ""

    def stream(self, *, prompt: Sequence[int] = ()) -> StreamingDecoder:
        return Characters()

    def push(self, token: int) -> str:
        return chr(token)

    def finish(self) -> str:
        return ""


def subtasks(model, read, prompt, seed, rule, length, slots):
    """One text, what is left of it, how often it was pruned, and the forwards."""
    start, text, left = ids(model, prompt), "", []  # left: places in the text
    closed, turn, forwards, noise = [], 0, -1, seed
    while len(text) < length and len(left) <= slots:
        text += draw(model, read, start, "".join(text[i] for i in left), noise)
        left.append(len(text) - 1)
        forwards += 1
        spans = finished(text, rule)
        leaves = spans[: max(len(spans) - rule.keep, 0)]
        gone = {i for begin, end in leaves for i in range(begin, end)}
        if len(spans) > rule.keep and len(spans) > len(closed):
            turn += 1
            noise = int(np.random.default_rng([seed, turn]).integers(2**32, dtype=np.uint32))
            first = min(i for i in [*left, len(text)] if i in gone or i == len(text))
            left = [i for i in left if i not in gone]
            forwards += any(first <= i < len(text) - 1 for i in left)
        closed = spans
    return text, "".join(text[i] for i in left), turn, forwards


@pytest.mark.parametrize("keep", [0, 1])
def test_subtasks_restated(model, read, keep):
    rule = Subtasks(keep=keep, opens=OPENS, closes=CLOSES)
    result = searched(model, rule)
    turns = 0
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        text, _, turn, forwards = subtasks(model, read, prompt, seed, rule, NEW, 128)
        assert texts(result)[i] == text
        assert (result.work[i].tokens, result.work[i].forwards) == (NEW, forwards)
        turns += turn
    assert turns > 1
    other = searched(model, rule, prompts=PROMPTS[::-1], seeds=SEEDS[::-1])
    assert (texts(other), other.work) == (texts(result)[::-1], result.work[::-1])
    few = searched(model, rule, most_forwards=9)
    assert [work.forwards for work in few.work] == [9, 9]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept(Subtasks):
    """Shows the rows at their ends."""

    seen: list = dataclasses.field(default_factory=list)

    def run(self, rows):
        ranked = super().run(rows)
        self.seen.append(rows)
        return ranked


def test_a_text_outgrows_the_slots_and_the_cache_is_that_of_what_is_left(model, read):
    rule = Kept(keep=0, room=100, opens=OPENS, closes=CLOSES)
    result = searched(model, rule, most_tokens=None)
    (rows,) = rule.seen
    state, cache = rows.state, rows.state.cache
    assert cache.slots == 128
    assert [len(tokens) for tokens in result.tokens] == [LONG] * 2
    left = []
    for text in texts(result):
        gone = {i for begin, end in finished(text, rule) for i in range(begin, end)}
        left.append("".join(letter for i, letter in enumerate(text) if i not in gone))
    entries = [len(text) - 1 for text in left]
    assert (np.asarray(cache.length) == np.array(entries)[None, :, None]).all()
    positions = np.array(cache.pos)
    tokens = jnp.full((2, 16), -1).at[:, 0].set(state.token)
    logits = extend(model.params, tokens, cache, config=model.config)[1]
    for i, (prompt, text) in enumerate(zip(PROMPTS, left, strict=True)):
        start = ids(model, prompt)
        expected = np.arange(len(start), len(start) + entries[i])
        assert (positions[:, i, :, : entries[i]] == expected).all()
        fresh = read((*start, *model.tokenizer.encode(text)))[0]
        np.testing.assert_allclose(logits[i], fresh, rtol=1e-4, atol=1e-4)  # float32
    full = searched(model, dataclasses.replace(rule, keep=LONG), most_tokens=None)
    assert [len(tokens) for tokens in full.tokens] == [129] * 2, "128 slots, and one that waits"
    assert full.finish == ["length"] * 2


def test_finished_lists_of_json_leave_in_their_order():
    """Marks in strings and in other arrays do not count; kept tokens are a valid document."""
    task = {"thought": 'a "subtasks": [ ], "conclusion"', "tooluse": {"parameters": ["[x]", "é"]}}
    leaf = {**task, "conclusion": "leaf"}
    inner = {**task, "subtasks": [leaf, leaf], "conclusion": "inner"}
    outer = {**task, "subtasks": [inner, leaf], "conclusion": "outer"}
    whole = {"reasoning": [outer, {**inner, "subtasks": []}, inner], "answer": "é"}
    hollow = {**inner, "subtasks": []}
    lefts = {
        2: [{**outer, "subtasks": [hollow, leaf]}, hollow, inner],
        1: [{**outer, "subtasks": []}, hollow, inner],
        0: [{**outer, "subtasks": []}, hollow, hollow],
    }
    for keep, tasks in lefts.items():
        thread, output = thread_of(Subtasks(keep=keep)), OutputRow(Characters())
        for letter in json.dumps(whole, ensure_ascii=False):
            output.feed([ord(letter)])
            if thread.notices(output):
                thread.prune(output)
        left = "".join(map(chr, thread.kept(output)))
        assert json.loads(left) == {**whole, "reasoning": tasks}


def test_only_tokens_wholly_between_marks_leave():
    tokenizer = Tokenizer.load(lk.EMBEDDED_MODEL)
    assert tokenizer is not None
    text = "a <do> ünner wörk ü<end> b <do>x<end>"
    tokens = tokenizer.encode(text, special=False)
    thread, output = (
        thread_of(Subtasks(keep=0, opens="<do>", closes="ü?<end>")),
        OutputRow(tokenizer),
    )
    for token in tokens:
        output.feed([token])
        if thread.notices(output):
            thread.prune(output)
    left = tokenizer.decode(thread.kept(output))
    assert re.match("a <do>.{0,3}ü<end> b <do>x?<end>$", left)


# ---- the interface ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("trimr", {"agreements": 0}, "agreements=0 is too small: give at least 1"),
        ("trimr", {"loops": 1}, "loops=1 is too small: give at least 2"),
        ("trimr", {"share": 2}, "share=2.0 is not possible: give 0 to 1"),
        ("trimr", {"forced": ""}, "forced is empty: give the text"),
        ("trimr", {"pattern": "("}, "pattern='\\(' is not a regular expression"),
        ("subtasks", {"opens": "("}, "opens='\\(' is not a regular expression"),
        ("subtasks", {"closes": "x*"}, "closes='x\\*' matches the empty text"),
        ("subtasks", {"keep": -1}, "keep=-1 is too small: give at least 0"),
    ],
)
def test_impossible_settings_are_named(name, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_strategy(name, **settings)
    assert make_strategy("trimr", mild=r"\n.") == TrimR(mild="\n.")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"verifier": lambda *texts: 1.5}, "the verifier returned 1.5: it must return a prob"),
        ({"verifier": lambda *texts: np.nan}, "the verifier returned nan: it must return a finite"),
        ({"strategy": "subtasks", "verifier": judge}, "Subtasks asks no verifier: leave verifier"),
        ({"reward": reward}, "TrimR compares no rewards: leave reward out"),
        (
            {"strategy": TrimR(pattern="(?=[!-~])", shortest=0), "verifier": judge},
            "pattern='.*' matches between characters",
        ),
        (
            {"strategy": Subtasks(opens=r"(?=[!-~])", closes="never")},
            "opens='.*' matches between characters",
        ),
    ],
)
def test_what_they_cannot_use_is_refused(model, options, complaint):
    strategy = options.pop("strategy", TrimR(**RULES["converged"]))
    with pytest.raises(ValueError, match=complaint):
        searched(model, strategy, **options)


def test_texts_need_a_tokenizer(model):
    mute = dataclasses.replace(model, tokenizer=None)
    for strategy, options, complaint in (
        ("subtasks", {}, "subtasks are found in text, and this model has no tokenizer.json"),
        ("trimr", {"verifier": judge}, "TrimR reads the thinking, and this model has no"),
        ("trimr", {}, "a verifier reads texts, and .* has no tokenizer.json"),
    ):
        with pytest.raises(ValueError, match=complaint):
            searched(mute, strategy, prompts=[ids(model, p) for p in PROMPTS], **options)


def test_the_command_line_gives_a_verifier(model, tmp_path, capsys, monkeypatch):
    given = {}

    def search(model, **arguments):
        given.update(arguments)
        raise ValueError("searched")

    monkeypatch.setattr(lk, "search", search)
    (tmp_path / "judge.py").write_text("def sure(prompt, answer, earlier):\n    return 1.0\n")
    common = ["generate", "--model", str(model.path), "--prompt", "a", "--policy", "full"]
    verifier = ["--verifier", f"{tmp_path / 'judge.py'}:sure"]
    for arguments, complaint in (
        ([*verifier, "--strategy", "trimr"], "searched"),
        ([*verifier, "--strategy", "beam"], "--strategy beam asks no verifier: leave --verifier"),
        (verifier, "--verifier needs --strategy NAME"),
    ):
        assert main([*common, *arguments]) != 0
        assert complaint in capsys.readouterr().err.replace("\n", " ")
    assert given["verifier"]("", "", None) == 1.0
