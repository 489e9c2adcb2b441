"""What lm-evaluation-harness asks of a model, answered in batches; nothing here imports it.

`lookahead_jax.lm_eval` puts this behind the harness's interface.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import lookahead_jax as lk
from lookahead_jax.checkpoints.load import Model
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.eval.grid.config import EMBEDDED, model_folder, modules_folder_of
from lookahead_jax.generation.score import forced_logits
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.policies.base import Policy, WithModules
from lookahead_jax.prefilling.batching import pad_batch
from lookahead_jax.prefilling.diagnosis import non_finite_error
from lookahead_jax.prompts.kvzip_replay import repeat_template
from lookahead_jax.prompts.read import read_prompt

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of what is scored behind it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The harness's `--model_args`; settings of the policy are called policy_NAME."""

    pretrained: str = EMBEDDED
    policy: str = "full"
    budget: int = 256
    drafter: str = "none"
    lookahead: str | None = None  # folder of lookahead modules
    dtype: str | None = None
    max_length: int | None = None  # of context and answer; None: what the model was made for
    max_gen_toks: int = 256
    batch_size: int = 8
    evict_loglikelihood: bool = False  # score continuations behind the cut cache, too
    policy_settings: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Settings":
        """From what the harness hands over; `device` and its like mean nothing here.

        Raises ValueError for a name that nobody knows.
        """
        known = {field.name for field in dataclasses.fields(cls)} - {"policy_settings"}
        ignored = {"device", "max_batch_size", "trust_remote_code", "parallelize"}
        fields, settings = {}, []
        for name, value in arguments.items():
            if name in known:
                fields[name] = value
            elif name.startswith("policy_"):
                settings.append((name.removeprefix("policy_"), str(value)))
            elif name not in ignored:
                raise ValueError(
                    f"unknown model argument {name!r}; known: {', '.join(sorted(known))}, policy_*"
                )
        if str(fields.get("batch_size", "8")).startswith("auto"):
            del fields["batch_size"]
        for name in ("budget", "max_length", "max_gen_toks", "batch_size"):
            if fields.get(name) is not None:
                fields[name] = int(fields[name])
        return cls(**fields, policy_settings=tuple(settings))


