"""Compress a document once, keep the cut cache on disk, and ask it several questions.

    python examples/compress_once.py

A fork copies the cut cache, so every question starts from the document alone. Nothing but the fork
and the question is computed again. A third of the document is kept without knowing the questions,
so an answer may be wrong.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import jax.numpy as jnp

import lookahead_jax as lk
from lookahead_jax.model.fingerprint import fingerprint

BUDGET, QUESTION_TOKENS, ANSWER_TOKENS = 128, 16, 8
ROWS = {"need": "operator", "cache": "value", "text": "state", "option": "number"}


def document() -> str:
    """Rows of names and values, hidden among lines of comments."""
    noise = [f"# note {i} says nothing about the rows" for i in range(24)]
    for i, (name, value) in enumerate(ROWS.items()):
        noise.insert(6 * i + 2, f" - {name} {value}")
    return "\n" + "\n".join(noise)


def main() -> dict[str, str]:
    model = lk.load(lk.EMBEDDED_MODEL)
    modules = lk.load_modules(lk.EMBEDDED_MODULES, params=model.params, config=model.config)
    tokens = jnp.asarray(lk.pad_batch([model.tokenizer.encode(document())], config=model.config))
    read = lk.read_prompt(
        model.params,
        tokens,
        config=model.config,
        policy=lk.make_policy("lookaheadkv"),
        budget=BUDGET,
        modules=modules,
        new_tokens=QUESTION_TOKENS + ANSWER_TOKENS,
    )
    answers = {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "document.safetensors"
        made_with = fingerprint(model.params)  # a cache belongs to the weights that made it
        lk.save_cache(path, read.cache, fingerprint=made_with)
        cache = lk.load_cache(path, fingerprint=made_with)
        for name, value in ROWS.items():
            question = model.tokenizer.encode_behind(f"\n>>> find {name} :")
            longer, logits = lk.extend(
                model.params, jnp.asarray([question]), cache.fork(1), config=model.config
            )
            answer = lk.decode(
                model.params,
                longer,
                logits,
                config=model.config,
                max_new_tokens=ANSWER_TOKENS,
                eos_ids=model.generation.eos_ids,
            )
            ids = answer.tokens[0, : answer.count[0]].tolist()
            answers[name] = model.tokenizer.decode_continuation(question, ids).strip()
            print(f"{name}: {answers[name]!r}, in the document {name + ' ' + value!r}")
    print(f"{int((tokens >= 0).sum())} prompt tokens, {BUDGET} kept per head")
    return answers


if __name__ == "__main__":
    main()
