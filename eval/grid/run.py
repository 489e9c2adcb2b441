"""Runs a grid: answers, scores, time to the first token and peak memory in the same run.

Models run one after the other. The examples of a task and length are made once, and every cell
answers them in batches. Rows that the folder already has are skipped.
"""

import contextlib
import itertools
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from tqdm import tqdm

import lookahead_jax as lk
from lookahead_jax.checkpoints.load import Model, first_layers
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.eval.grid.batch import Answered, GridBatch
from lookahead_jax.eval.grid.config import (
    PROG,
    Method,
    RunConfig,
    cells,
    method_of,
    model_folder,
    modules_folder,
    parse_run,
    policy_of,
    settings,
)
from lookahead_jax.eval.grid.peak import Peak
from lookahead_jax.eval.grid.prompts import AssembledPrompt, assemble
from lookahead_jax.eval.grid.rows import (
    ROWS,
    VIEWS,
    GridCell,
    Key,
    RowFile,
    key_of,
    read_rows,
)
from lookahead_jax.eval.grid.stored import answer_rows, kept_views
from lookahead_jax.eval.tasks.base import Example, Source, Task
from lookahead_jax.generation.results import Generation
from lookahead_jax.host.command import run_command
from lookahead_jax.host.files import make_folder
from lookahead_jax.host.lock import folder_lock
from lookahead_jax.host.run_folder import keep_settings
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.policies.base import WithDraft, WithModules
from lookahead_jax.prompts.kv_prediction import Predictor, load_predictor
from lookahead_jax.prompts.speculation import select_tokens, speculate

FULL = lk.make_policy("full")


def load_model(config: RunConfig, name: str) -> tuple[Model, Tokenizer, LookaheadModules | None]:
    """A model of the grid on the run's mesh, and its modules."""
    mesh = None
    if jax.device_count() > 1 or config.tensor * config.fsdp * config.expert > 1:
        mesh = make_mesh(tensor=config.tensor, fsdp=config.fsdp, expert=config.expert)
    model = lk.load(model_folder(name), dtype=config.dtype, mesh=mesh, weights=config.weights)
    if model.tokenizer is None:
        raise ValueError(f"{name}: the tasks are texts, and this model has no tokenizer.json")
    folder = modules_folder(config, name)
    needed = any(isinstance(policy_of(spec).reading, WithModules) for spec in config.policies)
    modules = None
    if needed:
        if folder is None:
            raise ValueError(f"{name}: lookaheadkv needs --lookahead, the folder of its modules")
        modules = lk.load_modules(folder, params=model.params, config=model.config)
    return model, model.tokenizer, modules


