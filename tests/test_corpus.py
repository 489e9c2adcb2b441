"""The corpus: near-duplicates are found by content, the split respects them, text survives."""

import re

import numpy as np

from lookahead_jax import EMBEDDED_MODEL
from lookahead_jax.train.embedded import base, card, task_prompts
from lookahead_jax.train.embedded.corpus import (
    BOS,
    EOS,
    Document,
    encode,
    near_duplicates,
    shingles,
    split,
    train_tokenizer,
)


def text_of(seed: int, lines: int = 60) -> str:
    numbers = np.random.default_rng(seed).integers(0, 10**6, (lines, 2))
    return "".join(f"def f_{a}(x):\n    return x + {b}\n" for a, b in numbers)


def edited(text: str) -> str:
    lines = text.splitlines()
    lines[5:8] = ["changed = True"]
    return "\n".join([*lines, "appended = 1", ""])


def test_an_edited_copy_joins_its_original_and_nothing_else():
    texts = [text_of(0), text_of(1), edited(text_of(0)), text_of(2)]
    labels = near_duplicates([shingles(t) for t in texts], seed=0)
    assert labels.tolist() == [0, 1, 0, 3]


def test_shingles_ignore_indentation_and_blank_lines():
    text = text_of(3)
    moved = "\n\n".join("    " + line for line in text.splitlines())
    np.testing.assert_array_equal(shingles(text), shingles(moved))
    assert shingles("").shape == (1,)


def test_split_is_by_cluster_deterministic_and_drops_pasted_files():
    originals = [Document("a", f"{i}.py", text_of(i)) for i in range(40)]
    copies = [Document("b", f"copy{i}.py", edited(d.text)) for i, d in enumerate(originals)]
    train, held = split([*originals, *copies], holdout=0.3, seed=0)
    assert {d.source for d in train + held} == {"a"}
    assert len(train) + len(held) == 40
    assert 3 <= len(held) <= 25
    again = split([*originals, *copies], holdout=0.3, seed=0)
    assert again == (train, held)
    pasted = Document("c", "pasted.py", held[0].text + text_of(99, lines=600))
    with_paste, still_held = split([*originals, pasted], holdout=0.3, seed=0)
    assert not (held[0] in still_held and pasted in with_paste)


def test_tokenizer_is_lossless_and_keeps_digits_single():
    tokenizer = train_tokenizer([text_of(i) for i in range(5)], 400)
    text = "def f_12(x):\n\treturn 'naïve' + 345\n"
    ids = tokenizer.encode(text).ids
    assert ids[0] == tokenizer.token_to_id(BOS)
    assert tokenizer.decode(ids) == text
    assert all(sum(c.isdigit() for c in t) <= 1 for t in tokenizer.get_vocab())
    stream = encode(tokenizer, [Document("a", "a.py", text)] * 2)
    assert stream.dtype == np.uint16
    ends = np.flatnonzero(stream == tokenizer.token_to_id(EOS))
    assert ends.tolist() == [len(ids), 2 * len(ids) + 1]


def test_the_commands_of_the_embedded_model_fail_in_one_line(tmp_path, capsys):
    given = ["--corpus", str(tmp_path), "--out", str(tmp_path / "out")]
    for main, args in ((base.main, given), (task_prompts.main, given)):
        assert main(args) == 1
        line = capsys.readouterr().err
        assert line.endswith(f"error: {tmp_path} is not a corpus: it has no tokenizer.json\n")
        assert main([*args, "--colour", "red"]) == 2
        assert "--colour" in capsys.readouterr().err


def test_the_card_that_ships_has_the_text_of_the_template():
    shipped = (EMBEDDED_MODEL / "README.md").read_text("utf-8")
    for piece in re.split(r"\{\{\w+\}\}", card.CARD):
        assert piece in shipped
