"""How well the base model's keys encode the tag of the row they belong to.

A lookahead token finds entries by its query times their keys, so it can select the rows of one tag
only as far as keys distinguish tags. A linear classifier (ridge, fitted on three quarters of
the documents, tested on the rest) reads the tag from the key of each value of `tagged` and `spans`
documents, as stored (rotated by position) and with the rotation undone, which no query can do at
all distances.

    python benchmarks/key_probe.py --out benchmarks/results/key_probe.json
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from common import Help, parse, publish

import lookahead_jax as lk
from lookahead_jax.eval.tasks.own.prompts import comments, make_example
from lookahead_jax.eval.tasks.own.words import Words
from lookahead_jax.model.rope import apply_rope, rope_tables

SEED = 8_500_000  # documents of neither training, validation nor test
LENGTH = 512
RIDGE = 10.0


def values_of(task: str, prompt: np.ndarray, words: Words) -> list[tuple[int, int]]:
    """(position, tag) of every value of a document."""
    symbol = words.symbols["+" if task == "tagged" else "["]
    offsets = range(3, 4) if task == "tagged" else range(2, 14)  # ` + tag before value`, ` [ tag v`
    begins = np.flatnonzero((prompt[:-1] == symbol) & np.isin(prompt[1:], words.tags))
    return [(at + offset, int(prompt[at + 1])) for at in begins.tolist() for offset in offsets]


def probe(features: np.ndarray, labels: np.ndarray, fit: np.ndarray) -> float:
    """Accuracy of a ridge classifier on the rows that are not in `fit`."""
    x = (features - features[fit].mean(0)) / (features[fit].std(0) + 1e-6)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    targets = np.eye(labels.max() + 1)[labels]
    gram = x[fit].T @ x[fit] + RIDGE * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x[fit].T @ targets[fit])
    return float(((x[~fit] @ weights).argmax(1) == labels[~fit]).mean())


def measure(task: str, documents: int) -> dict:
    model = lk.load(lk.EMBEDDED_MODEL, dtype="float32")
    config = model.config
    words = Words.of(model.tokenizer.backend)
    filler = comments(words)
    prompts = np.stack(
        [
            make_example(task, words, seed=(SEED, i), length=LENGTH, filler=filler).prompt
            for i in range(documents)
        ]
    )
    back = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    cos, sin = rope_tables(config, back, jnp.full(1, LENGTH, jnp.int32))
    places = [values_of(task, prompt, words) for prompt in prompts]
    tags = sorted({tag for place in places for _, tag in place})
    labels = np.array([tags.index(tag) for place in places for _, tag in place])
    fit = np.repeat(np.arange(documents) < documents * 3 // 4, [len(p) for p in places])
    stored, undone = [], []
    for prompt, place in zip(prompts, places, strict=True):
        read = lk.read_prompt(
            model.params, jnp.asarray(prompt[None]),
            config=config, policy=lk.make_policy("full"), budget=0, new_tokens=0,
        )  # fmt: skip
        keys = read.cache.k[:, 0, :, :LENGTH]  # [L, K, T, H]
        at = np.array([position for position, _ in place])
        plain = apply_rope(
            keys.swapaxes(1, 2), cos[0], -sin[0], interleaved=config.rope_interleaved
        ).swapaxes(1, 2)
        stored.append(np.asarray(keys)[:, :, at])
        undone.append(np.asarray(plain)[:, :, at])
    report = {
        "values": len(labels),
        "most_frequent": float(np.bincount(labels).max() / len(labels)),
    }
    for name, parts in (("stored", stored), ("rotation_undone", undone)):
        features = np.concatenate(parts, axis=2)
        report[name] = [
            [
                round(probe(features[layer, head], labels, fit), 3)
                for head in range(features.shape[1])
            ]
            for layer in range(features.shape[0])
        ]
    return report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    documents: Annotated[int, Help("documents of each task")] = 160
    out: Annotated[Path | None, Help("file of the report, which is always printed")] = None


def main() -> None:
    options = parse(Options, __doc__)
    report = {task: measure(task, options.documents) for task in ("tagged", "spans")}
    publish(report, options.out)


if __name__ == "__main__":
    main()
