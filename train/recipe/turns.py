"""How a document and a question become the messages of a chat."""

import random
from typing import NamedTuple

Message = dict[str, str]


class ChatDraft(NamedTuple):
    """A prompt without its response; every answer stands in it."""

    messages: list[Message]
    answers: list[str]
    question: str = ""
    """End of the last message that asks about what stands before it; empty if nothing does."""


_LEADS = (
    "Here is a document.", "Read the following text.", "Below is some material.",
    "Please study this:", "I have pasted a file.", "Use only the text below.", "",
)  # fmt: skip
_ANNOUNCED = (
    "Read the text and answer this question: {q}",
    "Question: {q}\nThe text follows.",
    "{q}\nThe answer is in the following text.",
    "I want to know the following. {q}",
)
_ASKED = (
    "{q}", "Question: {q}", "Now answer this: {q}", "Based on the text above: {q}",
    "According to the document, {q}", "My question is the following. {q}",
)  # fmt: skip
_FENCES = (
    ("", ""), ('"""\n', '\n"""'), ("<document>\n", "\n</document>"), ("```\n", "\n```"),
    ("---\n", "\n---"), ("BEGIN OF TEXT\n", "\nEND OF TEXT"),
)  # fmt: skip
_READ = ("Thank you, I have read it.", "Understood. What would you like to know?", "Done.", "OK.")
_SYSTEM = (
    "You are a careful assistant.", "You answer questions about documents.",
    "You are a helpful librarian.", "Answer truthfully and briefly.",
)  # fmt: skip


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def with_document(
    rng: random.Random, document: str, question: str, answers: list[str]
) -> ChatDraft:
    """A chat that ends with a user's message: the question before, behind or apart from it."""
    before, after = rng.choice(_FENCES)
    text = f"{before}{document}{after}"
    lead, asked = rng.choice(_LEADS), rng.choice(_ASKED).format(q=question)
    announced = rng.choice(_ANNOUNCED).format(q=question)
    head = [{"role": "system", "content": rng.choice(_SYSTEM)}] if rng.random() < 0.15 else []
    draw = rng.random()
    if draw < 0.6:
        message = user(f"{lead}\n\n{text}\n\n{asked}".strip())
        return ChatDraft([*head, message], answers, asked)
    if draw < 0.72:
        return ChatDraft([*head, user(f"{announced}\n\n{text}")], answers)
    if draw < 0.82:
        return ChatDraft([*head, user(f"{announced}\n\n{text}\n\n{asked}")], answers)
    if draw < 0.93:
        shown = [user(f"{lead}\n\n{text}".strip()), assistant(rng.choice(_READ))]
        return ChatDraft([*head, *shown, user(asked)], answers, asked)
    shown = [{"role": "system", "content": f"{rng.choice(_SYSTEM)}\n\n{text}"}]
    return ChatDraft([*shown, user(asked)], answers, asked)
