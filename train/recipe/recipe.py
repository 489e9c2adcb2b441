"""From nothing to lookahead modules for a model, with one command.

    lookahead train recipe CONFIG [--prompts N ...]

CONFIG is a JSON file, or the name of one in train/configs/recipes (`smollm2`); any field can be set
on the command line. The command makes prompts from text that every machine has, lets the model
answer them, and trains modules on what its answers attend to. Prompts and answers are made shard by
shard, and training follows them, so that there are modules long before the end. The same command
goes on after an interruption; a longer one (`--prompts`) reuses the shards of a shorter one with
another `--run`.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from tqdm import tqdm

from lookahead_jax.checkpoints.load import Model, load
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.host.config_files import cli_with_file
from lookahead_jax.host.files import atomic_path, atomic_write, make_folder
from lookahead_jax.host.lock import folder_lock
from lookahead_jax.host.run_folder import keep_settings
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.modules.definition import LookaheadConfig
from lookahead_jax.modules.files import CONFIG_FILE
from lookahead_jax.train import data, lookahead
from lookahead_jax.train.forwards import bytes_per_token
from lookahead_jax.train.loss import PAPER, LossConfig, check_loss
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from lookahead_jax.train.progress import say
from lookahead_jax.train.recipe import estimate
from lookahead_jax.train.recipe.material import read_material
from lookahead_jax.train.recipe.prompts import Maker, prompt
from lookahead_jax.train.step import check_batch
from lookahead_jax.train.training_data import COMPLETE, GROUP, check_hide_question, shard_path

_PRESETS = Path(__file__).parents[1] / "configs" / "recipes"
_PROG = "lookahead train recipe"
_FORWARDS = "forwards"
_ROWS = 16  # most responses to generate at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """Make prompts and responses for a model, and train lookahead modules on them."""

    model: Path
    """The base model, which is not changed: anything that --model of other commands takes."""
    modules: LookaheadConfig
    optimizer: OptimizerConfig
    loss: LossConfig = PAPER
    prompts: int
    """Number of prompts."""
    epochs: int
    """Number of epochs."""
    batch: int
    """Rows per update."""
    shortest: int
    """Tokens of the shortest prompts; lengths are distributed log-uniformly."""
    longest: int
    """Tokens of the longest prompts."""
    max_response: int
    """Longest response in tokens; longer ones are cut."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the base model's weights and activations in this run; None: the checkpoint's own.
    Responses and forwards that exist already are used, whatever type made them."""
    source: tuple[str, ...] = ()
    """More text for the prompts, as for `lookahead train data`: files, or hf:owner/name. Rows have
    `text`, `prompt` or `messages`."""
    source_rows: int = 2000
    """Most rows to read of the sources."""
    folder: Path | None = None
    """Where everything is kept. None: the folder named as CONFIG in
    ~/.cache/lookahead_jax/recipes."""
    run: str = "run"
    """Folder of the training run inside `folder`: runs with other sizes or seeds need another, and
    share prompts and responses."""
    start: Path | None = None
    """Folder of modules of the same sizes to start from, with or without a memory; None: random
    ones."""
    seed: int = 0
    """Seed of the initial modules and of the order of the rows."""
    prompt_seed: int = 0
    """Seed of the prompts."""
    shard_rows: int = 128
    """Prompts per shard; an interruption loses at most the responses of one."""
    hide_question: float = 0.0
    """Share of the prompts with a question behind their text in which the lookahead tokens do not
    see it, as for `lookahead train lookahead`."""
    keep_forwards: bool = True
    """Keep on disk what the base model computes for each prompt, so that later epochs and other
    runs do not compute it again."""
    save_every: int = 16
    """Steps between checkpoints, each of which exports the modules."""
    batch_tokens: int = 12288
    """Most prompt tokens to read at a time while responses are generated."""

    @property
    def shards(self) -> int:
        return self.prompts // self.shard_rows

    @property
    def steps(self) -> int:
        return self.epochs * (self.prompts // self.batch)


Config = TypeVar("Config", bound=RecipeConfig)


def parse_config(kind: type[Config], args: Sequence[str], prog: str) -> Config:
    """CONFIG and overrides -> the recipe; ValueError or UsageError as `cli_with_file`."""
    config = cli_with_file(kind, args, _PRESETS, prog)
    if config.folder is None:
        name = Path(args[0]).stem if not args[0].startswith("-") else "recipe"
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = Path(base).expanduser() / "lookahead_jax" / "recipes" / name
        config = dataclasses.replace(config, folder=folder)
    return config


def run_recipe(config: RecipeConfig) -> None:
    """Makes what is missing of prompts, responses and training, in turn.

    Raises ValueError for sizes that do not fit one another or the model, or a folder begun with
    others, BlockingIOError if another process works in the folder, KeyboardInterrupt on Ctrl-C or
    SIGTERM, after saving what there is.
    """
    _check(config)
    folder = make_folder(folder_of(config))
    with folder_lock(folder), _sigterm_interrupts():
        say(f"working in {folder}")
        say(f"loading {config.model}")
        model = load(config.model, dtype=config.dtype)
        _tokenizer(model)
        keep_settings(folder / "data", _settings(config, model), "shard-*")
        _write_prompts(config, model)
        _alternate(config, model)
    say(f"done: the modules are in {folder / config.run / 'modules'}")


def _alternate(config: RecipeConfig, model: Model) -> None:
    """Responses for some shards, then the steps they allow, until all steps are done."""
    ready = 0
    while True:
        ready = _make_responses(config, model, ready)
        try:
            if lookahead.train(_training(config)) is None:
                raise KeyboardInterrupt
            return
        except lookahead.RowsMissing:
            continue


def _check(config: RecipeConfig) -> None:
    if min(config.prompts, config.epochs, config.batch, config.shard_rows) < 1:
        raise ValueError("prompts, epochs, batch and shard_rows must be at least 1")
    if config.prompts % config.shard_rows:
        raise ValueError(
            f"--prompts {config.prompts} must be a multiple of --shard-rows {config.shard_rows}"
        )
    if not 64 <= config.shortest <= config.longest:
        raise ValueError(
            f"--shortest {config.shortest}, --longest {config.longest}: expected 64 or more, in "
            "this order"
        )
    if config.start is not None and not (config.start / CONFIG_FILE).is_file():
        raise ValueError(f"--start {config.start} holds no modules: give their folder")
    check_loss(config.modules, config.loss)
    check_hide_question(config.hide_question)
    check_batch(config.batch, 1, make_mesh(data=None, fsdp=1, tensor=1))
    make_optimizer(config.optimizer, config.steps)  # refuses a warm-up that is too long


def folder_of(config: RecipeConfig) -> Path:
    """Where a recipe keeps everything; `parse_config` sets it."""
    if config.folder is None:
        raise ValueError("the recipe has no folder: set `folder`")
    return config.folder


def _settings(config: RecipeConfig, model: Model) -> dict[str, object]:
    """What decides on the rows of a shard."""
    names = ("shortest", "longest", "max_response", "prompt_seed", "shard_rows", "source_rows")
    return {
        "base_fingerprint": fingerprint(model.params),
        "source": list(config.source),
        **{name: getattr(config, name) for name in names},
    }


def _tokenizer(model: Model) -> Tokenizer:
    if model.tokenizer is None or not model.tokenizer.chat_templates:
        raise ValueError(f"{model.path} has no chat template: take a model for chats")
    return model.tokenizer


def _training(config: RecipeConfig) -> lookahead.TrainConfig:
    folder = folder_of(config)
    return lookahead.TrainConfig(
        model=config.model, data=(folder / "data",), run=folder / config.run,
        modules=config.modules, optimizer=config.optimizer, loss=config.loss, steps=config.steps,
        batch=config.batch, seed=config.seed, dtype=config.dtype, start=config.start,
        shards=config.shards, hide_question=config.hide_question, save_every=config.save_every,
        keep=1, log_every=1, forwards=folder / _FORWARDS if config.keep_forwards else None,
    )  # fmt: skip


def prompt_file(folder: Path, shard: int) -> Path:
    """The file with the prompts of a shard, as JSON lines."""
    return folder / "prompts" / f"shard-{shard:05d}.jsonl"


def _write_prompts(config: RecipeConfig, model: Model) -> None:
    """Writes the prompts of the shards that have none; after one, says how long all will take."""
    folder = folder_of(config)
    missing = [n for n in range(config.shards) if not prompt_file(folder, n).is_file()]
    if not missing:
        _tell_plan(config, model, 0, 0.0)
        return
    make_folder(folder / "prompts")
    say("reading documentation and code of this machine")
    sources = itertools.islice(data.read_sources(config.source), config.source_rows)
    maker = Maker(
        material=read_material(list(sources)), tokenizer=_tokenizer(model),
        seed=config.prompt_seed, lengths=(config.shortest, config.longest),
    )  # fmt: skip
    begin = time.perf_counter()
    for shard in tqdm(missing, desc="prompts", unit="shard"):
        first = shard * config.shard_rows
        rows = [prompt(maker, first + i) for i in range(config.shard_rows)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        atomic_write(prompt_file(folder, shard), lines)
        if shard == missing[0]:
            seconds = (time.perf_counter() - begin) / config.shard_rows
            _tell_plan(config, model, len(missing) - 1, seconds)


def _tell_plan(config: RecipeConfig, model: Model, shards: int, prompt_s: float) -> None:
    """Says how long what is missing will take; `shards` have no prompts yet."""
    folder = folder_of(config)
    rows = [json.loads(line) for line in prompt_file(folder, 0).read_text().splitlines()]
    ids = [data.tokenize(row, model).prompt for row in rows]
    file = folder / estimate.file_name(config.loss, config.dtype)
    if not file.is_file():
        say("measuring how long a batch of each phase takes")
    rates = estimate.rates(file, model, ids, config.modules, loss=config.loss, prompt_s=prompt_s)
    lengths = dict(enumerate(map(len, ids)))
    plan = data.batches(lengths, batch=_ROWS, tokens=config.batch_tokens)
    answers = (
        sum(lengths.values()) * rates.read + len(list(plan)) * config.max_response * rates.decode
    )
    unanswered = sum(not shard_path(folder / "data", n).is_dir() for n in range(config.shards))
    log = folder / config.run / "metrics.jsonl"
    steps = config.steps - (len(log.read_text().splitlines()) if log.is_file() else 0)
    mean = sum(lengths.values()) / len(lengths)
    passes = steps * config.batch
    if config.keep_forwards:
        missing = max(config.prompts - len(list((folder / _FORWARDS).glob("*.npz"))), 0)
        if not log.is_file():  # a prompt without its question is another row
            missing = max(missing, round(config.hide_question * config.prompts))
        passes = min(passes, missing)
        _check_disk(folder, int(passes * mean * bytes_per_token(model.config)))
    trained = mean * (passes * rates.forward + steps * config.batch * rates.learn)
    minutes = [
        shards * config.shard_rows * rates.prompt / 60, unanswered * answers / 60, trained / 60,
    ]  # fmt: skip
    say(
        f"on this machine, about {minutes[0]:.0f} min for {shards * config.shard_rows} prompts, at "
        f"most {minutes[1]:.0f} min for {unanswered * config.shard_rows} responses and "
        f"{minutes[2]:.0f} min for {steps} steps, and some more for compiling; responses and steps "
        f"take turns, and {folder / config.run / 'modules'} is written every {config.save_every} "
        "steps"
    )


def _check_disk(folder: Path, needed: int) -> None:
    """Says what the base forwards take; ValueError if the disk has not that much."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder / _FORWARDS} needs {needed / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} "
            "GB: give another --folder, fewer --prompts, or --no-keep-forwards"
        )
    say(f"{folder / _FORWARDS} will grow by {needed / 1e9:.1f} GB; it can be deleted afterwards")


