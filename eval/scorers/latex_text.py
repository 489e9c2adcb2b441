"""LaTeX of final answers as text: what is only layout is dropped, and brackets are matched."""

import re

_SYMBOLS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "√": r"\sqrt ",
    "°": "", "θ": r"\theta ", "\N{NO-BREAK SPACE}": " ", "\N{THIN SPACE}": " ",
}  # fmt: skip
_LAYOUT = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|q?quad)(?![A-Za-z])"
    r"|(?<!\\)\\[,;:! ()\[\]]|\\?\$|~"
)
_FONTS = r"text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf|mathit|mathsf|mathbb|boldsymbol|operatorname"
_TEXT = re.compile(rf"\\(?:{_FONTS}) ?\{{([^{{}}]*)\}}")
_SQUARED = r"(?: ?\^(?:\{\d\}|\d))?"
_UNIT = re.compile(_TEXT.pattern + _SQUARED)
_SHORT_UNIT = re.compile(  # 5 \text{ m}, but not 5 \mathrm{i}
    r"(?<=[\d})])(?:\s|\\[,;: ])*\\(?:text|mbox|mathrm|textrm) ?\{\s*[a-df-hj-zA-Z]\s*\}" + _SQUARED
)
_VALUE = re.compile(r"[-+=\d\\]|^\s*[A-Za-z]\s*$")  # in \text{...}: it is no unit
_UNIT_WORDS = (
    "mm cm km ft in inch inches foot feet yard yards mile miles meter meters metre metres gram "
    "grams kg pound pounds ounce ounces liter liters degree degrees dollar dollars cent cents "
    "second seconds minute minutes hour hours day days week weeks month months year years unit "
    "units square cubic percent mph per people ways times"
)
_UNITS = re.compile(
    rf"(?<=[\d}}).])\s*(?:(?<=\s)|(?<=\d))(?:(?:{'|'.join(_UNIT_WORDS.split())})\b{_SQUARED}\.?\s*)+$"
)
_SECOND_CHOICE = re.compile(r"(?<!\w)\([A-Z]\)|^\s*(?:or|and|[,;/&])\s*[A-Z]\b")
_VALUE_END = re.compile(r"[\w)}\]|!%.]$")
_LABEL = re.compile(r"\s*\([A-Z]\)\s*")  # of a choice
_SEPARATOR = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)")
_SPACED = re.compile(r"(?<![\w.])\d{1,3}(?: \d{3})+(?!\d)")
_BRACKET = re.compile(r"\\begin|\\end|\\\\|\\lfloor|\\rfloor|\\lceil|\\rceil|\\?[\[\](){}]")
_OPENING = {r"\begin", "(", "[", "{", r"\{", r"\lfloor", r"\lceil"}


def words_of(text: str) -> str:
    r"""The words that an answer is: without \text{...}, layout, case, spaces and full stop."""
    text = _TEXT.sub(r"\1", text)
    return re.sub(r"\s+", "", _LAYOUT.sub("", text)).strip(".").lower()


def is_words(text: str) -> bool:
    r"""Whether an answer is nothing but \text{...} without a digit, or a word of letters."""
    if re.fullmatch(r"[A-Za-z ]{4,}", text.strip()):
        return True
    other = _TEXT.sub("", _LAYOUT.sub(" ", text))
    return not re.search(r"\d", text) and not other.replace(".", "").strip()


def choice_of(text: str) -> str | None:
    """The letter of a multiple choice: C, (C), (C) with more; None for others and for several."""
    plain = _LAYOUT.sub("", _TEXT.sub(r"\1", text)).strip()
    found = re.fullmatch(r"\(?([A-Z])\)?\.?|\(([A-Z])\)(.*)", plain, re.DOTALL)
    if not found or _SECOND_CHOICE.search(found[3] or ""):
        return None
    return found[1] or found[2]


def clean(text: str) -> str:
    r"""An answer without layout, units, degree, percent and dollar signs; with \frac for its kin.

    Units are dropped without a comparison, and 50\% becomes 50.
    """
    for symbol, command in _SYMBOLS.items():
        text = text.replace(symbol, command)
    text = re.sub(r",\\!\s*|\{,\}(?=\d{3})|(?<=\d)\\,(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\^ ?(?:\\circ|\\degree|\{ ?\\circ ?\})|\\degree", "", text)
    text = re.sub(r"\\([dtc])(frac|binom)(?![A-Za-z])", r"\\\2", text)
    text = re.sub(r"\\(?:text|mbox) ?\{\s*(?:and|or)\s*\}", ",", text)
    text = _SHORT_UNIT.sub(" ", text)
    text = _UNIT.sub(_without_unit, text)
    text = re.sub(rf"\\(?:{_FONTS})(?![A-Za-z])", "", _TEXT.sub(r"\1", text))
    text = re.sub(r"\\langle", "(", re.sub(r"\\rangle", ")", text))
    text = re.sub(r"\\[lr]vert(?![A-Za-z])|\\mid(?![A-Za-z])", "|", text)
    text = re.sub(r"\\?%", "", _LAYOUT.sub(" ", text))
    text = re.split(r"\\approx(?![A-Za-z])", text)[0]
    text = re.sub(r"\s+(?:and|or)\s+", ",", text.strip().rstrip(".,; "))
    text = _UNITS.sub("", text).strip()
    text = re.sub(r"(?<!\S)(\d+) (\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)
    return _SPACED.sub(lambda found: found[0].replace(" ", ""), text)


def _without_unit(found: re.Match[str]) -> str:
    r"""A space for units, names and labels; \text{...} itself if it may change a value: not 5.

    A unit or a remark stands behind a value, a name before an equals sign.
    """
    before = _LAYOUT.sub(" ", found.string[: found.start()]).rstrip()
    named = re.match(r"\s*=", found.string[found.end() :])
    dropped = named or _LABEL.fullmatch(found[1]) or _VALUE_END.search(before)
    return " " if dropped and not _VALUE.search(found[1]) else found[0]


def without_spaces(text: str) -> str:
    """The text without spaces, but for those between numbers."""
    return re.sub(r"(?<![\d.]) | (?![\d.])", "", re.sub(r"\s+", " ", text))


def without_separators(text: str) -> str:
    """The text without the commas of numbers such as 58,500, if they are outside of brackets.

    Within brackets a comma separates: (1,234) is a point.
    """
    parts, commas = split_outside(text, _SEPARATOR)
    joined = [parts[0]]
    for number, part in zip(commas, parts[1:], strict=True):
        joined += [number.replace(",", ""), part]
    return "".join(joined)


def split_outside(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The parts of a text between separators outside of all brackets, and those separators."""
    depth, at, start = 0, 0, 0
    parts, found = [], []
    while at < len(text):
        bracket = _BRACKET.match(text, at)
        if bracket:
            if bracket[0] != r"\\":
                depth += 1 if bracket[0] in _OPENING else -1
            at = bracket.end()
            continue
        here = separator.match(text, at) if depth == 0 else None
        if here:
            parts.append(text[start:at])
            found.append(here[0])
            at = start = here.end()
        else:
            at += 1
    return [*parts, text[start:]], found


def matching_end(text: str) -> int:
    """Where the bracket closes that the text begins with; -1 if it does not."""
    depth = 0
    for bracket in _BRACKET.finditer(text):
        if bracket[0] != r"\\":
            depth += 1 if bracket[0] in _OPENING else -1
        if depth == 0:
            return bracket.end()
    return -1
