"""Answers of a batch -> the rows and views that a run stores."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.eval.grid.batch import Answered
from lookahead_jax.eval.tasks.base import Task, scored

LONGEST_VIEW = 8192  # tokens of a prompt whose kept tokens are stored


def answer_rows(batch: Answered, task: Task, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """One row per example, with its score."""
    number = f"{batch.cell.policy}/{batch.examples[0].id}"
    rows = []
    for i, (example, prompt, text) in enumerate(
        zip(batch.examples, batch.prompts, batch.texts, strict=True)
    ):
        score, measures = scored(task, text, example)
        rows.append(
            {
                **batch.cell._asdict(), "id": example.id, "score": score, "binary": task.binary,
                **({"measures": measures} if measures else {}),
                "predicted_answer": text, "answer": list(example.answers),
                "question": text_of(example.question, tokenizer),
                "answer_prefix": example.prefix, "max_new_tokens": example.max_new_tokens,
                "prompt_tokens": len(prompt.whole), "new_tokens": len(batch.result.tokens[i]),
                "finish": batch.result.finish[i], "first_of_batch": number, **batch.measured,
                **({"depth": example.extra["depth"]} if "depth" in example.extra else {}),
            }
        )  # fmt: skip
    return rows


def kept_views(batch: Answered, tokenizer: Tokenizer, views: int) -> Iterator[dict[str, Any]]:
    """For the task's first `views` examples: the share of the heads that kept each token."""
    for i, (example, text) in enumerate(zip(batch.examples, batch.texts, strict=True)):
        ids = batch.result.prompt_ids[i]
        chosen = example.id.isdigit() and int(example.id) < views
        if not chosen or len(ids) > LONGEST_VIEW:
            continue
        kept = batch.result.kept[:, i]
        counts = np.bincount(kept[kept >= 0], minlength=len(ids))
        yield {
            **batch.cell._asdict(),
            "id": example.id,
            "pieces": pieces(ids, tokenizer),
            "kept": np.round(counts / np.prod(kept.shape[:2]), 3).tolist(),
            "predicted_answer": text,
            "answer": list(example.answers),
        }


def pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of every token; a character of several tokens belongs to the last of them."""
    stream = tokenizer.stream(skip_special=False)
    texts = [stream.push(token) for token in ids]
    texts[-1] += stream.finish()
    return texts


def text_of(part: str | tuple[int, ...], tokenizer: Tokenizer) -> str:
    """A part of an example as text."""
    return part if isinstance(part, str) else tokenizer.decode(part)
