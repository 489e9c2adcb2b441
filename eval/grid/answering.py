"""Answers batches of a grid: continuations, times to the first token, peak memory, work."""

import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax

import lookahead_jax as lk
from lookahead_jax.checkpoints.load import Model, first_layers
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.decoding.sampling import GREEDY
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.eval.grid.batch import GridBatch
from lookahead_jax.eval.grid.config import (
    Method,
    RunConfig,
    method_of,
    model_folder,
    modules_folder,
    policy_of,
)
from lookahead_jax.eval.grid.peak import Peak
from lookahead_jax.eval.grid.shared import SharedPrompts
from lookahead_jax.eval.grid.strategies import decoding_of, reward_by_prompt, seed_of
from lookahead_jax.generation.results import Generation
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.policies.base import WithDraft, WithModules
from lookahead_jax.prompts.kv_prediction import Predictor, load_predictor
from lookahead_jax.prompts.speculation import select_tokens, speculate
from lookahead_jax.strategies.base import Strategy
from lookahead_jax.strategies.search import SearchResult

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


class Answerer:
    """One model of a run, with the small models that its methods and strategies need."""

    def __init__(self, config: RunConfig, name: str):
        self._config = config
        self.model, self.tokenizer, self.modules = load_model(config, name)
        self._draft: Model | None = None
        speculates = any(method_of(spec).speculates for spec in config.policies)
        routed = [
            spec
            for spec in config.strategies
            if (strategy := decoding_of(spec).strategy) is not None and strategy.routes
        ]
        if speculates or routed:
            if config.draft_model is None:
                asking = "speckv and specpc need" if speculates else f"{routed[0]} needs"
                raise ValueError(f"{asking} a small model: give --draft-model")
            self._draft = lk.load(model_folder(config.draft_model), dtype=config.dtype)
            if config.draft_layers is not None:
                self._draft = first_layers(self._draft, config.draft_layers)
        self._predictor: Predictor | None = None
        if any(method_of(spec).predicts for spec in config.policies):
            if config.kv_maps is None:
                raise ValueError("kv_prediction needs the folder of its maps: give --kv-maps")
            self._predictor = load_predictor(config.kv_maps, self.model)
        self._warm: set[tuple] = set()
        self._batches = 0

    def answer(
        self, batch: GridBatch, drafter: Any
    ) -> tuple[Generation | SearchResult, dict[str, Any]]:
        """The answers and the measurements.

        The first batch of a shape runs twice, so that no measurement includes compilation. Searches
        are compared by their work, not by time.
        """
        if batch.decoding.strategy is not None:
            return self._search_batch(batch, batch.decoding.strategy)
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
            "batch": len(batch.examples),
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
            measured |= self._small()
        return result, measured

    def answer_shared(
        self, batches: Sequence[GridBatch]
    ) -> Iterator[tuple[Generation, dict[str, Any]]]:
        """The answers of batches with the same prompts, which are read once, and what is measured.

        The time of a part of the work would mean nothing, so there are no times.
        """
        shared = SharedPrompts(self.model, self.modules, batches)
        for batch in batches:
            options = self._options(batch, None)

            def read(tokens, new_tokens, known_tokens=0, options=options):
                return shared.cut(options["policy"], options["budget"], new_tokens)

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the policy's notice was shown once, at the start
                result = lk.generate(self.model, batch.contexts, reader=read, **options)
            yield result, {
                "batch": len(batch.examples), "ttft_s": None, "full_ttft_s": None,
                "decode_tokens_per_s": None, "peak_bytes": None, "peak_is_bound": False,
                "cache_bytes": result.cache.bytes, "full_bytes": result.cache.full_bytes,
                "draft_lengths": result.drafting.histogram,
            }  # fmt: skip

    def _search_batch(
        self, batch: GridBatch, strategy: Strategy
    ) -> tuple[SearchResult, dict[str, Any]]:
        """The answers of a strategy, and the measurements."""
        peak = Peak()
        read, drafts = self._speculate(batch.method, batch.contexts, batch.cell.budget)
        reward = None
        if batch.reward is not None:
            asked = batch.questions or [[]] * len(read)
            copies = len(asked) // len(read)
            texts = [[*read[i // copies], *question] for i, question in enumerate(asked)]
            reward = reward_by_prompt(batch.reward.grade, texts, batch.examples, self.tokenizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the policy's notice was shown once, at the start
            result = lk.search(
                self.model, read, strategy=strategy, reward=reward,
                sampling=batch.decoding.sampling,
                draft_model=self._draft if strategy.routes else None,
                most_tokens=self._config.most_tokens, **self._options(batch, drafts),
            )  # fmt: skip
        memory, bound = peak.read()
        return result, {
            "batch": len(batch.examples), "ttft_s": None, "full_ttft_s": None,
            "decode_tokens_per_s": None, "peak_bytes": memory, "peak_is_bound": bound,
            "cache_bytes": result.cache_bytes, "full_bytes": None, "draft_lengths": [],
            "reward": None if batch.reward is None else batch.reward.kind,
            **(self._small() if strategy.routes or batch.method.speculates else {}),
        }  # fmt: skip

    def _small(self) -> dict[str, Any]:
        """The small model of a row."""
        config = self._config
        return {"draft_model": config.draft_model, "draft_layers": config.draft_layers}

    def _options(self, batch: GridBatch, drafts: list[list[int]] | None) -> dict[str, Any]:
        """The arguments that `lk.generate` and `lk.search` share."""
        return dict(
            questions=batch.questions, pin=batch.pin, policy=batch.method.policy,
            budget=max(batch.cell.budget, 1), max_new_tokens=batch.new_tokens,
            lookahead=self.modules, drafts=drafts, stop=batch.stop,
            seeds=[seed_of(self._config.seed, example) for example in batch.examples],
            cache_dtype=self._config.cache_dtype,
        )  # fmt: skip

    def _generate(self, batch: GridBatch, drafter: Any) -> tuple[Generation, float]:
        """The answers, and the seconds to the first token, a small model's work included."""
        begin = time.perf_counter()
        read, drafts = self._speculate(batch.method, batch.contexts, batch.cell.budget)
        spent = time.perf_counter() - begin
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the policy's notice was shown once, at the start
            result = lk.generate(
                self.model, read, drafter=drafter, sampling=batch.decoding.sampling or GREEDY,
                reader=self._predictor if batch.method.predicts else None,
                evict_every=self._config.evict_every if batch.method.budgeted else None,
                **self._options(batch, drafts),
            )  # fmt: skip
        return result, result.timing.ttft_s + spent

    def _read_full(self, batch: GridBatch) -> float:
        """Seconds to the first token with the full cache."""
        result = lk.generate(
            self.model, batch.contexts, questions=batch.questions, policy=FULL, max_new_tokens=1,
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
            eos_ids=self.model.generation.eos_ids, attention=method.prune is not None,
        )  # fmt: skip
        if found.attention is not None:
            keep = method.prune or budget
            chosen = [select_tokens(a, keep, **method.select) for a in found.attention]
            rows = [[row[i] for i in kept] for row, kept in zip(rows, chosen, strict=True)]
        return rows, found.answers
