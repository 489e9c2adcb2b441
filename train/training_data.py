"""Training data on disk: which rows a step takes, and reading them as a batch."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import jax
import numpy as np
import pyarrow.compute
from jax.sharding import NamedSharding

from lookahead_jax.checkpoints.hf_files import read_json
from lookahead_jax.prefilling.batching import bucket_length
from lookahead_jax.train.step import Batch

COMPLETE = "complete.json"
"""Written into a folder of token rows when all of its shards are there."""
IDS = datasets.List(datasets.Value("int32"))
FEATURES = datasets.Features({"prompt": IDS, "response": IDS})
_GROUP = 16  # batches whose rows are sorted by length together, which reduces padding


def shard_path(folder: Path, number: int) -> Path:
    """The folder of one shard of token rows."""
    return folder / f"shard-{number:05d}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainingData:
    """Token rows on disk; the rows of a step are a function of (seed, step)."""

    dataset: datasets.Dataset
    lengths: np.ndarray  # [rows, 2] int64 tokens of prompt and response
    folder: np.ndarray  # [rows] int64 which of the folders a row is from
    rows: np.ndarray  # [n] int64 rows of the data set that are used
    batch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return len(self.rows) // self.batch

    def rows_of(self, step: int) -> np.ndarray:
        """The data set's rows in the global batch of `step`: int64 [batch]."""
        epoch, at = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[at]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (one data set a run)
    def _order(self, epoch: int) -> np.ndarray:
        """All batches of an epoch [steps, batch]: shuffled, of similar length, shuffled again."""
        rng = np.random.default_rng((self.seed, epoch))
        steps, size = self.steps_per_epoch, self.batch
        order = rng.permutation(self.rows)[: steps * size]
        for at in range(0, len(order), _GROUP * size):
            group = order[at : at + _GROUP * size]
            order[at : at + len(group)] = group[np.argsort(self.lengths[group, 0], kind="stable")]
        return rng.permutation(order.reshape(steps, size))

    def load(self, step: int, micro_batches: int, sharding: NamedSharding) -> Batch:
        """The batch of a step [A, B, ...]; a process reads only the rows of its own devices."""
        rows = self.rows_of(step)
        longest = self.lengths[rows].max(axis=0)
        grid = rows.reshape(micro_batches, -1)

        def column(name: str, width: int) -> jax.Array:
            @functools.cache  # devices that hold the same rows share one read
            def block(first: int, last: int) -> np.ndarray:
                padded = np.full((micro_batches, last - first, width), -1, np.int32)
                for place, row in np.ndenumerate(grid[:, first:last]):
                    ids = self.dataset[int(row)][name]
                    padded[place][: len(ids)] = ids
                return padded

            def read(index: Any) -> np.ndarray:
                return block(*index[1].indices(grid.shape[1])[:2])

            return jax.make_array_from_callback((*grid.shape, width), sharding, read)

        prompt, response = (bucket_length(int(n)) for n in longest)
        return Batch(column("prompt", prompt), column("response", response))


def open_data(
    directories: Sequence[Path],
    *,
    batch: int,
    seed: int,
    base_fingerprint: str,
    max_prompt: int | None = None,
) -> TrainingData:
    """Memory-maps what `prepare` wrote into each of the folders, as one data set.

    Rows whose prompt is longer than `max_prompt`, or that have no response, are not used. Raises
    ValueError if the data are unfinished, made for another model, or fewer than one batch.
    """
    parts = [
        [datasets.Dataset.load_from_disk(str(shard)) for shard in _shards(path, base_fingerprint)]
        for path in directories
    ]
    dataset = datasets.concatenate_datasets([shard for part in parts for shard in part])
    table = dataset.data
    lengths = [
        pyarrow.compute.call_function("list_value_length", [table.column(n)]).to_numpy()
        for n in FEATURES
    ]
    lengths = np.stack(lengths, axis=1).astype(np.int64)
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
    )


def _shards(directory: Path, base_fingerprint: str) -> list[Path]:
    """The finished shards of a folder, made for this base model."""
    about = read_json(directory, COMPLETE)
    if about is None:
        raise ValueError(
            f"{directory} has no {COMPLETE}: run `lookahead train data` again to finish it"
        )
    if about["base_fingerprint"] != base_fingerprint:
        raise ValueError(
            f"{directory}: the rows were made for another model; run `lookahead train data` for "
            "this one"
        )
    return [shard_path(directory, number) for number in range(about["shards"])]
