"""Make training data for lookahead modules: chats or prompts become token rows in Arrow files.

    lookahead train data --model DIR --source FILE ... --out DATA

Sources are JSON lines or parquet files, or data sets of the Hugging Face hub (`hf:owner/name`),
read as streams, up to `--limit` rows. A row has `messages` (the chat template is applied, and the
last answer is the response) or `prompt` and optionally `response`, as text or as token ids. The
model generates missing responses greedily, and all of them with --regenerate. A row can name, as
`question`, the text that asks about what stands before it; training can hide it from the lookahead
tokens (--hide-question). Rows are written shard by shard; a restarted run skips finished shards.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import tyro
from tqdm import tqdm

from lookahead_jax.checkpoints.load import Model, load
from lookahead_jax.generation.generate import generate
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.host.files import atomic_path, atomic_write, make_folder
from lookahead_jax.host.lock import folder_lock
from lookahead_jax.host.run_folder import keep_settings
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.policies.full import Full
from lookahead_jax.prefilling.batching import bucket_length, check_tokens
from lookahead_jax.train.progress import say
from lookahead_jax.train.training_data import COMPLETE, FEATURES, shard_path

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_HUB = "hf:"  # with a prefix, a mistyped file name does not become a request to a server


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Tokenize prompts and responses, and generate missing responses."""

    model: Path
    """Folder of the model that the modules are for. Its own responses train best."""
    source: tuple[str, ...]
    """JSON lines or parquet files, or hf:owner/name[:subset][@split] (default split: train). Rows
    have `messages`, or `prompt` and optionally `response`; and optionally `question`, text within
    the last message or the prompt."""
    out: Path
    """Folder for the token rows, made if it does not exist."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; None: that of the checkpoint."""
    limit: int | None = None
    """Maximum number of source rows to read; None: all."""
    max_prompt: int = 16384
    """Longest prompt in tokens; rows with a longer one are left out."""
    max_response: int = 512
    """Longest response in tokens; longer ones are cut."""
    regenerate: bool = False
    """Generate every response, also where the source has one."""
    batch: int = 16
    """Most responses to generate at a time."""
    batch_tokens: int = 16384
    """Most prompt tokens to read at a time, padding included; it makes batches of long prompts
    small. A single prompt may have more."""
    shard_rows: int = 256
    """Source rows per shard; a crash loses at most one shard."""
    part: int = 0
    """Index of this process among `parts`; each writes its own shards into the same folder."""
    parts: int = 1
    """Number of processes that share the work."""


def prepare(config: DataConfig) -> None:
    """Writes the token rows into `config.out`; a restarted run skips finished shards.

    Raises ValueError for rows it cannot read and for a folder begun with other settings,
    BlockingIOError if another process does this part of the work.
    """
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"--limit must be at least 1, not {config.limit}")
    if (
        min(config.batch, config.batch_tokens) < 1
        or config.shard_rows < 1
        or not 0 <= config.part < config.parts
    ):
        raise ValueError(
            f"--batch {config.batch}, --batch-tokens {config.batch_tokens}, --shard-rows "
            f"{config.shard_rows}, --part {config.part}, --parts {config.parts}: sizes must be at "
            "least 1, and part must be below parts"
        )
    make_folder(config.out)
    with folder_lock(config.out, f"lock.{config.part}"):
        _prepare(config)


def _prepare(config: DataConfig) -> None:
    """`prepare`, as the only process with this part of the work."""
    say(f"loading {config.model}")
    model = load(config.model, dtype=config.dtype)
    settings = {
        "base_fingerprint": fingerprint(model.params),
        "source": [str(path) for path in config.source],
        **{
            n: getattr(config, n)
            for n in ("limit", "max_prompt", "max_response", "regenerate", "shard_rows")
        },
    }
    keep_settings(config.out, settings, "shard-*")
    datasets.disable_progress_bars()
    rows, shards = itertools.islice(read_sources(config.source), config.limit), 0
    with tqdm(total=config.limit, unit=" rows", desc=str(config.out)) as progress:
        while part := list(itertools.islice(rows, config.shard_rows)):
            path = shard_path(config.out, shards)
            if shards % config.parts == config.part and not path.is_dir():
                first = shards * config.shard_rows
                with atomic_path(path) as temporary:
                    prepare_rows(part, model, config, first).save_to_disk(temporary)
            shards += 1
            progress.update(len(part))
    if all(shard_path(config.out, number).is_dir() for number in range(shards)):
        summary = settings | {"shards": shards}
        atomic_write(config.out / COMPLETE, json.dumps(summary, indent=2) + "\n")


