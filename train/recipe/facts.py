"""Facts to insert into documents, and questions about them, in wordings of our own."""

import random
from collections.abc import Callable
from typing import NamedTuple

from lookahead_jax.train.recipe import words

Draw = Callable[[random.Random], str]


class Relation(NamedTuple):
    """What a fact says about a key: `{k}` and `{v}` in its statements, `{k}` in its questions."""

    key: Draw
    value: Draw
    noun: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


class Fact(NamedTuple):
    """One value of one key."""

    relation: Relation
    key: str
    value: str

    def statement(self, rng: random.Random) -> str:
        return _sentence(rng.choice(self.relation.statements), self.key, self.value)

    def question(self, rng: random.Random) -> str:
        return _sentence(rng.choice(self.relation.questions), self.key, "")


def _sentence(template: str, key: str, value: str) -> str:
    text = template.format(k=key, v=value)
    return text[0].upper() + text[1:]


RELATIONS = (
    Relation(
        words.site, words.digits, "access code",
        ("The access code of {k} is {v}.", "{k} opens with the code {v}.",
         "To enter {k}, type {v} at the door."),
        ("What is the access code of {k}?", "Which code opens {k}?",
         "What do I type at the door of {k}?"),
    ),
    Relation(
        words.person, words.phone, "phone number",
        ("The phone number of {k} is {v}.", "You can reach {k} at {v}.",
         "{k} answers calls on {v}."),
        ("What is the phone number of {k}?", "At which number can I reach {k}?"),
    ),
    Relation(
        words.person, words.place, "town",
        ("{k} lives in {v}.", "{k} has moved to {v}.", "The home of {k} is in {v}."),
        ("Where does {k} live?", "In which town is the home of {k}?"),
    ),
    Relation(
        words.project, words.date, "deadline",
        ("The deadline of {k} is {v}.", "{k} must be finished by {v}.", "{k} is due on {v}."),
        ("When is {k} due?", "What is the deadline of {k}?"),
    ),
    Relation(
        words.thing, words.price, "price",
        ("{k} costs {v}.", "The price of {k} is {v}.", "Somebody paid {v} for {k}."),
        ("How much does {k} cost?", "What is the price of {k}?"),
    ),
    Relation(
        words.thing, words.person, "owner",
        ("{k} belongs to {v}.", "The owner of {k} is {v}.", "{v} inherited {k}."),
        ("Who owns {k}?", "To whom does {k} belong?"),
    ),
    Relation(
        words.person, words.job, "profession",
        ("{k} works as a {v}.", "{k} is a {v} by profession.", "By trade, {k} is a {v}."),
        ("What is the profession of {k}?", "What does {k} work as?"),
    ),
    Relation(
        words.person, words.dish, "favourite dish",
        ("The favourite dish of {k} is {v}.", "{k} likes {v} best.", "{k} always orders {v}."),
        ("What is the favourite dish of {k}?", "What does {k} like to eat best?"),
    ),
    Relation(
        words.site, words.password, "passphrase",
        ("The passphrase for {k} is {v}.", "{k} uses the passphrase {v}.",
         "Say the words {v} at {k}."),
        ("What is the passphrase for {k}?", "Which words must one say at {k}?"),
    ),
    Relation(
        words.person, words.mail, "e-mail address",
        ("Write to {k} at {v}.", "The e-mail address of {k} is {v}.",
         "{k} reads mail sent to {v}."),
        ("What is the e-mail address of {k}?", "Where can I write to {k}?"),
    ),
    Relation(
        words.thing, words.code, "serial number",
        ("The serial number of {k} is {v}.", "{k} carries the mark {v}.",
         "{k} is listed under {v}."),
        ("What is the serial number of {k}?", "Under which number is {k} listed?"),
    ),
    Relation(
        words.person, words.date, "birthday",
        ("{k} was born on {v}.", "The birthday of {k} is {v}."),
        ("When was {k} born?", "What is the birthday of {k}?"),
    ),
    Relation(
        words.project, words.person, "head",
        ("{v} leads {k}.", "The head of {k} is {v}.", "{k} is in the hands of {v}."),
        ("Who leads {k}?", "Who is the head of {k}?"),
    ),
    Relation(
        words.project, words.version, "version",
        ("The current version of {k} is {v}.", "{k} has released version {v}."),
        ("What is the current version of {k}?", "Which version has {k} released?"),
    ),
    Relation(
        words.site, words.amount, "number of boxes",
        ("There are {v} boxes in {k}.", "{k} holds {v} boxes.",
         "Somebody counted {v} boxes in {k}."),
        ("How many boxes are in {k}?", "How many boxes does {k} hold?"),
    ),
    Relation(
        words.site, words.clock, "opening time",
        ("{k} opens at {v}.", "The doors of {k} are unlocked at {v}."),
        ("When does {k} open?", "At what time are the doors of {k} unlocked?"),
    ),
    Relation(
        words.person, words.digits, "staff number",
        ("{k} has the staff number {v}.", "The staff number of {k} is {v}.",
         "On the badge of {k} stands {v}."),
        ("What is the staff number of {k}?", "Which number stands on the badge of {k}?"),
    ),
    Relation(
        words.project, words.password, "nickname",
        ("{k} is known as {v}.", "Insiders call {k} {v}.", "The nickname of {k} is {v}."),
        ("What is the nickname of {k}?", "What do insiders call {k}?"),
    ),
    Relation(
        words.place, words.colour, "colour",
        ("The town hall of {k} is painted {v}.", "In {k} the town hall is {v}."),
        ("What colour is the town hall of {k}?",
         "In which colour is the town hall of {k} painted?"),
    ),
    Relation(
        words.thing, words.site, "place",
        ("{k} is kept in {v}.", "{k} was last seen in {v}.", "You will find {k} in {v}."),
        ("Where is {k} kept?", "Where was {k} last seen?"),
    ),
)  # fmt: skip
_MISSES = 20  # keys drawn twice, after which a relation has no more
_ONLY = (
    "Answer with the {noun} only.", "Give only the {noun}.", "Reply in one short sentence.",
    "Quote the text.", "Be brief.", "",
)  # fmt: skip


