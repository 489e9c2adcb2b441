"""Training data of the lookahead modules: chats or prompts -> token rows in Arrow files.

    lookahead train data --model DIR --source FILE ... --out DATA

Sources are JSON lines or parquet files, or data sets of the Hugging Face hub (`hf:owner/name`); all
are read as streams, `--limit` rows at most. A row has `messages` (the chat template is applied; the
last answer is the response) or `prompt` and perhaps `response`, as text or as token ids. Responses
that are missing (all of them with --regenerate) are generated greedily by the model. The rows are
written shard by shard; a restarted run skips the finished ones.
"""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import jax
import numpy as np
import pyarrow.compute
import tyro
from jax.sharding import NamedSharding
from tqdm import tqdm

from lookahead_jax.checkpoints.hf_files import read_json
from lookahead_jax.checkpoints.load import Model, load
from lookahead_jax.generation.generate import generate
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.host.files import atomic_path, atomic_write, make_folder
from lookahead_jax.host.lock import folder_lock
from lookahead_jax.model.params import fingerprint
from lookahead_jax.policies.full import Full
from lookahead_jax.prefilling.batching import bucket_length, check_tokens
from lookahead_jax.train.step import Batch

SETTINGS = "settings.json"
COMPLETE = "complete.json"
_IDS = datasets.List(datasets.Value("int32"))
_FEATURES = datasets.Features({"prompt": _IDS, "response": _IDS})
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_HUB = "hf:"  # a prefix, so that a mistyped file name asks no server
_GROUP = 16  # batches whose rows are sorted by length together, so that a batch pads little


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Tokenize prompts and responses, generating those that are missing."""

    model: Path
    """Folder of the model the modules are for; its own responses train best."""
    source: tuple[str, ...]
    """JSON lines or parquet files, or hf:owner/name[:subset][@split] (default split: train), with
    `messages`, or `prompt` and perhaps `response`."""
    out: Path
    """Folder of the token rows, made if need be."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; None is that of the checkpoint."""
    limit: int | None = None
    """Source rows that are read, at most."""
    max_prompt: int = 16384
    """Rows with a longer prompt (in tokens) are left out."""
    max_response: int = 512
    """Responses end after this many tokens."""
    regenerate: bool = False
    """Replace the responses of the source by the model's own."""
    batch: int = 16
    """Responses generated at a time."""
    shard_rows: int = 256
    """Source rows of one shard; a crash loses at most one."""
    part: int = 0
    """Which of `parts` processes this one is; each writes its own shards into the same folder."""
    parts: int = 1
    """Processes at work on this folder."""


def prepare(config: DataConfig) -> None:
    """Writes the token rows into `config.out`; a restarted run skips finished shards.

    Raises ValueError for rows it cannot read and for a folder begun with other settings,
    BlockingIOError if another process does this part of the work.
    """
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"limit={config.limit}: at least one row")
    if config.batch < 1 or config.shard_rows < 1 or not 0 <= config.part < config.parts:
        raise ValueError("batch, shard_rows and parts start at 1, and part is below parts")
    make_folder(config.out)
    with folder_lock(config.out, f"lock.{config.part}"):
        _prepare(config)


def _prepare(config: DataConfig) -> None:
    """`prepare`, as the only process with this part of the work."""
    model = load(config.model, dtype=config.dtype)
    settings = {
        "base_fingerprint": fingerprint(model.params),
        "source": [str(path) for path in config.source],
        **{
            n: getattr(config, n)
            for n in ("limit", "max_prompt", "max_response", "regenerate", "shard_rows")
        },
    }
    _check_settings(config.out, settings)
    datasets.disable_progress_bars()
    rows, shards = itertools.islice(read_rows(config.source), config.limit), 0
    with tqdm(total=config.limit, unit=" rows", desc=str(config.out)) as progress:
        while part := list(itertools.islice(rows, config.shard_rows)):
            path = _shard(config.out, shards)
            if shards % config.parts == config.part and not path.is_dir():
                first = shards * config.shard_rows
                with atomic_path(path) as temporary:
                    prepare_rows(part, model, config, first).save_to_disk(temporary)
            shards += 1
            progress.update(len(part))
    if all(_shard(config.out, number).is_dir() for number in range(shards)):
        summary = settings | {"shards": shards}
        atomic_write(config.out / COMPLETE, json.dumps(summary, indent=2) + "\n")


def read_rows(sources: Sequence[str | os.PathLike[str]]) -> Iterator[dict[str, Any]]:
    """The rows of the sources, in order, read as a stream (a restart reads them anew)."""
    for source in sources:
        yield from _open_stream(str(source))


