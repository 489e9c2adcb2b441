"""Prompts about documents: inserted facts, repetition, sections, code, definitions, summaries."""

import ast
import random
import re
import warnings

from lookahead_jax.train.recipe import words
from lookahead_jax.train.recipe.facts import ask, draw_facts, insert
from lookahead_jax.train.recipe.material import Material
from lookahead_jax.train.recipe.turns import ChatDraft, with_document

_FILES = ("prose", "prose", "code")
_HEAD_CHARS = 40
_FUNCTION_CHARS = (150, 2500)


def facts(rng: random.Random, size: int, material: Material) -> ChatDraft:
    """Facts in a long document, some of which are asked for."""
    found = draw_facts(rng, rng.choice((1, 1, 2, 3, 4, 6, 8)), same=rng.random() < 0.4)
    asked = rng.sample(found, min(len(found), rng.choice((1, 1, 1, 2, 2, 3, 4))))
    statements = [fact.statement(rng) for fact in found]
    question = ask(rng, asked)
    text = material.excerpt(rng, size - sum(map(len, statements)), rng.choice(_FILES))
    document = insert(rng, text, statements)
    return with_document(rng, document, question, [fact.value for fact in asked])


def register(rng: random.Random, size: int, material: Material) -> ChatDraft:
    """Nothing but facts, often of one relation, some of which are asked for."""
    found = draw_facts(rng, max(4, size // 60), same=rng.random() < 0.7)
    asked = rng.sample(found, min(len(found), rng.choice((1, 1, 1, 2, 3))))
    question = ask(rng, asked)
    document = rng.choice(("\n", "\n", " ")).join(fact.statement(rng) for fact in found)
    return with_document(rng, document, question, [fact.value for fact in asked])


def repetition(rng: random.Random, size: int, material: Material) -> ChatDraft:
    """A passage to copy or to continue, named by its beginning."""
    text = material.excerpt(rng, size, rng.choice(_FILES))
    lines = text.split("\n")
    heads = [i for i, line in enumerate(lines) if len(line.strip()) >= _HEAD_CHARS]
    at = rng.choice(heads) if heads else 0
    head = lines[at].strip()[:_HEAD_CHARS].rsplit(" ", 1)[0]
    count = rng.randint(2, 6)
    question = rng.choice(
        (
            f"Copy the {count} lines that begin with: {head}",
            f'Repeat the passage that starts with "{head}" word for word.',
            f'How does the text go on after "{head}"? Quote it.',
            f"Continue exactly as in the text: {head}",
            f'Which line contains "{head}"? Write the line and the {count} lines behind it.',
        )
    )
    return with_document(rng, text, question, [head])


def sections(rng: random.Random, size: int, material: Material) -> ChatDraft:
    """Titled sections; which of them says something, or what one of them says."""
    count = max(2, min(12, size // 700))
    titles = [
        f"{rng.choice(words.PROJECTS)} {rng.choice(('report', 'notes', 'guide', 'review', 'plan'))}"
        for _ in range(count)
    ]
    titles = list(dict.fromkeys(titles))
    found = draw_facts(rng, len(titles), same=False)
    shape = rng.choice(("# {}", "== {} ==", "Section {n}: {}", "{n}. {}", "[{}]"))
    parts = []
    for n, (title, fact) in enumerate(zip(titles, found, strict=True), start=1):
        body = material.excerpt(rng, max(60, size // len(titles) - 80), "prose")
        text = insert(rng, body, [fact.statement(rng)])
        parts.append(f"{shape.format(title, n=n)}\n\n{text}")
    at = rng.randrange(len(titles))
    title, fact = titles[at], found[at]
    question, answer = rng.choice(
        (
            (f"Which section says something about {fact.key}? Give its title.", title),
            (f'What does the section "{title}" say about {fact.key}?', fact.value),
            (f'{fact.question(rng)} The section "{title}" has the answer.', fact.value),
            ("List the titles of all sections in their order.", title),
            (f'Summarise the section "{title}" in two sentences.', title),
            (f'Which section follows directly on "{titles[at - 1]}"?', title),
        )
    )
    return with_document(rng, "\n\n".join(parts), question, [answer])


def code(rng: random.Random, size: int, material: Material) -> ChatDraft:
    """A file with functions and a question about one of them."""
    others = material.excerpt(rng, size, "code")
    for _ in range(50):
        functions = _functions(rng.choice(material.code).text)
        if functions:
            break
    name, source = rng.choice(functions)
    lines = others.split("\n")
    at = rng.choice([i for i, line in enumerate(lines) if not line.strip()] or [len(lines)])
    size_left = max(0, size - len(source))
    before, after = "\n".join(lines[:at]), "\n".join(lines[at:])
    before = before[: size_left // 2] if len(before) > size_left // 2 else before
    document = f"{before}\n\n{source}\n\n{after[: max(0, size_left - len(before))]}"
    question = rng.choice(
        (
            f"What does the function `{name}` do?",
            f"Which arguments does `{name}` take?",
            f"Write out the function `{name}` exactly as it stands in the file.",
            f"What does `{name}` return?",
            f"Explain `{name}` line by line.",
            f"Which functions does `{name}` call?",
            f"Write a docstring for `{name}`.",
            f"Write a test for the function `{name}`.",
            f"Quote the first lines of `{name}` and say what they are for.",
        )
    )
    return with_document(rng, document, question, [name])


def _functions(text: str) -> list[tuple[str, str]]:
    """Names and sources of a file's functions, of moderate length."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(text)
    except SyntaxError:
        return []
    lines = text.split("\n")
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            if _FUNCTION_CHARS[0] <= len(source) <= _FUNCTION_CHARS[1]:
                found.append((node.name, source))
    return found


def definitions(rng: random.Random, size: int, material: Material) -> ChatDraft:
    """A glossary of terms, and a question about what some of them mean."""
    entries: dict[str, str] = {}
    while sum(map(len, entries.values())) < size:
        term = f"{rng.choice(words.PLAIN)} {rng.choice(words.THINGS)}"
        text = re.sub(r"\s+", " ", material.excerpt(rng, rng.randint(80, 400), "prose"))
        entries[term] = text[: rng.randint(80, 300)].rsplit(" ", 1)[0]
    shape = rng.choice(("{}: {}", "{} -- {}", "**{}** {}", "{}\n    {}", "* {} = {}"))
    document = "\n".join(shape.format(term, text) for term, text in entries.items())
    asked = rng.sample(list(entries), min(len(entries), rng.choice((1, 1, 2, 3))))
    names = " and ".join(f'"{term}"' for term in asked)
    question = rng.choice(
        (
            f"How does the text define {names}?",
            f"What stands under {names}? Quote it.",
            f"Explain {names} as the glossary does.",
            f"What is said about {names}?",
        )
    )
    return with_document(rng, document, question, asked)


def open_question(rng: random.Random, size: int, material: Material) -> ChatDraft:
    """A task about a whole document: a summary, a list, a rewriting."""
    kind = rng.choice(_FILES)
    text = material.excerpt(rng, size, kind)
    subject = "file" if kind == "code" else "text"
    question = rng.choice(
        (
            f"Summarise the {subject} in three sentences.",
            f"What is this {subject} about?",
            f"List the most important points of the {subject}.",
            f"List five terms that the {subject} uses, each with an explanation.",
            f"Write a title and a short abstract for the {subject}.",
            f"What should a beginner learn from this {subject}?",
            f"Write three questions that the {subject} answers, with their answers.",
            f"Which numbers or names occur in the {subject}?",
            f"Rewrite the last paragraph of the {subject} in simple words.",
            f"What does the {subject} say in its beginning, and what at its end?",
            f"Write a message to a colleague that explains the {subject}.",
        )
    )
    return with_document(rng, text, question, [])


def continuation(rng: random.Random, size: int, material: Material) -> ChatDraft:
    """A text to go on with."""
    text = material.excerpt(rng, size, rng.choice(_FILES))
    question = rng.choice(
        ("Go on with this text.", "Write the next paragraph.", "Continue in the same style.")
    )
    return with_document(rng, text, question, [])
