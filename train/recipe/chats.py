"""Prompts of several turns, transcripts of conversations, and solved examples before a task."""

import random
import re

from lookahead_jax.train.recipe import words
from lookahead_jax.train.recipe.facts import Fact, ask, draw_facts
from lookahead_jax.train.recipe.material import Material
from lookahead_jax.train.recipe.turns import ChatDraft, Message, assistant, user, with_document

_SHOWN = (
    "Here is something else that I have been reading:", "Please keep this in mind as well:",
    "Next document:", "I found this in my notes:", "By the way, look at this:",
)  # fmt: skip
_NOTED = (
    "Noted.",
    "I see, thank you.",
    "Thanks, I will remember that.",
    "Interesting.",
    "All right.",
)
_AGAIN = (
    "Back to what I told you before. {q}", "Do you remember? {q}", "{q}", "One more thing. {q}",
    "Before we stop: {q}",
)  # fmt: skip


def chat(rng: random.Random, size: int, material: Material) -> ChatDraft:
    """Several turns; the last one asks for something that was said in earlier ones."""
    turns = max(2, min(10, size // 500))
    found = draw_facts(rng, turns, same=rng.random() < 0.3)
    asked = rng.sample(found, min(len(found), rng.choice((1, 1, 2, 3))))
    messages: list[Message] = []
    for fact in found:
        said = fact.statement(rng)
        if rng.random() < 0.25:
            messages += [user(said), assistant(rng.choice(_NOTED))]
            continue
        text = material.excerpt(rng, max(80, size // turns - 100), rng.choice(("prose", "code")))
        parts = [said, f"{rng.choice(_SHOWN)}\n\n{text}"]
        rng.shuffle(parts)
        reply = rng.choice(_NOTED)
        if rng.random() < 0.3:
            reply = f"{reply} {said}"
        messages += [user("\n\n".join(parts)), assistant(reply)]
    if rng.random() < 0.4:  # a question that has been answered already
        first = rng.choice(found)
        messages += [user(first.question(rng)), assistant(f"{first.value}.")]
    again = rng.choice(_AGAIN)
    question = again.format(q=ask(rng, asked))
    return ChatDraft([*messages, user(question)], [fact.value for fact in asked], question)


def transcript(rng: random.Random, size: int, material: Material) -> ChatDraft:
    """The minutes of a meeting: who said what."""
    people = [words.person(rng) for _ in range(rng.randint(2, 5))]
    found = draw_facts(rng, max(3, size // 400), same=False)
    lines, said = [], []
    for fact in found:
        speaker = rng.choice(people)
        text = re.sub(r"\s+", " ", material.excerpt(rng, rng.randint(60, 300), "prose"))[:300]
        lines += [f"{speaker}: {fact.statement(rng)}", f"{rng.choice(people)}: {text}"]
        said.append((speaker, fact))
    speaker, fact = rng.choice(said)
    question, answer = rng.choice(
        (
            (f"Who spoke about {fact.key}?", speaker),
            (f"What did {speaker} say about {fact.key}?", fact.value),
            (fact.question(rng), fact.value),
            (f"List everything that {speaker} said.", speaker),
            ("Who took part in the conversation?", speaker),
            ("Write short minutes of this meeting.", speaker),
        )
    )
    return with_document(rng, "\n".join(lines), question, [answer])


def examples(rng: random.Random, size: int, material: Material) -> ChatDraft:
    """Solved examples of one small task, and one more of it."""
    make = rng.choice((_extract, _rewrite, _classify))
    solved = [make(rng, material) for _ in range(max(2, size // 220))]
    case, answer = make(rng, material)
    given, wanted = rng.choice(
        (("Input", "Output"), ("Text", "Answer"), ("Q", "A"), ("Case", "Result"))
    )
    parts = [f"{given}: {x}\n{wanted}: {y}" for x, y in solved]
    parts.append(f"{given}: {case}\n{wanted}:")
    lead = rng.choice(
        ("Do the same for the last one.", "Follow the examples.", "Complete the last answer.")
    )
    text = "\n\n".join(parts)
    return ChatDraft(
        [user(f"{lead}\n\n{text}" if rng.random() < 0.7 else text)],
        [answer] if answer in case else [],
    )


def _extract(rng: random.Random, material: Material) -> tuple[str, str]:
    (fact,) = draw_facts(rng, 1, same=True)
    text = re.sub(r"\s+", " ", material.excerpt(rng, 120, "prose"))[:120]
    return f"{text} {fact.statement(rng)}", fact.value


def _rewrite(rng: random.Random, material: Material) -> tuple[str, str]:
    fact: Fact = draw_facts(rng, 1, same=True)[0]
    return fact.statement(rng), f"{fact.key} | {fact.relation.noun} | {fact.value}"


def _classify(rng: random.Random, material: Material) -> tuple[str, str]:
    kind = rng.choice(("prose", "code"))
    text = re.sub(r"\s+", " ", material.excerpt(rng, 160, kind))[:160]
    return text, "a text" if kind == "prose" else "a program"
