"""InfiniteBench's scores, as lm-evaluation-harness 0.4.13 computes them.

They follow OpenBMB/InfiniteBench, src/compute_scores.py. Three are the original's where the harness
differs: `longbook_sum_eng` is unstemmed, `longbook_qa_eng` drops punctuation before articles, and
`math_calc` is not in the harness.
"""

import re
import string
from collections.abc import Sequence

from lookahead_jax.eval.scorers.rouge import rouge_lsum
from lookahead_jax.eval.scorers.text import best, qa_f1, token_f1

_CHINESE = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣"
    "､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def clean(prediction: str) -> str:
    """Control characters become spaces, the ends are stripped."""
    return re.sub(r"[\x00-\x1f]", " ", prediction.strip()).strip()


def _spaced(text: str, marks: Sequence[str]) -> str:
    for mark in marks:
        text = text.replace(mark, " ")
    return text


def names_one(prediction: str, answers: Sequence[str]) -> float:
    """An answer occurs in the prediction, whatever its case."""
    text = clean(prediction).upper()
    return float(any(answer.strip().upper() in text for answer in answers))


def word(prediction: str, answers: Sequence[str]) -> float:
    """An answer is a whole word of the prediction."""
    words = _spaced(clean(prediction), "\n:\"'.,?!{}").split()
    return float(any(answer.strip() in words for answer in answers))


def first_integer(prediction: str, answers: Sequence[str]) -> float:
    """The first digits are the answer."""
    found = re.search(r"[0-9]+", clean(prediction))
    return float(found is not None and found.group() in [answer.strip() for answer in answers])


def first_number(prediction: str, answers: Sequence[str]) -> float:
    """The first number, with or without a fraction, equals the answer."""
    found = re.search(r"\d+\.\d+|\d+", clean(prediction))
    if found is None:
        return 0.0

    def same(answer: str) -> bool:
        number = float if "." in found.group() + answer else int
        try:
            return number(found.group()) == number(answer)
        except ValueError:
            return found.group() == answer

    return float(any(same(answer.strip()) for answer in answers))


def last_integer(prediction: str, answers: Sequence[str]) -> float:
    """The last word is the answer, as an integer."""
    words = _spaced(clean(prediction), "\n.`'\":").split()
    try:
        return float(bool(words) and int(words[-1]) in [int(answer) for answer in answers])
    except ValueError:
        return 0.0


def longest_run(prediction: str, answers: Sequence[str]) -> float:
    """Share of the right intermediate values before the first wrong one."""
    numbers = re.findall("[0-9]+", prediction)
    right = 0
    for number, answer in zip(numbers, answers, strict=False):
        if (number.lstrip("0") or "0") != str(int(answer)):  # int() refuses very long numbers
            break
        right += 1
    return right / len(answers) if answers else 0.0


def answer_letter(answers: Sequence[str], options: Sequence[str]) -> str:
    """The letter of the option that is the answer; files name either. "" if none is."""
    answer = answers[0].strip() if answers and options else ""
    for i, option in enumerate(options):
        if answer and option.strip() == answer:
            return chr(ord("A") + i)
    return answer.upper() if answer and answer.upper() in "ABCDEFGHIJ" and len(answer) == 1 else ""


def choice(prediction: str, answers: Sequence[str], options: Sequence[str]) -> float:
    """The last lone letter A to D; failing that the first character, a phrase, a word."""
    label, text = answer_letter(answers, options), clean(prediction)
    if not label or not text:
        return 0.0
    alone = re.search(r"\b([A-D])\b(?!.*\b[A-D]\b)", text)
    if alone:
        return float(alone.group(1) == label)
    if text[0] in "ABCD":
        return float(text[0] == label)
    if text.upper() == label:
        return 1.0
    text = _spaced(text, "\n\"'.,?!{}")
    for phrase in ("answer is:", "answer:", "answer is", "option is"):
        at = text.lower().find(phrase)
        after = text[at + len(phrase) :].strip() if at >= 0 else ""
        if after and after[0].upper() in "ABCD":
            return float(after[0].upper() == label)
    words = [w.upper() for w in text.split() if w.upper() in ("A", "B", "C", "D")]
    return float(bool(words) and words[0] == label)


def buggy_function(prediction: str, answers: Sequence[str], options: Sequence[str]) -> float:
    """The last lone letter A to J; failing that the function's name or letter in front."""
    label, text = answer_letter(answers, options), clean(prediction)
    if not label:
        return 0.0
    name = answers[0].strip()
    name = "" if name.upper() == label else name
    alone = re.search(r"\b([A-J])\b(?!.*\b[A-J]\b)", text)
    if alone:
        return float(alone.group(1) == label)
    text = re.sub(" +", " ", _spaced(text, ("-", "*", "Option", "option"))).strip()
    if text.upper().startswith(label) or (name and text.startswith(name)):
        return 1.0
    for phrase in ("answer is:", "is:", "answer:", "correct option is:"):
        at = text.lower().find(phrase)
        if at >= 0:
            after = text[at + len(phrase) :].strip()
            return float(
                after[:1].upper() == label or bool(after and name and after.startswith(name))
            )
    return 0.0


def english_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of normalised words, against the best answer; the original's order of normalisation."""
    return best(qa_f1, clean(prediction), answers)


def chinese_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of characters without punctuation and space, against the best answer."""

    def characters(text: str) -> list[str]:
        kept = (c for c in text.lower() if c not in string.punctuation + _CHINESE)
        return list("".join("".join(kept).split()))

    text = characters(clean(prediction))
    return max((token_f1(text, characters(a)) for a in answers), default=0.0)


def summary(prediction: str, answers: Sequence[str]) -> float:
    """rougeLsum against the first answer."""
    return rouge_lsum(clean(prediction), answers[0]) if answers else 0.0