class HarnessModel:
    """A model with a policy, a budget and a drafter, as the harness needs it."""

    def __init__(self, settings: Settings):
        self.settings = settings
        folder = model_folder(settings.pretrained)
        self.model: Model = lk.load(folder, dtype=settings.dtype)
        if self.model.tokenizer is None:
            raise ValueError(f"{folder}: the harness works with texts; there is no tokenizer.json")
        self.tokenizer: Tokenizer = self.model.tokenizer
        self.policy: Policy = lk.make_policy(settings.policy, **dict(settings.policy_settings))
        self.max_length = settings.max_length or self.model.config.max_position
        self._modules: LookaheadModules | None = None
        if isinstance(self.policy.reading, WithModules):
            own = None if settings.lookahead is None else Path(settings.lookahead)
            where = modules_folder_of(own, settings.pretrained)
            if where is None:
                raise ValueError(
                    f"{settings.policy} needs lookahead=DIR, the folder of its modules"
                )
            config = self.model.config
            self._modules = lk.load_modules(where, params=self.model.params, config=config)

    def encode(self, text: str, special: bool | None) -> list[int]:
        """Ids; with `special` None what begins a text is added unless the text brings it."""
        bos = self.tokenizer.special_tokens.get("bos_token")
        brings = bool(bos) and text.startswith(bos or "")
        return self.tokenizer.encode(text, special=not brings if special is None else special)

    @property
    def prefix_token(self) -> int:
        """What stands before a text without a context."""
        generation = self.model.generation
        if generation.bos_id is not None:
            return generation.bos_id
        if not generation.eos_ids:
            raise ValueError(f"{self.model.path} names neither a bos nor an eos token")
        return generation.eos_ids[0]

    def loglikelihoods(
        self, pairs: Sequence[Pair], tick: Callable[[int], Any] = lambda n: None
    ) -> list[tuple[float, bool]]:
        """Log-probability of every continuation, and whether it is the greedy one.

        Nothing is evicted, unless the settings ask for it. Contexts that are too long lose their
        beginning.
        """
        size, found = self.settings.batch_size, {}
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        for at in range(0, len(order), size):
            group = order[at : at + size]
            filled = [pairs[group[i % len(group)]] for i in range(size)]
            scores = self._scored([self._fitted(*pair) for pair in filled])
            found |= dict(zip(group, scores, strict=False))
            tick(len(group))
        return [found[i] for i in range(len(pairs))]

    def _fitted(self, context: Sequence[int], continuation: Sequence[int]) -> Pair:
        if len(continuation) >= self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens leaves no room in {self.max_length}"
            )
        return list(context)[-(self.max_length - len(continuation)) :], list(continuation)

    def _scored(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        config, params = self.model.config, self.model.params
        tokens = jnp.asarray(pad_batch([pair[0] for pair in pairs], config=config))
        forced = pad_batch([pair[1] for pair in pairs], config=config)
        evict = self.settings.evict_loglikelihood
        # As in one pass over both; the last token of a continuation is scored, not read.
        read_behind = jnp.asarray(np.maximum((forced >= 0).sum(1) - 1, 0), jnp.int32)
        read = read_prompt(
            params, tokens, config=config, budget=self.settings.budget,
            policy=self.policy if evict else lk.make_policy("full"),
            new_tokens=forced.shape[1], known_tokens=read_behind,
            modules=self._modules if evict else None,
            eos_ids=self.model.generation.eos_ids,
            repeat_template=repeat_template(self.policy, self.tokenizer),
        )  # fmt: skip
        logits = forced_logits(params, read.cache, read.logits, jnp.asarray(forced), config=config)
        raw = np.asarray(logits, np.float64)
        for i in np.flatnonzero(~np.isfinite(raw).all((1, 2))).tolist():
            text = [*pairs[i][0], *pairs[i][1]]
            raise non_finite_error(params, text, f"row {i}", config=config)
        peak = raw.max(-1, keepdims=True)
        total = peak[..., 0] + np.log(np.exp(raw - peak).sum(-1))
        at = np.maximum(forced, 0)[..., None]
        log_p = np.take_along_axis(raw, at, axis=-1)[..., 0] - total
        counts = forced >= 0
        greedy = ((raw.argmax(-1) == forced) | ~counts).all(-1)
        return [
            (float((p * c).sum()), bool(g)) for p, c, g in zip(log_p, counts, greedy, strict=True)
        ]

    def generate(
        self,
        requests: Sequence[tuple[str, Mapping[str, Any]]],
        tick: Callable[[int], Any] = lambda n: None,
    ) -> list[str]:
        """Continuations of contexts, each with `until`, `max_gen_toks` and sampling settings."""
        groups: dict[str, list[int]] = {}
        for i, (_, options) in enumerate(requests):
            groups.setdefault(repr(sorted(options.items())), []).append(i)
        found: dict[int, str] = {}
        for members in groups.values():
            members = sorted(members, key=lambda i: -len(requests[i][0]))
            for at in range(0, len(members), self.settings.batch_size):
                group = members[at : at + self.settings.batch_size]
                texts = self._continued([requests[i][0] for i in group], requests[group[0]][1])
                found |= dict(zip(group, texts, strict=False))
                tick(len(group))
        return [found[i] for i in range(len(requests))]

    def _continued(self, contexts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        until = options.get("until") or []
        stop = [until] if isinstance(until, str) else list(until)
        new = int(options.get("max_gen_toks", self.settings.max_gen_toks))
        new = min(new, self.max_length - 1)
        # A short batch is filled up: another number of rows would compile anew.
        rows = [self.encode(c, None)[-(self.max_length - new) :] for c in contexts]
        rows = [rows[i % len(rows)] for i in range(self.settings.batch_size)]
        result = lk.generate(
            self.model, rows, policy=self.policy, budget=self.settings.budget, max_new_tokens=new,
            sampling=sampling_of(options), seeds=list(range(len(rows))), lookahead=self._modules,
            stop=tuple(s for s in stop if s), drafter=self.settings.drafter,
        )  # fmt: skip
        return (result.text or [])[: len(contexts)]


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """The harness's generation settings; greedy unless `do_sample` or a temperature asks."""
    temperature = float(options.get("temperature") or 0.0)
    if options.get("do_sample") is False:
        temperature = 0.0
    elif options.get("do_sample") and not temperature:
        temperature = 1.0
    if not temperature:
        return Sampling()
    top_k, top_p = options.get("top_k"), options.get("top_p")
    return Sampling(
        temperature=temperature,
        top_k=int(top_k) if top_k else None,
        top_p=float(top_p) if top_p else None,
    )