def draw_facts(rng: random.Random, count: int, *, same: bool) -> list[Fact]:
    """Facts with different keys; of one relation if `same`, as far as it has so many keys."""
    relation = rng.choice(RELATIONS)
    facts: dict[str, Fact] = {}
    misses = 0
    while len(facts) < count:
        chosen = relation if same and misses < _MISSES else rng.choice(RELATIONS)
        key = chosen.key(rng)
        if key in facts:
            misses += 1
        else:
            facts[key] = Fact(chosen, key, chosen.value(rng))
    return list(facts.values())


def ask(rng: random.Random, facts: list[Fact]) -> str:
    """One question about all of the facts."""
    if len(facts) == 1:
        how = rng.choice(_ONLY).format(noun=facts[0].relation.noun)
        return f"{facts[0].question(rng)} {how}".strip()
    questions = [fact.question(rng) for fact in facts]
    match rng.randrange(3):
        case 0:
            return " ".join(questions)
        case 1:
            numbered = [f"{i}. {question}" for i, question in enumerate(questions, start=1)]
            return "Answer these questions:\n" + "\n".join(numbered)
    asked = "; ".join(f"the {fact.relation.noun} for {fact.key}" for fact in facts)
    return f"List the following, as the text states them: {asked}."


def insert(rng: random.Random, document: str, statements: list[str]) -> str:
    """The document with each statement on a line of its own, or after a sentence."""
    lines = document.split("\n")
    marks = ("{}", "{}", "Note: {}", "# {}", "({})", "- {}", "> {}")
    mark = rng.choice(marks)
    for statement in statements:
        at, text = rng.randint(0, len(lines)), mark.format(statement)
        if at < len(lines) and ". " in lines[at] and rng.random() < 0.6:
            before, after = lines[at].split(". ", 1)
            lines[at] = f"{before}. {statement} {after}"
        else:
            lines.insert(at, text)
    return "\n".join(lines)
