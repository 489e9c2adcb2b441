"""Numbers and arithmetic in an answer, read without running anything."""

import ast
import re
from collections.abc import Sequence
from fractions import Fraction

from lookahead_jax.strategies.self_consistency import SelfConsistency

NUMBER = SelfConsistency.pattern
LONGEST = 80  # characters of an expression that is read
_DIGITS = 30  # digits of a number that is read


def last_number(text: str) -> Fraction | None:
    """The last number in a text, without thousands separators; None without one."""
    found = re.findall(NUMBER, text)
    if not found:
        return None
    digits = found[-1].replace(",", "")
    return Fraction(digits) if len(digits) <= _DIGITS else None


def same_number(prediction: str, answer: str) -> float:
    """1 if the last number of the prediction is that of the answer."""
    return float(last_number(prediction) == last_number(answer) is not None)


def arithmetic(expression: str) -> tuple[Fraction, list[int]] | None:
    """The value of a term of whole numbers, + - * / and brackets, and the numbers in it.

    None for anything else, and for a division by zero.
    """
    if len(expression) > LONGEST:
        return None
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        numbers: list[int] = []
        return _value(tree.body, numbers), numbers
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            numbers.append(number)
            return Fraction(number)
        case ast.BinOp(left=left, op=operator, right=right):
            a, b = _value(left, numbers), _value(right, numbers)
            match operator:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div():
                    return a / b
    raise ValueError("not a term of whole numbers")


def reaches(prediction: str, numbers: Sequence[int], target: int) -> float:
    """1 if the last line with a digit is a sum or difference of these numbers with that value.

    What follows an equals sign is not read, and neither is a full stop at the end.
    """
    lines = [line for line in prediction.splitlines() if re.search(r"\d", line)]
    term = lines[-1].partition("=")[0].strip().rstrip(".") if lines else ""
    read = None if re.search("[*/]", term) else arithmetic(term)
    return float(read is not None and read[0] == target and sorted(read[1]) == sorted(numbers))
