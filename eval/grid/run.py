"""Runs a grid: answers, scores, time to the first token and peak memory in the same run.

One model at a time; per task and length the examples are made once, and every cell answers them
in batches. What has been answered before is skipped.
"""

import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import lookahead_jax as lk
from lookahead_jax.checkpoints.load import Model, first_layers
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.eval.grid.config import (
    Method,
    RunConfig,
    cells,
    method_of,
    model_folder,
    modules_folder,
    policy_of,
    settings,
)
from lookahead_jax.eval.grid.peak import Peak
from lookahead_jax.eval.grid.prompts import AssembledPrompt, assemble
from lookahead_jax.eval.grid.rows import (
    ANSWERED,
    ROWS,
    VIEWS,
    GridCell,
    Key,
    RowFile,
    key_of,
    read_rows,
)
from lookahead_jax.eval.tasks.base import Example, Source, Task, scored
from lookahead_jax.generation.generate import Generation
from lookahead_jax.host.run_folder import keep_settings
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.prefilling.batching import bucket_length
from lookahead_jax.prompts.kv_prediction import Predictor, load_predictor
from lookahead_jax.prompts.speculation import select_tokens, speculate

FULL = lk.make_policy("full")
LONGEST_VIEW = 8192  # tokens of a prompt whose kept tokens are stored


def load(config: RunConfig, name: str) -> tuple[Model, Tokenizer, LookaheadModules | None]:
    """A model of the grid on the run's mesh, and its modules."""
    mesh = None
    if jax.device_count() > 1 or config.tensor * config.fsdp > 1:
        mesh = make_mesh(tensor=config.tensor, fsdp=config.fsdp)
    model = lk.load(model_folder(name), dtype=config.dtype, mesh=mesh)
    if model.tokenizer is None:
        raise ValueError(f"{name}: the tasks are texts, and this model has no tokenizer.json")
    folder = modules_folder(config, name)
    needed = any(policy_of(spec).uses_modules for spec in config.policies)
    modules = None
    if needed:
        if folder is None:
            raise ValueError(f"{name}: lookaheadkv needs --lookahead, the folder of its modules")
        modules = lk.load_modules(folder, params=model.params, config=model.config)
    return model, model.tokenizer, modules