class ModelRun:
    """One model of a run, and the run's files."""

    def __init__(
        self, config: RunConfig, name: str, done: dict[Key, str], rows: RowFile, views: RowFile
    ):
        self._config = config
        self._done = done
        self._rows, self._views = rows, views
        self._model, self._tokenizer, self._modules = load_model(config, name)
        self._draft: Model | None = None
        if any(method_of(spec).speculates for spec in config.policies):
            if config.draft_model is None:
                raise ValueError("speckv and specpc need a small model: give --draft-model")
            self._draft = lk.load(model_folder(config.draft_model), dtype=config.dtype)
            if config.draft_layers is not None:
                self._draft = first_layers(self._draft, config.draft_layers)
        self._predictor: Predictor | None = None
        if any(method_of(spec).predicts for spec in config.policies):
            if config.kv_maps is None:
                raise ValueError("kv_prediction needs the folder of its maps: give --kv-maps")
            self._predictor = load_predictor(config.kv_maps, self._model)
        self._warm: set[tuple] = set()
        self._batches = 0

    @property
    def max_position(self) -> int:
        """The number of positions that the model was trained for."""
        return self._model.config.max_position

    def prompts(self, task: Task, length: int) -> tuple[list[Example], list[AssembledPrompt]]:
        """This run's share of the task's examples at a length, with their prompts."""
        source = Source(
            tokenizer=self._tokenizer, length=length, count=self._config.count,
            seed=self._config.seed, data=self._config.data,
        )  # fmt: skip
        share = slice(self._config.part, None, self._config.parts)
        examples, made = self._assembled(task.make(source), length)
        return examples[share], made[share]

    def _assembled(
        self, examples: list[Example], length: int
    ) -> tuple[list[Example], list[AssembledPrompt]]:
        """Examples with their prompts, the short ones first."""
        chat = self._config.chat and bool(self._tokenizer.chat_templates)
        made = [assemble(e, self._tokenizer, limit=length, chat=chat) for e in examples]
        order = sorted(range(len(made)), key=lambda i: len(made[i].whole))
        return [examples[i] for i in order], [made[i] for i in order]

    def answer(
        self,
        cell: GridCell,
        task: Task,
        examples: Sequence[Example],
        prompts: Sequence[AssembledPrompt],
    ) -> Iterator[int]:
        """Answers the missing examples of a cell in batches; yields the number answered each time.

        Later turns of a dialogue follow when the earlier ones have been answered.
        """
        missing = [i for i, e in enumerate(examples) if (cell, e.id) not in self._done]
        if cell.protocol == "hidden":
            missing = [i for i in missing if prompts[i].question]
        yield len(examples) - len(missing)
        drafter = make_drafter(cell.drafter)
        size = self._config.batch
        for at in range(0, len(missing), size):
            group = missing[at : at + size]
            chosen, rows = [examples[i] for i in group], [prompts[i] for i in group]
            result, measured = self._answer_batch(self._batch(cell, chosen, rows), drafter)
            self._store(Answered(cell, chosen, rows, result, measured), task)
            yield len(group)
        if task.follow is not None:
            said = [(e, self._done.get((cell, e.id))) for e in examples]
            turns = [task.follow(e, answer) for e, answer in said if answer is not None]
            if later := [example for example in turns if example is not None]:
                for _ in self.answer(cell, task, *self._assembled(later, cell.length)):
                    yield 0  # progress counts first turns

    def _batch(
        self, cell: GridCell, examples: Sequence[Example], prompts: Sequence[AssembledPrompt]
    ) -> GridBatch:
        """A batch of the run's size; a short one is padded, so that it compiles nothing new."""
        rows = [prompts[i % len(prompts)] for i in range(self._config.batch)]
        hidden = cell.protocol == "hidden"
        most = max(example.max_new_tokens for example in examples)
        return GridBatch(
            cell=cell,
            method=method_of(cell.policy),
            contexts=[row.context if hidden else row.whole for row in rows],
            questions=[row.question for row in rows] if hidden else None,
            new_tokens=min(most, self._config.max_new_tokens or most),
            stop=examples[0].stop,
        )

    def _answer_batch(self, batch: GridBatch, drafter: Any) -> tuple[Generation, dict[str, Any]]:
        """The answers and the measurements.

        The first batch of a shape runs twice, so that no measurement includes compilation.
        """
        pair = self._config.pair_times
        if batch.compiled_as not in self._warm:
            self._generate(batch, make_drafter(batch.cell.drafter))
            if pair:
                self._read_full(batch)
            self._warm.add(batch.compiled_as)
        self._batches += 1
        # The full cache is read before and after the policy in turn.
        full = self._read_full(batch) if pair and self._batches % 2 else None
        peak = Peak()
        result, first = self._generate(batch, drafter)
        memory, bound = peak.read()
        if pair and full is None:
            full = self._read_full(batch)
        measured = {
            "batch": len(batch.contexts),
            "ttft_s": first,
            "full_ttft_s": full,
            "decode_tokens_per_s": result.timing.decode_tokens_per_s,
            "peak_bytes": memory,
            "peak_is_bound": bound,
            "cache_bytes": result.cache.bytes,
            "full_bytes": None if batch.method.prune is not None else result.cache.full_bytes,
            "draft_lengths": result.drafting.histogram,
        }
        if batch.method.speculates:
            config = self._config
            measured |= {"draft_model": config.draft_model, "draft_layers": config.draft_layers}
        return result, measured

    def _generate(self, batch: GridBatch, drafter: Any) -> tuple[Generation, float]:
        """The answers, and the seconds to the first token, a small model's work included."""
        begin = time.perf_counter()
        read, drafts = self._speculate(batch.method, batch.contexts, batch.cell.budget)
        spent = time.perf_counter() - begin
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the policy's notice was shown once, at the start
            result = lk.generate(
                self._model, read, questions=batch.questions, policy=batch.method.policy,
                budget=max(batch.cell.budget, 1), max_new_tokens=batch.new_tokens,
                lookahead=self._modules, drafts=drafts, drafter=drafter, stop=batch.stop,
                reader=self._predictor if batch.method.predicts else None,
                cache_dtype=self._config.cache_dtype,
            )  # fmt: skip
        return result, result.timing.ttft_s + spent

    def _read_full(self, batch: GridBatch) -> float:
        """Seconds to the first token with the full cache."""
        result = lk.generate(
            self._model, batch.contexts, questions=batch.questions, policy=FULL, max_new_tokens=1,
            cache_dtype=self._config.cache_dtype,
        )  # fmt: skip
        return result.timing.ttft_s

    def _speculate(
        self, method: Method, rows: list[list[int]], budget: int
    ) -> tuple[list[list[int]], list[list[int]] | None]:
        """The prompts shortened by the small model, and its answers, if the method uses it."""
        if self._draft is None or not method.speculates:
            return rows, None
        reading = method.policy.reading
        found = speculate(
            self._draft, rows, tokens=reading.tokens if isinstance(reading, WithDraft) else 1,
            eos_ids=self._model.generation.eos_ids, attention=method.prune is not None,
        )  # fmt: skip
        if found.attention is not None:
            keep = method.prune or budget
            chosen = [select_tokens(a, keep, **method.select) for a in found.attention]
            rows = [[row[i] for i in kept] for row, kept in zip(rows, chosen, strict=True)]
        return rows, found.answers

    def _store(self, batch: Answered, task: Task) -> None:
        """Scores a batch and stores its rows and views."""
        rows = answer_rows(batch, task, self._tokenizer)
        self._rows.append(rows)
        self._done |= {key_of(row): row["predicted_answer"] for row in rows}
        if batch.cell.budget and method_of(batch.cell.policy).prune is None:
            self._views.append(kept_views(batch, self._tokenizer, self._config.views))


