"""Labelled steps: texts in steps, each right or wrong, and the model's hidden states at their ends.

The model does not change while a head is trained, so it reads every text once; what it says at the
ends of the steps is kept on disk. N steps, D model.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding
from tqdm import tqdm

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.host.files import atomic_path, make_folder
from lookahead_jax.prefilling.batching import pad_batch
from lookahead_jax.prefilling.layer_pass import hidden_states
from lookahead_jax.train.data import batches

Row = TypeVar("Row")
_ROWS = 16  # most texts to read at a time


class LabelledText(NamedTuple):
    """A prompt and its steps."""

    tokens: np.ndarray  # [T] int32 all of them
    prompt: int  # tokens of the prompt
    ends: np.ndarray  # [n] int32 place of each step's last token
    labels: np.ndarray  # [n] float32 how probable it is that all is right up to there


def read_steps(paths: Sequence[Path], model: Model, *, chat: bool) -> list[LabelledText]:
    """The texts in files of JSON lines {"prompt": str, "steps": [str], "labels": [number]}.

    Steps follow the prompt and one another without anything between them; each is encoded on its
    own. With `chat` the prompt is a user's message. ValueError, with the line, for what is not one.
    """
    return [
        text for path in paths for text in read_lines(path, partial(_encoded, model, chat=chat))
    ]


def read_lines(path: Path, parse: Callable[[Any], Row]) -> Iterator[Row]:
    """What `parse` makes of each line of JSON; its ValueError names the line."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield parse(_json(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None


def encode_prompt(model: Model, prompt: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt, with `chat` as a user's message; ValueError for none."""
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer.json, which texts need")
    if chat:
        return model.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    if not (tokens := model.tokenizer.encode(prompt)):
        raise ValueError("the prompt is empty")
    return tokens


def _encoded(model: Model, row: Any, *, chat: bool) -> LabelledText:
    if not isinstance(row, dict) or not isinstance(prompt := row.get("prompt"), str):
        raise ValueError('expected {"prompt": a text, "steps": texts, "labels": numbers}')
    steps, labels = row.get("steps"), row.get("labels")
    if not isinstance(steps, list) or not all(isinstance(s, str) and s for s in steps) or not steps:
        raise ValueError("steps must be a list of texts that are not empty")
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise ValueError(f"labels must be a list of {len(steps)} numbers, one for each step")
    for label in labels:
        if not isinstance(label, int | float) or not 0 <= label <= 1:
            raise ValueError(f"label {label!r} is not a number from 0 to 1")
    tokens = encode_prompt(model, prompt, chat=chat)
    tokenizer: Any = model.tokenizer
    length, ends = len(tokens), []
    for step in steps:
        tokens = tokens + tokenizer.encode_behind(step)
        ends.append(len(tokens) - 1)
    return LabelledText(
        np.array(tokens, np.int32), length, np.array(ends, np.int32), np.array(labels, np.float32)
    )


@struct.dataclass
class StepBatch:
    """Some steps, as a head learns from them."""

    hidden: jax.Array  # [B, D] float32
    labels: jax.Array  # [B] float32


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StepData:
    """The hidden states of all steps; the steps of an update are a function of (seed, update)."""

    hidden: Sequence[np.ndarray]  # [n, D] float32 of each text, on disk
    texts: Sequence[LabelledText]
    place: np.ndarray  # [N, 2] int64 text and step of each
    trained: np.ndarray  # [N] bool; those of texts that are held out are not
    batch: int
    seed: int

    @property
    def content(self) -> Any:
        """What tells these data from others."""
        return {
            "tokens": np.concatenate([text.tokens for text in self.texts]),
            "labels": np.concatenate([text.labels for text in self.texts]),
            "ends": np.concatenate([text.ends for text in self.texts]),
            "lengths": np.array([len(text.tokens) for text in self.texts]),
        }

    @property
    def steps_per_epoch(self) -> int:
        return int(self.trained.sum()) // self.batch

    def batch_of(self, step: int, micro_batches: int, sharding: NamedSharding) -> StepBatch:
        """The steps of an update, as one micro-batch."""
        epoch, at = divmod(step, self.steps_per_epoch)
        return self.taken(self._order(epoch)[at * self.batch : (at + 1) * self.batch])

    @functools.lru_cache(maxsize=1)  # noqa: B019 (one data set a run)
    def _order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch))
        return rng.permutation(np.flatnonzero(self.trained))

    def held_out(self, most: int) -> StepBatch:
        """Up to `most` steps of the texts that are held out."""
        return self.taken(np.flatnonzero(~self.trained)[:most])

    def taken(self, steps: np.ndarray) -> StepBatch:
        """These steps of the N."""
        places = self.place[steps].tolist()
        width = self.hidden[0].shape[1]
        hidden = [self.hidden[text][step] for text, step in places]
        labels = [self.texts[text].labels[step] for text, step in places]
        return StepBatch(
            jnp.asarray(np.reshape(hidden, (-1, width)), jnp.float32),
            jnp.asarray(labels, jnp.float32),
        )