def _open_stream(source: str) -> Iterable[dict[str, Any]]:
    if source.startswith(_HUB):
        name, _, split = source.removeprefix(_HUB).partition("@")
        name, _, subset = name.partition(":")
        return datasets.load_dataset(name, subset or None, split=split or "train", streaming=True)
    path = Path(source)
    if path.suffix not in _READERS:
        raise ValueError(
            f"{path}: expected a file that ends in {', '.join(_READERS)}, or {_HUB}owner/name"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return datasets.load_dataset(
        _READERS[path.suffix], data_files=source, split="train", streaming=True
    )


def prepare_rows(
    rows: Sequence[dict[str, Any]], model: Model, config: DataConfig, first: int
) -> datasets.Dataset:
    """Source rows, the first of which has number `first`, -> prompts and responses as ids."""
    pairs = []
    for number, row in enumerate(rows, start=first):
        try:
            prompt, response = tokenize(row, model)
        except ValueError as error:
            raise ValueError(f"source row {number}: {error}") from error
        if 0 < len(prompt) <= config.max_prompt:
            known = [] if config.regenerate else response[: config.max_response]
            pairs.append((prompt, known))
    open_rows = sorted(
        (i for i, (_, y) in enumerate(pairs) if not y), key=lambda i: len(pairs[i][0])
    )
    for at in range(0, len(open_rows), config.batch):
        chosen = open_rows[at : at + config.batch]
        # A last batch of another size would compile anew.
        filled = chosen + chosen[-1:] * (config.batch - len(chosen))
        prompts = [pairs[i][0] for i in filled]
        answers = generate(
            model, prompts, policy=Full(), max_new_tokens=config.max_response, burst=64
        ).tokens
        for i, answer in zip(chosen, answers, strict=False):
            pairs[i] = (pairs[i][0], answer)
    columns = {"prompt": [x for x, _ in pairs], "response": [y for _, y in pairs]}
    return datasets.Dataset.from_dict(columns, features=_FEATURES)


def tokenize(row: dict[str, Any], model: Model) -> tuple[list[int], list[int]]:
    """Prompt and response of a source row as token ids; the response may be empty."""
    messages = row.get("messages")
    if messages:
        *before, last = [
            {k: v for k, v in message.items() if v is not None} for message in messages
        ]
        if last.get("role") != "assistant":
            before, last = [*before, last], {}
        text = _tokenizer(model).render_chat(before)
        prompt = _tokenizer(model).encode(text, special=False)
        return prompt, _ids(last.get("content") or [], model, special=False)
    if row.get("prompt") is None:
        raise ValueError(f"has neither messages nor a prompt, only {', '.join(row) or 'nothing'}")
    prompt = _ids(row["prompt"], model, special=True)
    return prompt, _ids(row.get("response") or [], model, special=False)


def _ids(content: str | Sequence[int], model: Model, *, special: bool) -> list[int]:
    if isinstance(content, str):
        return _tokenizer(model).encode(content, special=special)
    if content:
        check_tokens(np.asarray([content]), config=model.config)
    return list(content)


def _tokenizer(model: Model):
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer.json: give token ids")
    return model.tokenizer


def _shard(directory: Path, number: int) -> Path:
    return directory / f"shard-{number:05d}"


def _check_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Notes what the shards of a folder are made with; they must all agree."""
    begun = read_json(directory, SETTINGS)
    if begun is None:
        atomic_write(directory / SETTINGS, json.dumps(settings, indent=2) + "\n")
        return
    changed = [name for name in settings if begun.get(name) != settings[name]]
    if changed:
        raise ValueError(
            f"{directory} was begun with another {changed[0]} ({begun.get(changed[0])}, now "
            f"{settings[changed[0]]}): choose another folder"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainingData:
    """Token rows on disk, and which of them each step takes: a function of (seed, step)."""

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
        for n in _FEATURES
    ]
    lengths = np.stack(lengths, axis=1).astype(np.int64)
    used = (lengths > 0).all(axis=1) & (lengths[:, 0] <= (max_prompt or np.inf))
    if used.sum() < batch:
        names = ", ".join(map(str, directories))
        raise ValueError(f"{names}: {used.sum()} usable rows, a batch takes {batch}")
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
        raise ValueError(f"{directory}: no {COMPLETE}; run lookahead_jax.train.data to its end")
    if about["base_fingerprint"] != base_fingerprint:
        raise ValueError(f"{directory}: these rows were made for another model; make them anew")
    return [_shard(directory, number) for number in range(about["shards"])]


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    prog = "lookahead train data"
    return run_command(lambda: tyro.cli(DataConfig, args=args, prog=prog), prepare, prog=prog)


if __name__ == "__main__":
    end_process(main())
