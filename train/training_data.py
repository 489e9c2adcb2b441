"""Training data on disk: which rows a step takes, and reading them as a batch."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import jax
import numpy as np
import pyarrow.compute
from jax.sharding import NamedSharding

from lookahead_jax.checkpoints.hf_files import read_json
from lookahead_jax.host.run_folder import SETTINGS
from lookahead_jax.prefilling.batching import bucket_length
from lookahead_jax.train.batches import Batch

COMPLETE = "complete.json"
"""Written into a folder of token rows when all of its shards are there."""
IDS = datasets.List(datasets.Value("int32"))
FEATURES = datasets.Features({"prompt": IDS, "response": IDS, "question": datasets.Value("int32")})
PARTS = ("prompt", "response")
"""Columns of token ids; `question` counts the last tokens of the prompt that ask about the rest."""
GROUP = 16  # batches whose rows are sorted by length together, which reduces padding


def shard_path(folder: Path, number: int) -> Path:
    """The folder of one shard of token rows."""
    return folder / f"shard-{number:05d}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainingData:
    """Token rows on disk; the rows of a step are a function of (seed, step)."""

    dataset: datasets.Dataset
    lengths: np.ndarray  # [rows, 2] int64 tokens of prompt and response, hidden questions moved
    folder: np.ndarray  # [rows] int64 which of the folders a row is from
    rows: np.ndarray  # [n] int64 rows of the data set that are used
    batch: int
    seed: int
    in_order: bool = False
    """Whether the first epoch follows the order of the shards, group by group."""
    complete: bool = True
    """Whether all shards are there. If not, only the steps of whole groups are."""

    @property
    def content(self) -> np.ndarray:
        """What tells these data from others."""
        return self.lengths

    @property
    def steps_per_epoch(self) -> int:
        return len(self.rows) // self.batch

    def has(self, step: int) -> bool:
        """Whether the rows of a step are there."""
        return self.complete or step < self.steps_per_epoch // GROUP * GROUP

    def rows_of(self, step: int) -> np.ndarray:
        """The data set's rows in the global batch of `step`: int64 [batch]."""
        epoch, at = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[at]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (one data set a run)
    def _order(self, epoch: int) -> np.ndarray:
        """All batches of an epoch [steps, batch]: shuffled, of similar length, shuffled again.

        In an epoch that follows the shards all of this happens within a group, so that its batches
        do not depend on later rows.
        """
        used = self.steps_per_epoch * self.batch
        starts = range(0, used, GROUP * self.batch)
        if self.in_order and epoch == 0:
            rows = self.rows[:used]
            rngs = [np.random.default_rng((self.seed, 0, start)) for start in starts]
            groups = [
                rng.permutation(rows[start : start + GROUP * self.batch])
                for rng, start in zip(rngs, starts, strict=True)
            ]
            batches = [
                rng.permutation(self._of_similar_length(group))
                for rng, group in zip(rngs, groups, strict=True)
            ]
            return np.concatenate(batches)
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.rows)[:used]
        groups = [order[start : start + GROUP * self.batch] for start in starts]
        return rng.permutation(np.concatenate([self._of_similar_length(g) for g in groups]))

    def _of_similar_length(self, group: np.ndarray) -> np.ndarray:
        """The rows of a group, sorted by length, as batches [n, batch]."""
        in_order = group[np.argsort(self.lengths[group, 0], kind="stable")]
        return in_order.reshape(-1, self.batch)

    def batch_of(self, step: int, micro_batches: int, sharding: NamedSharding) -> Batch:
        """The batch of a step [A, B, ...]; a process reads only the rows of its own devices."""
        rows = self.rows_of(step)
        longest = self.lengths[rows].max(axis=0)
        grid = rows.reshape(micro_batches, -1)

        def column(part: int, width: int) -> jax.Array:
            @functools.cache  # devices that hold the same rows share one read
            def block(first: int, last: int) -> np.ndarray:
                padded = np.full((micro_batches, last - first, width), -1, np.int32)
                for place, row in np.ndenumerate(grid[:, first:last]):
                    ids = self._tokens(int(row))[part]
                    padded[place][: len(ids)] = ids
                return padded

            def read(index: Any) -> np.ndarray:
                return block(*index[1].indices(grid.shape[1])[:2])

            return jax.make_array_from_callback((*grid.shape, width), sharding, read)

        prompt, response = (bucket_length(int(n)) for n in longest)
        return Batch(column(0, prompt), column(1, response))

    def _tokens(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and response of a row; a hidden question stands in the response."""
        stored = self.dataset[row]
        ids = np.concatenate([stored[part] for part in PARTS])
        prompt = int(self.lengths[row, 0])
        return ids[:prompt], ids[prompt:]


def open_data(
    directories: Sequence[Path],
    *,
    batch: int,
    seed: int,
    base_fingerprint: str,
    max_prompt: int | None = None,
    shards: int | None = None,
    hide_question: float = 0.0,
) -> TrainingData:
    """Memory-maps what `prepare` wrote into each of the folders, as one data set.

    Rows whose prompt is longer than `max_prompt`, or that have no response, are not used. With
    `shards`, only so many shards of a single folder are used; they may still be in the making, and
    the first epoch follows their order. Of the rows with a question, a share of `hide_question`
    has it moved from the prompt to the response; which ones depends on their numbers alone. Raises
    ValueError if the data are unfinished, made for another model, or fewer than one batch, and if
    questions are to be hidden and no row has one.
    """
    check_hide_question(hide_question)
    if shards is not None and (len(directories) != 1 or shards < 1):
        raise ValueError(
            f"shards {shards} of {len(directories)} folders: give one folder, and at least 1"
        )
    if shards is None:
        found = [_shards(path, base_fingerprint) for path in directories]
    else:
        found = [_first_shards(directories[0], base_fingerprint, shards)]
    parts = [[datasets.Dataset.load_from_disk(str(shard)) for shard in folder] for folder in found]
    dataset = datasets.concatenate_datasets([shard for part in parts for shard in part])
    table = dataset.data
    lengths = [
        pyarrow.compute.call_function("list_value_length", [table.column(n)]).to_numpy()
        for n in PARTS
    ]
    lengths = np.stack(lengths, axis=1).astype(np.int64)
    if hide_question:
        moved = np.where(lengths[:, 1] > 0, _questions(dataset, directories), 0)
        moved[np.random.default_rng(0).random(len(moved)) >= hide_question] = 0
        lengths += np.stack([-moved, moved], axis=1)
    used = (lengths > 0).all(axis=1) & (lengths[:, 0] <= (max_prompt or np.inf))
    if used.sum() < batch:
        names = ", ".join(map(str, directories))
        raise ValueError(f"{names}: {used.sum()} usable rows are fewer than a batch of {batch}")
    return TrainingData(
        dataset=dataset.with_format("numpy"),
        lengths=lengths,
        folder=np.repeat(np.arange(len(parts)), [sum(map(len, part)) for part in parts]),
        rows=np.flatnonzero(used),
        batch=batch,
        seed=seed,
        in_order=shards is not None,
        complete=shards is None or len(found[0]) == shards,
    )


def check_hide_question(share: float) -> None:
    """Raises ValueError unless it is a share."""
    if not 0 <= share <= 1:
        raise ValueError(f"hide_question {share} must be a share from 0 to 1")


def _questions(dataset: datasets.Dataset, directories: Sequence[Path]) -> np.ndarray:
    """Tokens of each row's question: int64 [rows]."""
    found = dataset["question"] if "question" in dataset.column_names else [None] * len(dataset)
    counts = np.array([count or 0 for count in found], np.int64)
    if not counts.any():
        names = ", ".join(map(str, directories))
        raise ValueError(
            f"{names}: no row says where its question begins: leave hide_question out, or make the "
            "data from rows with a `question`"
        )
    return counts


def _shards(directory: Path, base_fingerprint: str) -> list[Path]:
    """The shards of a finished folder, made for this base model."""
    about = read_json(directory, COMPLETE)
    if about is None:
        raise ValueError(
            f"{directory} has no {COMPLETE}: run `lookahead train data` again to finish it"
        )
    _check_model(directory, about, base_fingerprint)
    return [shard_path(directory, number) for number in range(about["shards"])]


def _first_shards(directory: Path, base_fingerprint: str, count: int) -> list[Path]:
    """At most `count` shards without a gap, of a folder that may be unfinished."""
    about = read_json(directory, SETTINGS)
    first = list(itertools.takewhile(Path.is_dir, (shard_path(directory, n) for n in range(count))))
    if about is None or not first:
        raise ValueError(
            f"{directory} has no finished shard: run `lookahead train data` until it has one"
        )
    _check_model(directory, about, base_fingerprint)
    return first


def _check_model(directory: Path, about: dict[str, Any], base_fingerprint: str) -> None:
    if about["base_fingerprint"] != base_fingerprint:
        raise ValueError(
            f"{directory}: the rows were made for another model; run `lookahead train data` for "
            "this one"
        )
