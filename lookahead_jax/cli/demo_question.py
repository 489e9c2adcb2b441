"""`lookahead demo` without a file: a question about a long text, answered by several policies."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lookahead_jax.checkpoints.packaged import packaged_file
from lookahead_jax.cli.drawing import draw
from lookahead_jax.cli.encoded import chat_messages, encode_chat_prompt
from lookahead_jax.cli.options import Eviction, EvictionOptions, ModelOptions, megabytes, read_text
from lookahead_jax.host.command import say

ASSETS = Path(__file__).parent.parent / "assets"
MODEL = "smollm2"
DOCUMENT, FACT = ASSETS / "demo.txt", "the password of the store room is pepper"
QUESTION = "What is the password of the store room?"
# The embedded model's question: a task that it has learnt.
ROWS, ROW_TOKENS, SEED = "records", 1024, (1, 0)


class Asked(NamedTuple):
    """A prompt that ends in a question, and what its answer has to contain."""

    ids: list[int]
    about: str  # for people
    right: str


class DemoAnswer(NamedTuple):
    """One policy's answer, and what it took."""

    name: str
    result: Any  # Generation


def ask(source: ModelOptions, eviction: EvictionOptions, new_tokens: int) -> None:
    """Asks the question of every policy and prints the answers side by side."""
    source = choose_model(source)
    say("lookahead", f"loading {source.model or 'the embedded model'}")
    model = source.load()
    asked = (_about_rows if source.model is None else _about_document)(model)
    room = model.config.max_position - len(asked.ids)
    if new_tokens > room:
        raise ValueError(
            f"--max-new-tokens {new_tokens}: the text has {len(asked.ids):,} of the model's "
            f"{model.config.max_position:,} positions, so at most {max(room, 0)}"
        )
    policies, missing = _policies(eviction, source, model)
    answers = [
        DemoAnswer(name, _measured(name, lambda run=run: run(asked.ids, new_tokens)))
        for name, run in policies.items()
    ]
    print(f"{asked.about}\nRight answer: {asked.right}\n")
    print(table(answers))
    if missing:
        print(f"\n{missing}")


def choose_model(source: ModelOptions) -> ModelOptions:
    """The model that is named; else smollm2 where its package is installed, else the embedded one.

    The last is said in one line, with the remedy.
    """
    if source.model is not None:
        return source
    try:
        packaged_file(MODEL)
    except FileNotFoundError as error:
        say("lookahead", f"notice: {error}. The demo runs on the small embedded model instead")
        return source
    return replace(source, model=Path(MODEL))


def _about_document(model: Any) -> Asked:
    """The question about the text that ships, as a chat if the model has a template for it."""
    text = read_text(DOCUMENT)
    if model.tokenizer is None:
        raise ValueError(f"{model.path} has no tokenizer.json, and the demo reads text")
    if model.tokenizer.chat_templates:
        ids = encode_chat_prompt(model, chat_messages(QUESTION, text, None)).ids
    else:
        ids = model.tokenizer.encode(f"{text}\nQuestion: {QUESTION}\nAnswer:")
    at = round(100 * text.index(FACT) / len(text))
    about = f"{QUESTION} (asked after a text of {len(ids):,} tokens; the answer is {at} % in)"
    return Asked(ids, about, FACT.rpartition(" ")[2])


def _about_rows(model: Any) -> Asked:
    """A question of the embedded model's own kind: which fields does a record have?"""
    from lookahead_jax.eval.tasks.own.prompts import make_example
    from lookahead_jax.eval.tasks.own.words import Words

    words = Words.of(model.tokenizer.backend)
    made = make_example(ROWS, words, seed=SEED, length=ROW_TOKENS)
    ids, answer = made.prompt.tolist(), made.answer.tolist()
    question = model.tokenizer.decode(ids).rpartition("\n")[2]
    about = (
        f"{question} (asked after a text of {len(ids):,} tokens; the fields of this record and "
        "their values stand in rows all over it)"
    )
    return Asked(ids, about, model.tokenizer.decode(answer).strip())


Run = Callable[[list[int], int], Any]


def _policies(
    options: EvictionOptions, source: ModelOptions, model: Any
) -> tuple[dict[str, Run], str]:
    """Name -> its answer to a prompt; and a line about a policy that cannot take part."""
    import lookahead_jax as lk

    chosen = [replace(options, policy=name, policy_arg=()) for name in ("snapkv", "lookaheadkv")]
    if options.policy is not None:
        chosen = [options]
    found: dict[str, Eviction] = {"full cache": Eviction("full", lk.make_policy("full"), None)}
    missing = ""
    for one in chosen:
        eviction = one.resolve(source)
        if eviction.name == "lookaheadkv" and eviction.folder is None and options.policy is None:
            missing = (
                "lookaheadkv is not shown: it needs lookahead modules trained for the model, and "
                f"none ship for {source.model}. Train them (docs/train.md) and name them with "
                "--lookahead."
            )
        else:
            found[eviction.name] = eviction

    def run(eviction: Eviction) -> Run:
        modules = eviction.modules(model)

        def answer(ids: list[int], new_tokens: int):
            return lk.generate(
                model, [ids], policy=eviction.policy, budget=options.budget, lookahead=modules,
                max_new_tokens=new_tokens,
            )  # fmt: skip

        return answer

    return {name: run(eviction) for name, eviction in found.items()}, missing


def _measured(name: str, run: Callable[[], Any]) -> Any:
    """The second of two runs: the first compiles, which is not to be measured."""
    begin = time.perf_counter()
    say("lookahead", f"{name}: compiling and running once, so that only running is measured")
    run()
    result = run()
    if sys.stderr.isatty():
        say("lookahead", f"{name}: {time.perf_counter() - begin:.0f} s")
    return result


def table(answers: list[DemoAnswer]) -> str:
    """A Markdown table with a row for every policy."""
    head = ("", "entries kept", "cache", "first token", "tokens/s", "answer")
    rows = [
        (
            name,
            _entries(result),
            megabytes(result.cache.bytes),
            f"{result.timing.ttft_s:.2f} s",
            f"{result.timing.decode_tokens_per_s or float('nan'):.0f}",
            " ".join(result.text[0].split()).replace("|", "\\|"),
        )
        for name, result in answers
    ]
    return draw([head, ("---",) * len(head), *rows])


def _entries(result: Any) -> str:
    """Kept entries per layer and head, of the prompt's."""
    kept = statistics.mean(n for layer in result.cache.kept_per_head for n in layer[0])
    return f"{kept:,.0f} of {result.prompt_tokens[0]:,}"