def open_steps(
    texts: Sequence[LabelledText],
    model: Model,
    base_fingerprint: str,
    folder: Path,
    *,
    tokens: int,
    batch: int,
    seed: int,
    held_out: float,
) -> StepData:
    """The hidden states of the texts, from `folder`, where those that are missing are made first.

    `tokens` are the most to read at a time. A part `held_out` of the texts, chosen by the seed, is
    not trained on. Raises ValueError for fewer steps than a batch.
    """
    counts = [len(text.ends) for text in texts]
    place = np.array([(i, j) for i, n in enumerate(counts) for j in range(n)]).reshape(-1, 2)
    order = np.random.default_rng((seed, len(texts))).permutation(len(texts))
    held = order[: round(held_out * len(texts))]
    trained = ~np.isin(place[:, 0], held)
    if trained.sum() < batch:
        raise ValueError(
            f"{trained.sum()} labelled steps to train on are fewer than a batch of {batch}: give "
            "more, or a smaller --batch"
        )
    hidden: list[np.ndarray] = [np.zeros(0)] * len(texts)
    groups = list(
        batches({i: len(t.tokens) for i, t in enumerate(texts)}, batch=_ROWS, tokens=tokens)
    )
    make_folder(folder)
    for rows, size in tqdm(groups, desc="reading the texts", unit="batch"):
        group = [texts[i] for i in rows]
        path = folder / f"{_name(group, base_fingerprint)}.npy"
        if not path.is_file():
            with atomic_path(path) as temporary:
                np.save(temporary, _states(model, group, size))
        states = np.load(path, mmap_mode="r")
        starts = np.cumsum([len(text.ends) for text in group])[:-1]
        for i, part in zip(rows, np.split(states, starts), strict=True):
            hidden[i] = part
    return StepData(
        hidden=hidden, texts=texts, place=place, trained=trained, batch=batch, seed=seed
    )


def _name(group: Sequence[LabelledText], base_fingerprint: str) -> str:
    digest = hashlib.sha256(base_fingerprint.encode())
    for text in group:
        digest.update(f"{len(text.tokens)} {text.ends.tolist()} ".encode())
        digest.update(text.tokens.astype("<i4").tobytes())
    return digest.hexdigest()[:32]


def _states(model: Model, group: Sequence[LabelledText], size: int) -> np.ndarray:
    """Final-normed hidden states at the ends of a group's steps: float32 [n, D]."""
    rows = [text.tokens.tolist() for text in group]
    padded = pad_batch(rows + rows[-1:] * (size - len(rows)), config=model.config)
    hidden = np.asarray(hidden_states(model.params, jnp.asarray(padded), config=model.config))
    ends = [hidden[i, text.ends] for i, text in enumerate(group)]
    return np.concatenate(ends).astype(np.float32)