def _make_responses(config: RecipeConfig, model: Model, ready: int) -> int:
    """Responses for the shards that the next group of steps needs; how many shards there are."""
    folder = folder_of(config)
    group = -(-GROUP * config.batch // config.shard_rows)
    until = min(config.shards, ready + group)
    making = data.DataConfig(
        model=config.model, source=(), out=folder / "data", max_prompt=config.longest,
        max_response=config.max_response, batch=_ROWS, batch_tokens=config.batch_tokens,
    )  # fmt: skip
    missing = [n for n in range(until) if not shard_path(making.out, n).is_dir()]
    for shard in tqdm(missing, desc=f"responses, of {config.shards} shards", unit="shard"):
        rows = [json.loads(line) for line in prompt_file(folder, shard).read_text().splitlines()]
        with atomic_path(shard_path(making.out, shard)) as temporary:
            made = data.prepare_rows(rows, model, making, shard * config.shard_rows)
            made.save_to_disk(temporary)
    if until == config.shards:  # `lookahead train study` can then read the folder
        summary = _settings(config, model) | {"shards": until}
        atomic_write(making.out / COMPLETE, json.dumps(summary, indent=2) + "\n")
    return until


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM acts as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    given = list(sys.argv[1:] if args is None else args)
    again = f"interrupted; to go on: {shlex.join([*_PROG.split(), *given])}"
    return run_command(
        lambda: parse_config(RecipeConfig, given, _PROG),
        run_recipe,
        prog=_PROG,
        interrupted_with=again,
    )


if __name__ == "__main__":
    end_process(main())
