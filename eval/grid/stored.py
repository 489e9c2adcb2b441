"""Answers of a batch -> the rows and views that a run stores."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.eval.grid.batch import Answered
from lookahead_jax.eval.tasks.base import Task, scored
from lookahead_jax.generation.results import Generation
from lookahead_jax.strategies.search import SearchResult

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
                **({"group": example.group} if example.group else {}),
                "answer_prefix": example.prefix, "max_new_tokens": example.max_new_tokens,
                "prompt_tokens": len(prompt.whole), "new_tokens": len(batch.result.tokens[i]),
                **_work(batch, task, i),
                "finish": batch.result.finish[i], "first_of_batch": number, **batch.measured,
                **({"depth": example.extra["depth"]} if "depth" in example.extra else {}),
            }
        )  # fmt: skip
    return rows


def _work(batch: Answered, task: Task, i: int) -> dict[str, Any]:
    """Tokens and steps that an answer has cost; of a search also its candidates with their scores.

    The steps of a drafter are counted for a whole batch (`draft_lengths`) only.
    """
    result = batch.result
    if not isinstance(result, SearchResult):
        tokens = len(result.tokens[i])
        steps = tokens - 1 if batch.cell.drafter == "none" else None
        return {"work_tokens": tokens, "work_forwards": steps}
    work = {"work_tokens": result.work[i].tokens, "work_forwards": result.work[i].forwards}
    if len(result.candidates[i]) == 1:
        return work
    scores = {c.text: scored(task, str(c.text), batch.examples[i])[0] for c in result.candidates[i]}
    return work | {
        "candidates": [
            {
                "text": c.text, "new_tokens": len(c.tokens), "compared": c.score,
                "score": scores[c.text],
            }
            for c in result.candidates[i]
        ]
    }  # fmt: skip


def kept_views(
    batch: Answered, result: Generation, tokenizer: Tokenizer, views: int
) -> Iterator[dict[str, Any]]:
    """For the task's first `views` examples: the share of the heads that kept each token."""
    for i, (example, text) in enumerate(zip(batch.examples, batch.texts, strict=True)):
        ids = result.prompt_ids[i]
        chosen = example.id.isdigit() and int(example.id) < views
        if not chosen or len(ids) > LONGEST_VIEW:
            continue
        kept = result.kept[:, i]
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
