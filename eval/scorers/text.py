"""Scores of an answer against the expected ones, equal to those of the published benchmarks.

F1, classification, retrieval, counting and code similarity are LongBench's (THUDM/LongBench,
metrics.py), substring matches RULER's. `tests/fixtures/make_scorers.py` compares them with the
originals.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Score = Callable[[str, str], float]
"""(prediction, right answer) -> score in [0, 1]."""


def best(score: Score, prediction: str, answers: Sequence[str]) -> float:
    """The best score against any of the expected answers; 0 without one."""
    return max((float(score(prediction, answer)) for answer in answers), default=0.0)


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the tokens, as multisets."""
    same = sum((Counter(prediction) & Counter(answer)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return 2 * precision * recall / (precision + recall)


def qa_f1(prediction: str, answer: str) -> float:
    """F1 of normalised words."""
    return token_f1(normalize(prediction).split(), normalize(answer).split())


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / n if the right class is among the n classes that the prediction names.

    A class that is part of the right one's name does not count. (The published loop removes
    from the list it walks over and so may skip a neighbour; that is part of the score.)
    """
    named = [name for name in classes if name in prediction]
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    return 1.0 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str) -> float:
    """Share of the numbers in the prediction that are the right one."""
    numbers = re.findall(r"\d+", prediction)
    return sum(n == str(answer) for n in numbers) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """`count` of the number in "Paragraph 7"."""
    found = re.findall(r"Paragraph (\d+)", answer)
    if not found:
        raise ValueError(f"the answer {answer!r} names no paragraph")
    return count(prediction, found[0])


def code_similarity(prediction: str, answer: str) -> float:
    """difflib's ratio, in percent rounded, of the answer and the first line that looks like code.

    What `fuzzywuzzy.fuzz.ratio` returns on top of difflib alone.
    """
    code = (
        line
        for line in prediction.split("\n")
        if line.strip() and not any(mark in line for mark in ("`", "#", "//"))
    )
    line = next(code, "")
    if not line or not answer:
        return float(line == answer)
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


def printable(prediction: str) -> str:
    """RULER's clean-up: control characters become line breaks, the ends are stripped."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def substring_all(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in the prediction, whatever their case."""
    if not answers:
        return 0.0
    text = printable(prediction).lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def substring_any(prediction: str, answers: Sequence[str]) -> float:
    """1 if one of the answers occurs in the prediction, whatever its case."""
    text = printable(prediction).lower()
    return float(any(answer.lower() in text for answer in answers))


def letter(prediction: str, answer: str) -> float:
    """LongBench v2: "The correct answer is (B)", brackets optional, asterisks ignored."""
    text = prediction.strip().replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(
        r"The correct answer is ([A-D])", text
    )
    return float(found is not None and found.group(1) == answer)