def read_sources(sources: Sequence[str | os.PathLike[str]]) -> Iterator[dict[str, Any]]:
    """The rows of the sources in order, read as a stream (a restart reads them again)."""
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
    """Prompts and responses as ids, from source rows of which the first has number `first`."""
    made = []
    for number, row in enumerate(rows, start=first):
        try:
            tokens = tokenize(row, model)
        except ValueError as error:
            raise ValueError(f"source row {number}: {error}") from error
        if 0 < len(tokens.prompt) <= config.max_prompt:
            known = [] if config.regenerate else tokens.response[: config.max_response]
            made.append(tokens._replace(response=known))
    lengths = {i: len(row.prompt) for i, row in enumerate(made) if not row.response}
    for chosen, size in batches(lengths, batch=config.batch, tokens=config.batch_tokens):
        filled = chosen + chosen[-1:] * (size - len(chosen))
        prompts = [made[i].prompt for i in filled]
        answers = generate(
            model, prompts, policy=Full(), max_new_tokens=config.max_response, burst=64
        ).tokens
        for i, answer in zip(chosen, answers, strict=False):
            made[i] = made[i]._replace(response=answer)
    return datasets.Dataset.from_list([row._asdict() for row in made], features=FEATURES)


def batches(
    lengths: Mapping[int, int], *, batch: int, tokens: int
) -> Iterator[tuple[list[int], int]]:
    """Rows of similar length to generate together, and the number of rows to compile for.

    `lengths` are tokens by row. At most `batch` rows and `tokens` padded prompt tokens come
    together, longest first. The number is a power of two, so that few programs are compiled.
    """
    rows = sorted(lengths, key=lambda row: lengths[row], reverse=True)
    while rows:
        fit = max(1, min(batch, tokens // bucket_length(lengths[rows[0]])))
        size = 1 << (fit.bit_length() - 1)
        chosen, rows = rows[:size], rows[size:]
        yield chosen, min(size, 1 << (len(chosen) - 1).bit_length())


class TokenRow(NamedTuple):
    """A source row as token ids."""

    prompt: list[int]
    response: list[int]  # empty if it is still to be generated
    question: int = 0  # last tokens of the prompt, from where the question begins; 0 without one


def tokenize(row: dict[str, Any], model: Model) -> TokenRow:
    """The tokens of a source row.

    Raises ValueError for a row without messages and prompt, a question that does not occur in
    them, and ids outside the vocabulary.
    """
    messages = row.get("messages")
    if messages:
        *before, last = [
            {k: v for k, v in message.items() if v is not None} for message in messages
        ]
        if last.get("role") != "assistant":
            before, last = [*before, last], {}
        text = _tokenizer(model).render_chat(before)
        prompt = _tokenizer(model).encode(text, special=False)
        response = _ids(last.get("content") or [], model, behind=True)
        return TokenRow(prompt, response, _asked(row, text, prompt, model, special=False))
    if row.get("prompt") is None:
        raise ValueError(f"has neither messages nor a prompt, only {', '.join(row) or 'nothing'}")
    text, prompt = row["prompt"], _ids(row["prompt"], model)
    response = _ids(row.get("response") or [], model, behind=True)
    return TokenRow(prompt, response, _asked(row, text, prompt, model, special=True))


def _asked(
    row: dict[str, Any],
    text: str | Sequence[int],
    prompt: list[int],
    model: Model,
    *,
    special: bool,
) -> int:
    """Tokens of the prompt from where the row's question begins, at its last occurrence."""
    question = (row.get("question") or "").strip()
    if not question:
        return 0
    if not isinstance(text, str) or question not in text:
        raise ValueError(f"the question {question[:40]!r} does not occur in the prompt's text")
    at = text.rfind(question)
    before = _tokenizer(model).encode(text[:at], special=special)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, prompt, strict=False))
    return len(prompt) - sum(1 for _ in same)


def _ids(content: str | Sequence[int], model: Model, *, behind: bool = False) -> list[int]:
    if isinstance(content, str):
        tokenizer = _tokenizer(model)
        return tokenizer.encode_behind(content) if behind else tokenizer.encode(content)
    if content:
        check_tokens(np.asarray([content]), config=model.config)
    return list(content)


def _tokenizer(model: Model):
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer.json: give token ids instead of texts")
    return model.tokenizer


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    prog = "lookahead train data"
    return run_command(lambda: tyro.cli(DataConfig, args=args, prog=prog), prepare, prog=prog)


if __name__ == "__main__":
    end_process(main())
