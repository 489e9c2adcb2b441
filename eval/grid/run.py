"""Runs a grid: answers, scores, time to the first token and peak memory in the same run.

Models run one after the other. The examples of a task and length are made once, and every cell
answers them in batches. Rows that the folder already has are skipped.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.eval.grid.answering import Answerer
from lookahead_jax.eval.grid.batch import Answered, GridBatch, groups_of
from lookahead_jax.eval.grid.config import (
    PROG,
    RunConfig,
    cells,
    method_of,
    parse_run,
    policy_of,
    settings,
    strategies_of,
)
from lookahead_jax.eval.grid.pins import check_pins
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
from lookahead_jax.eval.grid.strategies import (
    NONE,
    decoding_of,
    reward_of,
)
from lookahead_jax.eval.tasks.base import Example, Source, Task
from lookahead_jax.generation.results import Generation
from lookahead_jax.host.command import run_command
from lookahead_jax.host.files import make_folder
from lookahead_jax.host.lock import folder_lock
from lookahead_jax.host.run_folder import keep_settings
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.strategies.search import SearchResult


class ModelRun:
    """One model of a run, and the run's files."""

    def __init__(
        self, config: RunConfig, name: str, done: dict[Key, str], rows: RowFile, views: RowFile
    ):
        self._config = config
        self._done = done
        self._rows, self._views = rows, views
        self._answerer = Answerer(config, name)
        self._tokenizer = self._answerer.tokenizer

    @property
    def max_position(self) -> int:
        """The number of positions that the model was trained for."""
        return self._answerer.model.config.max_position

    @property
    def modules(self) -> LookaheadModules | None:
        """The lookahead modules, if a policy of the run reads them."""
        return self._answerer.modules

    def prompts(self, task: Task, length: int) -> tuple[list[Example], list[AssembledPrompt]]:
        """This run's share of the task's examples at a length, with their prompts."""
        source = Source(
            tokenizer=self._tokenizer, length=length, count=self._config.count,
            seed=self._config.seed, data=self._config.data,
        )  # fmt: skip
        examples, made = self._assembled(task.make(source), length)
        share = groups_of(examples)[self._config.part :: self._config.parts]
        chosen = list(itertools.chain(*share))
        return [examples[i] for i in chosen], [made[i] for i in chosen]

    def _assembled(
        self, examples: list[Example], length: int
    ) -> tuple[list[Example], list[AssembledPrompt]]:
        """Examples with their prompts, the short ones first."""
        chat = self._config.chat and bool(self._tokenizer.chat_templates)
        made = [assemble(e, self._tokenizer, limit=length, chat=chat) for e in examples]
        groups = sorted(groups_of(examples), key=lambda g: max(len(made[i].whole) for i in g))
        order = list(itertools.chain(*groups))
        return [examples[i] for i in order], [made[i] for i in order]

    def answer(
        self,
        cells: Sequence[GridCell],
        task: Task,
        examples: Sequence[Example],
        prompts: Sequence[AssembledPrompt],
    ) -> Iterator[int]:
        """Answers the missing examples of cells in batches; yields the number answered each time.

        Later turns of a dialogue follow when the earlier ones have been answered.
        """
        missing = {cell: self._missing(cell, examples, prompts) for cell in cells}
        yield len(cells) * len(examples) - sum(map(len, missing.values()))
        drafters = {cell: make_drafter(cell.drafter) for cell in cells}
        wanted = set().union(*missing.values())
        left = [group for group in groups_of(examples) if not wanted.isdisjoint(group)]
        for groups in _batches(left, self._config.batch):
            places = list(itertools.chain(*groups))
            chosen, rows = [examples[i] for i in places], [prompts[i] for i in places]
            lacking = [cell for cell in cells if not missing[cell].isdisjoint(places)]
            batches = [self._batch(cell, task, chosen, rows) for cell in lacking]
            for cell, (result, measured) in zip(
                lacking, self._answered(batches, drafters), strict=True
            ):
                self._store(Answered(cell, chosen, rows, result, measured), task)
                yield len(missing[cell].intersection(places))
        if task.follow is None:
            return
        for cell in cells:
            said = [(e, self._done.get((cell, e.id))) for e in examples]
            turns = [task.follow(e, answer) for e, answer in said if answer is not None]
            if later := [example for example in turns if example is not None]:
                for _ in self.answer([cell], task, *self._assembled(later, cell.length)):
                    yield 0  # progress counts first turns

    def _missing(
        self, cell: GridCell, examples: Sequence[Example], prompts: Sequence[AssembledPrompt]
    ) -> set[int]:
        """The examples that a cell has and the run does not hold."""
        missing = {i for i, e in enumerate(examples) if (cell, e.id) not in self._done}
        if cell.protocol == "hidden":
            return {i for i in missing if prompts[i].question}
        return {i for i in missing if not examples[i].group}

    def _answered(
        self, batches: Sequence[GridBatch], drafters: Mapping[GridCell, Any]
    ) -> Iterator[tuple[Generation | SearchResult, dict[str, Any]]]:
        """The answers and measurements of batches with the same prompts."""
        if self._config.share_reading:
            yield from self._answerer.answer_shared(batches)
            return
        for batch in batches:
            yield self._answerer.answer(batch, drafters[batch.cell])

    def _batch(
        self,
        cell: GridCell,
        task: Task,
        examples: Sequence[Example],
        prompts: Sequence[AssembledPrompt],
    ) -> GridBatch:
        """A batch of the run's size; a short one is padded, so that it compiles nothing new."""
        config, method = self._config, method_of(cell.policy)
        questions = len(groups_of(examples)[0])  # of each context
        size = max(config.batch // questions, 1) * questions
        places = [i % len(prompts) for i in range(size)]
        rows = [prompts[i] for i in places]
        read = rows[::questions]
        hidden = cell.protocol == "hidden"
        decoding = decoding_of(cell.strategy)
        compares = decoding.strategy is not None and decoding.strategy.reads_reward is not False
        most = max(example.max_new_tokens for example in examples)
        if config.max_new_tokens is not None:
            most = min(most, config.max_new_tokens)
        if config.most_tokens is not None:
            most = min(most, config.most_tokens)
        return GridBatch(
            cell=cell,
            method=method,
            decoding=decoding,
            reward=reward_of(task, config.oracle_reward) if compares else None,
            examples=[examples[i] for i in places],
            contexts=[row.context if hidden else row.whole for row in read],
            questions=[row.question for row in rows] if hidden else None,
            pin=[list(row.pin) for row in read] if any(row.pin for row in read) else None,
            new_tokens=most,
            stop=examples[0].stop,
        )

    def _store(self, batch: Answered, task: Task) -> None:
        """Scores a batch and stores its rows and views."""
        rows = answer_rows(batch, task, self._tokenizer)
        rows = [row for row in rows if key_of(row) not in self._done]
        self._rows.append(rows)
        self._done |= {key_of(row): row["predicted_answer"] for row in rows}
        if (
            isinstance(batch.result, Generation)
            and batch.cell.budget
            and method_of(batch.cell.policy).prune is None
            and not policy_of(batch.cell.policy).renumbers
        ):
            self._views.append(kept_views(batch, batch.result, self._tokenizer, self._config.views))


def _batches(groups: Sequence[list[int]], size: int) -> Iterator[Sequence[list[int]]]:
    """As many whole groups at a time as have up to `size` examples, or one."""
    many = max(size // len(groups[0]), 1) if groups else 1
    for at in range(0, len(groups), many):
        yield groups[at : at + many]


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
    for task in tasks:
        if left := [s for s in config.strategies if s not in strategies_of(config, task)]:
            _say(
                f"notice: {', '.join(left)} leave out {task.name}, which has no reward that its "
                "prompt alone allows; --oracle-reward True compares by its score"
            )
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
                if "seen" in config.protocols and any(e.group for e in examples):
                    _say(f"notice: {task.name} has rows of --protocols hidden only")
                asked = list(cells(config, name, task.name, length))
                check_pins(asked, prompts, model.modules)
                bar.total += (len(examples) - count) * len(asked)
                for together in _read_together(asked, shared=config.share_reading):
                    bar.set_description(_described(together))
                    for more in model.answer(together, task, examples, prompts):
                        bar.update(more)


def _read_together(cells: Sequence[GridCell], *, shared: bool) -> list[list[GridCell]]:
    """The cells whose prompts are read at a time: one, or all of a protocol."""
    if not shared:
        return [[cell] for cell in cells]
    protocols = dict.fromkeys(cell.protocol for cell in cells)
    return [[cell for cell in cells if cell.protocol == name] for name in protocols]


def _described(cells: Sequence[GridCell]) -> str:
    """What the progress bar says of cells that are answered together."""
    cell = cells[0]
    if len(cells) > 1:
        return f"{cell.task} {cell.length}, {cell.protocol}, {len(cells)} cells"
    way = "" if cell.strategy == NONE else cell.strategy
    return f"{cell.task} {cell.length}, {cell.policy} {cell.budget or ''} {way}"


def _say(message: str) -> None:
    """Writes a line to stderr, above the progress bar."""
    tqdm.write(message, file=sys.stderr)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    given = list(sys.argv[1:] if args is None else args)
    return run_command(lambda: parse_run(given, PROG), run, prog=PROG)
