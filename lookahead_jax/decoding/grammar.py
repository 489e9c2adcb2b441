"""Grammars: what an output may be, and which tokens may follow at a place in it.

llguidance (github.com/guidance-ai/llguidance) does the parsing. A row holds one matcher at the end
of its output. The mask of a draft node is that of the output followed by the node's own path, where
a copy of the matcher walks.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal

import numpy as np

from lookahead_jax.checkpoints.grammar_vocabulary import import_llguidance
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.decoding.schema_path import path_of_error

MAX_GRAMMAR_BYTES = 2**16
"""Largest source of a grammar."""
MAX_PATTERNS = 64
"""Most regular expressions in a JSON schema: the time to compile them together explodes."""
MAX_MULTIPLE = 10_000
"""Largest common multiple of the multipleOf of a JSON schema: time and memory grow with it."""
# Written as json.dumps writes it: a model cannot spend its tokens on white space.
_JSON_FORM = {
    "whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False,
}  # fmt: skip
# Work for one mask, in llguidance's units: some 10 ms of its lexer and parser each.
_LIMITS = {
    "step_lexer_fuel": 100_000, "step_max_items": 50_000, "initial_lexer_fuel": 500_000,
    "max_lexer_states": 50_000, "max_grammar_size": 100_000, "verbose_errors": False,
}  # fmt: skip


class GrammarError(ValueError):
    """A grammar that is malformed, not supported or too large."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grammar:
    """What an output must be, up to its end token; made by one of the class methods.

    Every token is chosen among those with which the output can still become a text of the grammar,
    and the end tokens are among them exactly where it is one. The log-probabilities that sampling
    sees are those of the allowed tokens. An output that ends for another reason (`max_new_tokens`,
    a stop string) is the beginning of such a text.
    """

    kind: Literal["json_schema", "regex", "lark"]
    source: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> "Grammar":
        """JSON that follows a schema, given as an object or as its text.

        Written on one line, as json.dumps writes it. GrammarError, naming keyword and path, comes
        from `compile` for what llguidance does not support.
        """
        text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
        return cls(kind="json_schema", source=text)

    @classmethod
    def json_object(cls) -> "Grammar":
        """Any JSON object, on one line."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> "Grammar":
        """Texts that a regular expression matches as a whole (Rust's syntax)."""
        return cls(kind="regex", source=pattern)

    @classmethod
    def lark(cls, source: str) -> "Grammar":
        """Texts of a context-free grammar in llguidance's variant of Lark."""
        return cls(kind="lark", source=source)

    def compile(
        self, tokenizer: Tokenizer | None, *, vocab_size: int, end_ids: Sequence[int]
    ) -> "CompiledGrammar":
        """The grammar over a model's tokens, for rows that `end_ids` end.

        Raises GrammarError (a ValueError) for a malformed, unsupported or too large grammar;
        ValueError without a tokenizer, without end tokens, and without llguidance.
        """
        if tokenizer is None:
            raise ValueError("a grammar needs a tokenizer, and this model has no tokenizer.json")
        if not (ends := tuple(i for i in end_ids if 0 <= i < vocab_size)):
            raise ValueError("a grammar needs an end token: give eos_ids")
        return CompiledGrammar(self._checked(tokenizer), tokenizer.vocab_size, vocab_size, ends)

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises GrammarError as `compile`."""
        self._checked(tokenizer)

    def _checked(self, tokenizer: Tokenizer) -> Any:
        """A matcher at the beginning."""
        if (size := len(self.source.encode("utf-8", "surrogatepass"))) > MAX_GRAMMAR_BYTES:
            raise GrammarError(
                f"the grammar has {size} bytes, more than the {MAX_GRAMMAR_BYTES} allowed"
            )
        if self.kind == "json_schema":
            _check_schema(self.source)
        return _matcher(self, tokenizer.grammar_vocabulary)


def _check_schema(source: str) -> None:
    """Raises GrammarError for a schema with settings of llguidance, or that costs too much."""
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError):
        return  # llguidance says what is wrong
    if isinstance(schema, dict) and "x-guidance" in schema:
        raise GrammarError("x-guidance is not supported: leave it out")
    check_cost([schema])


def check_cost(schemas: Sequence[Any]) -> None:
    """Raises GrammarError for JSON schemas that would take too long to compile together.

    That is: more than MAX_PATTERNS patterns, or multiples that have MAX_MULTIPLE states together.
    """
    patterns, multiple, left = 0, 1, list(schemas)
    while left:
        part = left.pop()
        if isinstance(part, dict):
            patterns += isinstance(part.get("pattern"), str)
            named = part.get("patternProperties")
            patterns += len(named) if isinstance(named, dict) else 0
            multiple = math.lcm(multiple, _states(part.get("multipleOf")))
            left += part.values()
        elif isinstance(part, list):
            left += part
        if multiple > MAX_MULTIPLE:
            raise GrammarError(
                "multipleOf: the least common multiple of all values is more than the "
                f"{MAX_MULTIPLE} allowed (without decimal point and zeros at the end)"
            )
    if patterns > MAX_PATTERNS:
        raise GrammarError(
            f"{patterns} patterns (pattern, patternProperties), more than the {MAX_PATTERNS} "
            "allowed"
        )


def _states(multiple: Any) -> int:
    """How many remainders tell multiples of a number from others; 1 for what is no number."""
    if type(multiple) not in (int, float) or not 0 < multiple < math.inf:
        return 1  # llguidance says what is wrong
    if multiple > MAX_MULTIPLE**4:  # no zeros are looked for: Python writes no huge integers
        return int(multiple)
    return int("".join(map(str, Decimal(str(multiple)).as_tuple().digits)).rstrip("0"))


def json_rule(schema: Mapping[str, Any]) -> str:
    """JSON of a schema as a part of a Lark grammar, in the form of `Grammar.json_schema`."""
    return "%json " + json.dumps({**schema, "x-guidance": _JSON_FORM}, ensure_ascii=False)


@functools.lru_cache(maxsize=16)
def _matcher(grammar: Grammar, vocabulary: Any) -> Any:
    """A matcher at the beginning, to be copied: the choices of one request share it."""
    matcher = _try(grammar.kind, grammar.source, vocabulary)
    if isinstance(matcher, str):
        at = ""
        if grammar.kind == "json_schema":
            fails = functools.partial(_try, "json_schema", vocabulary=vocabulary)
            at = path_of_error(json.loads(grammar.source), matcher, fails)
        raise GrammarError(f"{at}: {matcher}" if at else matcher)
    return matcher


def _try(kind: str, source: str, vocabulary: Any) -> Any:
    """A matcher, or what is wrong with the grammar; GrammarError for what is no JSON object."""
    llguidance = import_llguidance()
    make = llguidance.LLMatcher
    try:
        if kind == "json_schema":
            compiled = make.grammar_from_json_schema(source, overrides=_JSON_FORM)
        elif kind == "regex":
            compiled = make.grammar_from_regex(source)
        else:
            compiled = make.grammar_from_lark(source)
    except ValueError as error:
        raise GrammarError(f"not a JSON schema: {error}") from None
    limits = llguidance.LLParserLimits(**_LIMITS)
    matcher = make(vocabulary, compiled, log_level=0, limits=limits)
    return _message(matcher) if matcher.is_error() else matcher


def _message(matcher: Any) -> str:
    message = " ".join(matcher.get_error().removesuffix("<non-verbose/>").split())
    if message.startswith("NoExtension"):
        return "no text follows this grammar"
    return message if len(message) <= 500 else f"{message[:200]} ... {message[-300:]}"


def words(vocab_size: int) -> int:
    """32-bit words of a mask: W."""
    return -(-vocab_size // 32)


class CompiledGrammar:
    """A grammar over a model's tokens; rows begin with copies of its matcher.

    `first_mask` is the mask of an output's first token, uint32 [W].
    """

    def __init__(self, matcher: Any, tokens: int, vocab_size: int, ends: Sequence[int]):
        self._matcher = matcher
        self._words = words(vocab_size)
        self._ends = _bits(ends, self._words)
        # Ids that are no token, and llguidance's own end of a text.
        self._texts = _bits(range(min(tokens, vocab_size)), self._words) & ~self._ends
        self.first_mask = self.begin().mask()

    def begin(self) -> "GrammarRow":
        """A row that has no output yet."""
        return GrammarRow(self._matcher.deep_copy(), self._texts, self._ends)


def _bits(ids: Sequence[int], words: int) -> np.ndarray:
    """A mask with these ids, uint32 [W]."""
    flags = np.zeros(words * 32, bool)
    flags[np.asarray(ids, np.int64)] = True
    return np.packbits(flags, bitorder="little").view("<u4")


class GrammarRow:
    """The place of one row's output in its grammar."""

    def __init__(self, matcher: Any, texts: np.ndarray, ends: np.ndarray):
        self._matcher = matcher
        self._texts = texts  # uint32 [W] tokens that the grammar decides about
        self._ends = ends  # uint32 [W] tokens that end the row

    def copy(self) -> "GrammarRow":
        """Another row at the same place; what happens to it changes nothing here."""
        return GrammarRow(self._matcher.deep_copy(), self._texts, self._ends)

    def observe(self, tokens: Sequence[int]) -> None:
        """The next tokens of the output, without its end token.

        Raises GrammarError where llguidance gives up.
        """
        if not self._matcher.consume_tokens(list(tokens)):
            raise GrammarError(_message(self._matcher))

    def mask(self) -> np.ndarray:
        """Bit i says whether token i may follow the output: uint32 [W].

        Raises GrammarError where none may, or llguidance gives up.
        """
        bits = self._mask()
        if not bits.any():
            raise GrammarError("the grammar allows none of the model's tokens here")
        return bits

    def _mask(self) -> np.ndarray:
        bits = np.zeros_like(self._texts)
        found = np.frombuffer(self._matcher.compute_bitmask(), "<u4")[: len(bits)]
        if self._matcher.is_error():
            raise GrammarError(_message(self._matcher))
        bits[: len(found)] = found
        bits &= self._texts
        return bits | self._ends if self._matcher.is_accepting() else bits

    def masks(self, tokens: np.ndarray, parents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mask of every node of a tree [P] behind the output, and which nodes may stay.

        Returns uint32 [P, W] and bool [P]. A node that the grammar refuses needs no mask and has
        one of all tokens: its parent's mask keeps it from being accepted. One after which no token
        may follow must not stay, because a step chooses a token at every node that it accepts.
        """
        nodes, ids, above = len(tokens), tokens.tolist(), parents.tolist()
        allowed = np.full((nodes, len(self._texts)), 0xFFFFFFFF, np.uint32)
        stays = np.ones(nodes, bool)
        children: list[list[int]] = [[] for _ in range(nodes)]
        for node in range(1, nodes):
            if 0 <= above[node] < node and ids[node] >= 0:
                children[above[node]].append(node)

        def visit(node: int, place: GrammarRow) -> None:
            allowed[node] = place.mask() if node == 0 else place._mask()
            if not allowed[node].any():
                stays[node] = False
                return
            for child in children[node]:
                if not self._continues(allowed[node], ids[child]):
                    continue
                below = place.copy()
                try:
                    below.observe([ids[child]])
                    visit(child, below)
                except GrammarError:  # the output may never get there: only the draft ends
                    allowed[child], stays[child] = 0xFFFFFFFF, False

        visit(0, self)
        return allowed, stays

    def _continues(self, mask: np.ndarray, token: int) -> bool:
        """Whether a token is allowed and does not end the row."""
        if token >= 32 * len(mask):
            return False
        return bool((mask & ~self._ends)[token // 32] >> np.uint32(token % 32) & 1)
