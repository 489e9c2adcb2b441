"""ROUGE-L of whole texts, as two packages define it; they differ.

`rouge_l` is that of the package `rouge` 1.0.1, which LongBench uses: sentences end at full stops,
words are what spaces separate, and the words of all common subsequences are counted as a set.
`rouge_lsum` is that of `rouge-score` without stemming, which InfiniteBench uses: sentences are
lines, and no occurrence of a word counts twice.
"""

import re
from collections import Counter

import numpy as np


def lcs_table(a: list[str], b: list[str]) -> np.ndarray:
    """Lengths of the longest common subsequence of all beginnings, int32 [len(a)+1, len(b)+1]."""
    ids: dict[str, int] = {}
    left = [ids.setdefault(word, len(ids)) for word in a]
    right = np.array([ids.setdefault(word, len(ids)) for word in b], np.int64)
    table = np.zeros((len(a) + 1, len(b) + 1), np.int32)
    for i, word in enumerate(left):
        step = np.maximum(table[i, 1:], table[i, :-1] + (right == word))
        table[i + 1, 1:] = np.maximum.accumulate(step)
    return table


def _walk(a: list[str], b: list[str], up_on_tie: bool) -> list[int]:
    """Indices into `a` of one longest common subsequence; ties decide which."""
    table = lcs_table(a, b)
    i, j, taken = len(a), len(b), []
    while i > 0 and j > 0:
        above, left = table[i - 1, j], table[i, j - 1]
        if a[i - 1] == b[j - 1]:
            taken.append(i - 1)
            i, j = i - 1, j - 1
        elif above > left or (up_on_tie and above == left):
            i -= 1
        else:
            j -= 1
    return taken


def rouge_l(prediction: str, answer: str) -> float:
    """The f of `rouge.Rouge().get_scores(..., avg=True)["rouge-l"]`; 0 where that one raises.

    The original recurses once per word of a sentence pair and, beyond Python's limit, raises,
    which LongBench scores 0; here such sentences get their score.
    """
    theirs, ours = (
        [" ".join(s.split()) for s in text.split(".") if s] for text in (prediction, answer)
    )
    if not theirs or not ours or not prediction or not answer:
        return 0.0
    hypotheses = [sentence.split(" ") for sentence in theirs]
    references = [sentence.split(" ") for sentence in ours]
    common: set[str] = set()
    for reference in references:
        for hypothesis in hypotheses:
            common.update(reference[i] for i in _walk(reference, hypothesis, up_on_tie=False))
    recall = len(common) / len({word for words in references for word in words})
    precision = len(common) / len({word for words in hypotheses for word in words})
    return 2.0 * (precision * recall / (precision + recall + 1e-8))


def rouge_lsum(prediction: str, answer: str) -> float:
    """The f-measure rougeLsum of `rouge_score` with `use_stemmer=False`."""
    hypotheses, references = (
        [re.findall(r"[a-z0-9]+", line.lower()) for line in text.split("\n") if line]
        for text in (prediction, answer)
    )
    left = Counter(word for words in hypotheses for word in words)
    right = Counter(word for words in references for word in words)
    total = left.total(), right.total()
    if not all(total):
        return 0.0
    hits = 0
    for reference in references:
        union = {i for words in hypotheses for i in _walk(reference, words, up_on_tie=True)}
        for word in (reference[i] for i in sorted(union)):
            if left[word] > 0 and right[word] > 0:
                hits += 1
                left[word] -= 1
                right[word] -= 1
    precision, recall = hits / total[0], hits / total[1]
    return 2 * precision * recall / (precision + recall) if hits else 0.0
