"""Names, places and things that facts, tables and chats of the training prompts are about."""

import json
import random
import string
from pathlib import Path

_LISTS: dict[str, list[str]] = json.loads(
    (Path(__file__).parent / "words.json").read_text(encoding="utf-8")
)
PROJECTS, THINGS, PLAIN = (_LISTS[name] for name in ("projects", "things", "plain"))


def person(rng: random.Random) -> str:
    return f"{rng.choice(_LISTS['first'])} {rng.choice(_LISTS['last'])}"


def digits(rng: random.Random) -> str:
    """A number of three to nine digits, which does not begin with 0."""
    count = rng.randint(3, 9)
    return str(rng.randint(10 ** (count - 1), 10**count - 1))


def code(rng: random.Random) -> str:
    """An identifier: letters and digits in one of several shapes."""
    shapes = ("AA-0000", "A00A00", "AAA-000-AA", "0000-A", "xxxxxxxx", "A-00000", "xxxx-xxxx-xxxx")
    drawn = {"A": string.ascii_uppercase, "0": string.digits, "x": "0123456789abcdef"}
    return "".join(rng.choice(drawn.get(c, c)) for c in rng.choice(shapes))


def password(rng: random.Random) -> str:
    """Two to four plain words and sometimes a number."""
    parts: list[str] = rng.sample(PLAIN, rng.randint(2, 4))
    if rng.random() < 0.3:
        parts.append(str(rng.randint(2, 99)))
    return rng.choice("-_. ").join(parts)


def date(rng: random.Random) -> str:
    day, month, year = rng.randint(1, 28), rng.choice(_LISTS["months"]), rng.randint(1952, 2031)
    shapes = (f"{day} {month} {year}", f"{month} {day}, {year}")
    iso = f"{year}-{_LISTS['months'].index(month) + 1:02d}-{day:02d}"
    return rng.choice((*shapes, iso))


def clock(rng: random.Random) -> str:
    return f"{rng.randint(6, 22)}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02d}"


def price(rng: random.Random) -> str:
    return f"{rng.randint(2, 980)}.{rng.randint(0, 99):02d} {rng.choice(('euros', 'dollars'))}"


def phone(rng: random.Random) -> str:
    return f"{rng.randint(200, 989)}-{rng.randint(100, 999)}-{rng.randint(1000, 9999)}"


def mail(rng: random.Random) -> str:
    return (
        f"{rng.choice(PLAIN)}.{rng.choice(PLAIN)}{rng.randint(1, 99)}@{rng.choice(PLAIN)}.example"
    )


def thing(rng: random.Random) -> str:
    return f"the {rng.choice(_LISTS['colours'])} {rng.choice(THINGS)}"


def place(rng: random.Random) -> str:
    return rng.choice(_LISTS["places"])


def site(rng: random.Random) -> str:
    """A building, as people name it."""
    kind = rng.choice(
        ("warehouse", "archive", "laboratory", "library", "depot", "office", "workshop")
    )
    return f"the {kind} in {rng.choice(_LISTS['places'])}"


def project(rng: random.Random) -> str:
    return f"project {rng.choice(PROJECTS)}"


def dish(rng: random.Random) -> str:
    return rng.choice(_LISTS["dishes"])


def job(rng: random.Random) -> str:
    return rng.choice(_LISTS["jobs"])


def colour(rng: random.Random) -> str:
    return rng.choice(_LISTS["colours"])


def amount(rng: random.Random) -> str:
    return str(rng.randint(11, 9900))


def version(rng: random.Random) -> str:
    return f"{rng.randint(0, 9)}.{rng.randint(0, 30)}.{rng.randint(0, 30)}"