def open_run(config: RunConfig) -> tuple[dict[Key, str], RowFile, RowFile]:
    """The run's folder: the answers it has, and the files for new rows and views.

    Raises ValueError if an earlier run in this folder had other or unknown settings, or if the
    folder holds foreign rows.
    """
    keep_settings(config.out, settings(config), ROWS)
    rows = config.out / ROWS
    done = {key_of(row): row["predicted_answer"] for row in read_rows(rows)}
    return done, RowFile(rows), RowFile(config.out / VIEWS)


def run(config: RunConfig) -> None:
    """Answers every cell of the grid that the run does not hold yet; progress goes to stderr.

    Raises ValueError as `open_run`, and BlockingIOError if another process writes the run.
    """
    tasks = config.find_tasks()
    make_folder(config.out)
    with folder_lock(config.out):
        _answer_grid(config, tasks)


def _answer_grid(config: RunConfig, tasks: Sequence[Task]) -> None:
    """`run`, as the only process that writes the folder."""
    for spec in config.policies:
        for budget in config.budgets:
            if (notice := policy_of(spec).notice(budget)) is not None:
                _say(f"notice: {spec} at {budget}: {notice}")
    done, rows, views = open_run(config)
    grid = [c for t in tasks for n in config.lengths for c in cells(config, "", t.name, n)]
    count = len(range(config.part, config.count, config.parts))
    total = len(grid) * count * len(config.models)
    with contextlib.closing(rows), contextlib.closing(views), tqdm(total=total) as bar:
        for name in config.models:
            bar.set_description(f"loading {name}")
            model = ModelRun(config, name, done, rows, views)
            for task, length in itertools.product(tasks, config.lengths):
                if length > model.max_position:
                    _say(f"notice: {length} tokens exceed the {model.max_position} of {name}")
                bar.set_description(f"{task.name} {length}: making prompts")
                examples, prompts = model.prompts(task, length)
                for cell in cells(config, name, task.name, length):
                    bar.set_description(f"{task.name} {length}, {cell.policy} {cell.budget or ''}")
                    answered = 0
                    for more in model.answer(cell, task, examples, prompts):
                        answered += more
                        bar.update(more)
                    bar.update(count - answered)


def _say(message: str) -> None:
    """Writes a line to stderr, above the progress bar."""
    tqdm.write(message, file=sys.stderr)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    given = list(sys.argv[1:] if args is None else args)
    return run_command(lambda: parse_run(given, PROG), run, prog=PROG)