class ModelRun:
    """One model, and the run's files."""

    def __init__(
        self, config: RunConfig, name: str, done: dict[Key, str], rows: RowFile, views: RowFile
    ):
        self._config = config
        self._done = done
        self._rows, self._views = rows, views
        self._model, self._tokenizer, self._modules = load(config, name)
        self._draft: Model | None = None
        if any(method_of(spec).speculates for spec in config.policies):
            if config.draft_model is None:
                raise ValueError("speckv and specpc need --draft-model, the small model they ask")
            self._draft = lk.load(model_folder(config.draft_model), dtype=config.dtype)
            if config.draft_layers is not None:
                self._draft = first_layers(self._draft, config.draft_layers)
        self._predictor: Predictor | None = None
        if any(method_of(spec).predicts for spec in config.policies):
            if config.kv_maps is None:
                raise ValueError("kv_prediction needs --kv-maps, the folder of its maps")
            self._predictor = load_predictor(config.kv_maps, self._model)
        self._warm: set[tuple] = set()
        self._batches = 0

    @property
    def max_position(self) -> int:
        """The most tokens the model was made for."""
        return self._model.config.max_position

    def prompts(self, task: Task, length: int) -> tuple[list[Example], list[AssembledPrompt]]:
        """This run's share of the task's examples at a length, made and assembled once."""
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

    def cell(
        self, cell: GridCell, task: Task, examples: list[Example], made: list[AssembledPrompt]
    ) -> Iterator[int]:
        """Answers what is missing of a cell, a batch at a time; yields how many that were.

        Later turns of a dialogue follow when the earlier ones have been answered.
        """
        missing = [i for i, e in enumerate(examples) if (cell, e.id) not in self._done]
        if cell.protocol == "hidden":
            missing = [i for i in missing if made[i].question]
        yield len(examples) - len(missing)
        drafter = make_drafter(cell.drafter)
        size = self._config.batch
        for at in range(0, len(missing), size):
            group = missing[at : at + size]
            chosen, prompts = [examples[i] for i in group], [made[i] for i in group]
            result, measured = self._answer(cell, chosen, prompts, drafter)
            self._keep(cell, task, chosen, prompts, result, measured)
            yield len(group)
        if task.follow is not None:
            said = [(e, self._done.get((cell, e.id))) for e in examples]
            turns = [task.follow(e, answer) for e, answer in said if answer is not None]
            if later := [example for example in turns if example is not None]:
                for _ in self.cell(cell, task, *self._assembled(later, cell.length)):
                    yield 0  # progress counts first turns

    def _answer(
        self,
        cell: GridCell,
        examples: Sequence[Example],
        prompts: Sequence[AssembledPrompt],
        drafter: Any,
    ) -> tuple[Generation, dict[str, Any]]:
        """One batch; the first of its shape runs twice, so that no number holds compilation."""
        config, hidden = self._config, cell.protocol == "hidden"
        # A short batch is filled up: another number of rows would compile anew.
        rows = [prompts[i % len(prompts)] for i in range(config.batch)]
        contexts = [p.context if hidden else p.whole for p in rows]
        questions = [p.question for p in rows] if hidden else None
        new = min(max(e.max_new_tokens for e in examples), config.max_new_tokens or 2**31)
        shape = [max(map(len, part)) for part in (contexts, questions or [[0]])]
        warm = (cell.policy, cell.budget, cell.drafter, hidden, new, *map(bucket_length, shape))

        method = method_of(cell.policy)

        def answer(drafter: Any) -> tuple[Generation, float]:
            begin = time.perf_counter()
            read, drafts = self._speculate(method, contexts, cell.budget)
            spent = time.perf_counter() - begin
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a policy notes was said once, at the start
                result = lk.generate(
                    self._model, read, questions=questions, policy=method.policy,
                    budget=max(cell.budget, 1), max_new_tokens=new, lookahead=self._modules,
                    drafts=drafts, drafter=drafter, stop=examples[0].stop,
                    reader=self._predictor if method.predicts else None,
                )  # fmt: skip
            return result, result.timing.ttft_s + spent

        def keep_all() -> float:
            read = lk.generate(
                self._model, contexts, questions=questions, policy=FULL, max_new_tokens=1
            )
            return read.timing.ttft_s

        pair = config.pair_times
        if warm not in self._warm:
            answer(make_drafter(cell.drafter))
            if pair:
                keep_all()
            self._warm.add(warm)
        self._batches += 1
        before = keep_all() if pair and self._batches % 2 else None  # neither is always the first
        peak = Peak()
        result, first = answer(drafter)
        memory, bound = peak.read()
        full = keep_all() if pair and before is None else before
        measured = {
            "batch": len(contexts),
            "ttft_s": first,
            "full_ttft_s": full,
            "decode_tokens_per_s": result.timing.decode_tokens_per_s,
            "peak_bytes": memory,
            "peak_is_bound": bound,
            "cache_bytes": result.cache.bytes,
            "full_bytes": None if method.prune is not None else result.cache.full_bytes,
            "draft_lengths": result.drafting.histogram,
        }
        if method.speculates:
            measured |= {"draft_model": config.draft_model, "draft_layers": config.draft_layers}
        return result, measured

    def _speculate(
        self, method: Method, rows: list[list[int]], budget: int
    ) -> tuple[list[list[int]], list[list[int]] | None]:
        """What is left of the prompts, and the small model's answers, if the method asks it."""
        if self._draft is None or not method.speculates:
            return rows, None
        found = speculate(
            self._draft, rows, tokens=max(method.policy.draft_tokens, 1),
            eos_ids=self._model.generation.eos_ids, attention=method.prune is not None,
        )  # fmt: skip
        if found.attention is not None:
            keep = method.prune or budget
            chosen = [select_tokens(a, keep, **method.select) for a in found.attention]
            rows = [[row[i] for i in kept] for row, kept in zip(rows, chosen, strict=True)]
        return rows, found.answers

    def _keep(
        self, cell: GridCell, task: Task, examples: Sequence[Example], prompts: Sequence[AssembledPrompt],
        result: Generation, measured: dict[str, Any],
    ) -> None:  # fmt: skip
        """Scores a batch and stores its rows."""
        texts = result.text or []
        number = f"{cell.policy}/{examples[0].id}"
        rows = []
        for i, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
            score, measures = scored(task, texts[i], example)
            rows.append(
                {
                    **cell._asdict(), "id": example.id, "score": score, "binary": task.binary,
                    **({"measures": measures} if measures else {}),
                    "predicted_answer": texts[i], "answer": list(example.answers),
                    "question": text_of(example.question, self._tokenizer),
                    "answer_prefix": example.prefix, "max_new_tokens": example.max_new_tokens,
                    "prompt_tokens": len(prompt.whole), "new_tokens": len(result.tokens[i]),
                    "finish": result.finish[i], "first_of_batch": number, **measured,
                    **({"depth": example.extra["depth"]} if "depth" in example.extra else {}),
                }
            )  # fmt: skip
        self._rows.append(rows)
        self._done |= {key_of(row): row["predicted_answer"] for row in rows}
        if cell.budget and method_of(cell.policy).prune is None:
            self._views.append(self._seen(cell, examples, result))

    def _seen(
        self, cell: GridCell, examples: Sequence[Example], result: Generation
    ) -> Iterator[dict]:
        """What was kept of the task's first examples, as shares of the heads."""
        for i, example in enumerate(examples):
            ids = result.prompt_ids[i]
            chosen = example.id.isdigit() and int(example.id) < self._config.views
            if not chosen or len(ids) > LONGEST_VIEW:
                continue
            kept = result.kept[:, i]
            counts = np.bincount(kept[kept >= 0], minlength=len(ids))
            yield {
                **cell._asdict(),
                "id": example.id,
                "pieces": pieces(ids, self._tokenizer),
                "kept": np.round(counts / np.prod(kept.shape[:2]), 3).tolist(),
                "predicted_answer": (result.text or [""] * len(examples))[i],
                "answer": list(example.answers),
            }


def pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of every token; bytes of one character stand with the last of them."""
    stream = tokenizer.stream(skip_special=False)
    found = [stream.push(token) for token in ids]
    found[-1] += stream.finish()
    return found


def text_of(part: str | tuple[int, ...], tokenizer: Tokenizer) -> str:
    """A part of an example as text."""
    return part if isinstance(part, str) else tokenizer.decode(part)


def open_run(config: RunConfig) -> tuple[dict[Key, str], RowFile, RowFile]:
    """The run's folder: what was answered, and where rows go.

    Raises ValueError if an earlier run in this folder had other settings, or none written down.
    """
    keep_settings(config.out, settings(config), ROWS)
    rows = config.out / ROWS
    done = {key_of(row): row["predicted_answer"] for row in read_rows(rows, ANSWERED)}
    return done, RowFile(rows), RowFile(config.out / VIEWS)


def run(config: RunConfig) -> None:
    """Answers every cell of the grid that the run does not hold yet."""
    tasks = config.tasks_found()
    for spec in config.policies:
        for budget in config.budgets:
            if (notice := policy_of(spec).notice(budget)) is not None:
                tqdm.write(f"notice: {spec} at {budget}: {notice}")
    done, rows, views = open_run(config)
    grid = [c for t in tasks for n in config.lengths for c in cells(config, "", t.name, n)]
    count = len(range(config.part, config.count, config.parts))
    total = len(grid) * count * len(config.models)
    with contextlib.closing(rows), contextlib.closing(views), tqdm(total=total) as bar:
        for name in config.models:
            runner = ModelRun(config, name, done, rows, views)
            for task in tasks:
                for length in config.lengths:
                    bar.set_description(f"{task.name} {length}")
                    if length > runner.max_position:
                        tqdm.write(f"notice: {name} was made for {runner.max_position} tokens")
                    examples, made = runner.prompts(task, length)
                    for cell in cells(config, name, task.name, length):
                        spent = 0
                        for answered in runner.cell(cell, task, examples, made):
                            spent += answered
                            bar.update(answered)
                        bar.update(count - spent)
