"""The words that the synthetic tasks are written with: English words that are one token each.

A lookup by a two-token name is a conjunction, which a small model learns slowly if at all; one
token per name keeps the tasks about memory. Words that a tokenizer splits are left out.
"""

import dataclasses

import numpy as np
import tokenizers

SCHEMAS = {
    "socket": "server timeout address protocol stream buffer",
    "table": "rows columns headers style width entries",
    "graph": "nodes edges degree directed weights leaf",
    "model": "layer kernel bias alpha steps scale",
    "section": "text language tokens line options terms",
    "logger": "level handler message filename warnings status",
    "device": "memory core storage supports replica interval",
    "array": "dtype shape size axes dimension slice",
}
TAGS = """
color action domain stage fruit rank side item series feature engine module group segment library
"""
SYMBOLS = ("-", ">", "+", "[", "]", ":", "#")
VERBS = "find record tag copy trace"
FILLER = """
the self return for def and not import with else from that are will has other all which when one
have should only than into more its was also last this can while but they would then these those
such does no
"""
WORDS = """
str value raise use name type function int len num list data result path key default elif object
tuple except try string input method used argument axis must args dict optional may error edge
number class ignore output assert field each given element range first case tree same copy names
matrix variable using order sys source print update where instance arguments match you mask info
bytes orig specified func types two need arrays attribute length msg express yield integer row
warning async returns directory single exist instead metadata flag await returned right either
passed support sequence expr params process create between del required stack eval logging
functions continue lambda empty fun found expected encoding parameter there label called super
left errors remove before files provided like parser loop write objects mesh after flags here
indices val lines methods variables global original elements zip example real parse inputs convert
defined already algorithm spec because complex header callable datetime keys point init lax
whether exception system updates along both batch results cannot without them mapping take build
multiple different fields writing rule http math been second strings detail following just
otherwise available paths random enumerate points sorted possible grid standard got missing
maximum keyword contains initial entry part callback alpha always uses true plt items want being
linear through unique least compute software below boolean their kind since iterable compiler
operation details positive precision layout created final total symbols common present partial law
force raised operator extract above governing distance abstract needed freq reference upper flow
agreed body even labels within numbers term finally based about added closed devices response
minimum small large matching most removed strict done bounds namespace negative parts known exists
wrapper generated pattern means sample alias could python graphs directly inspect until overwrite
sparse via behavior way simple classes evaluate during converted binary actual signature now
computed shared cases inner register query iteration inverse calls generate existing pairs blocks
special invalid tests validate section stored once allowed defaults override problem carry ordered
needs safe modules what still many takes space integers long sure nested calling parsed template
less interface internal usage requires instances times useful another applied ignored rules
padding necessary tuples threading seen running wrapped supports member might arbitrary generator
best our signal
"""


@dataclasses.dataclass(frozen=True)
class Words:
    """Token ids of one tokenizer for everything a task is written with."""

    bos: int
    eos: int
    newline: int
    breaks: tuple[int, ...]  # every token that holds a line break
    symbols: dict[str, int]  # SYMBOLS and ">>>"
    verbs: dict[str, int]
    schemas: tuple[tuple[int, tuple[int, ...]], ...]  # (name, fields); no field belongs to two
    tags: tuple[int, ...]
    names: tuple[int, ...]  # keys and chain nodes
    values: tuple[int, ...]
    filler: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer) -> "Words":
        """The words that `tokenizer` writes as one token, each in one role only.

        Raises:
          ValueError: a symbol or verb is more than one token, or too few words are left.
        """

        def token(text: str) -> int | None:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            return ids[0] if len(ids) == 1 else None

        def required(text: str) -> int:
            found = token(text)
            if found is None:
                raise ValueError(f"the tasks need {text!r} to be one token of the tokenizer")
            return found

        used: set[int] = set()

        def claim(words: str) -> tuple[int, ...]:
            found = [
                i for w in words.split() if (i := token(f" {w}")) is not None and i not in used
            ]
            used.update(found)
            return tuple(dict.fromkeys(found))

        symbols = {s: required(f" {s}") for s in SYMBOLS} | {">>>": required(">>>")}
        verbs = {v: required(f" {v}") for v in VERBS.split()}
        used.update(verbs.values())
        schemas = tuple((claim(name), claim(fields)) for name, fields in SCHEMAS.items())
        schemas = tuple((name[0], fields) for name, fields in schemas if name and len(fields) >= 4)
        tags, filler, words = claim(TAGS), claim(FILLER), claim(WORDS)
        if len(words) < 64 or len(schemas) < 2 or len(tags) < 4 or len(filler) < 8:
            raise ValueError(
                f"only {len(words)} of the task words are single tokens of the tokenizer"
            )
        cut = len(words) * 5 // 8
        shuffled = np.random.default_rng(0).permutation(words).tolist()
        return cls(
            bos=required("<s>"),
            eos=required("</s>"),
            newline=required("\n"),
            breaks=tuple(sorted(i for t, i in tokenizer.get_vocab().items() if "\u010a" in t)),
            symbols=symbols,
            verbs=verbs,
            schemas=schemas,
            tags=tags,
            names=tuple(shuffled[:cut]),
            values=tuple(shuffled[cut:]),
            filler=filler,
        )
