"""Answers the requests of lm-evaluation-harness in batches, without importing the harness.

`lookahead_jax.eval.harness.command` puts this behind the harness's interface.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lookahead_jax as lk
from lookahead_jax.checkpoints.load import Model
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.eval.grid.config import EMBEDDED, model_folder, modules_folder_of
from lookahead_jax.eval.harness.options import GenerationOptions, seed_of
from lookahead_jax.generation.score import forced_logits
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.policies.base import Policy, WithModules
from lookahead_jax.prefilling.batching import pad_batch
from lookahead_jax.prefilling.diagnosis import non_finite_error
from lookahead_jax.prompts.kvzip_replay import repeat_template
from lookahead_jax.prompts.read import read_prompt

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of the continuation that is scored."""
_AUTO_BATCH = 8
_DEFAULT_DEVICE = "cuda:0"  # the harness passes it where nothing was chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The harness's `--model_args`; settings of the policy are called policy_NAME."""

    pretrained: str = EMBEDDED
    policy: str = "full"
    budget: int = 256
    drafter: str = "none"
    lookahead: str | None = None  # folder of lookahead modules
    dtype: str | None = None
    weights: str | None = None  # int8: the matrices in eight bits
    cache_dtype: str | None = None  # int8: keys and values in eight bits
    max_length: int | None = None  # of context and answer; None: the model's number of positions
    max_gen_toks: int = 256
    batch_size: int = _AUTO_BATCH
    evict_loglikelihood: bool = False  # score continuations after eviction, too
    policy_settings: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Settings":
        """From the arguments that the harness passes to a model.

        `batch_size=auto` means 8, or `max_batch_size` if that is smaller. `trust_remote_code` is
        accepted because the harness passes it for data sets; no code of a checkpoint is ever run.
        Raises ValueError for an unknown argument and for one that cannot be followed.
        """
        known = {field.name for field in dataclasses.fields(cls)} - {"policy_settings"}
        fields, settings, most = {}, [], None
        for name, value in arguments.items():
            if name in known:
                fields[name] = value
            elif name.startswith("policy_"):
                settings.append((name.removeprefix("policy_"), str(value)))
            elif name == "device":
                _check_device(value)
            elif name == "max_batch_size":
                most = None if value is None else int(value)
            elif name == "parallelize":
                if value:
                    raise ValueError("model argument parallelize is not supported; leave it out")
            elif name != "trust_remote_code":
                raise ValueError(
                    f"unknown model argument {name!r}; known: {', '.join(sorted(known))}, policy_*"
                )
        if str(fields.get("batch_size", "")).startswith("auto"):
            fields["batch_size"] = min(_AUTO_BATCH, most or _AUTO_BATCH)
        fields = {name: value for name, value in fields.items() if value is not None}
        for name in ("budget", "max_length", "max_gen_toks", "batch_size"):
            if name in fields:
                fields[name] = _positive(name, fields[name])
        return cls(**fields, policy_settings=tuple(settings))


def _positive(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ValueError(f"model argument {name} must be a whole number above 0, got {value!r}")
    return number


def _check_device(device: str | None) -> None:
    """Raises ValueError if the harness asks for a kind of device that JAX does not run on."""
    if device in (None, _DEFAULT_DEVICE):
        return
    kind, platform = str(device).partition(":")[0], jax.default_backend()
    if {"cuda": "gpu"}.get(kind, kind) != platform:
        raise ValueError(
            f"device={device}: JAX runs on {platform} here; leave it out, or set JAX_PLATFORMS"
        )


class HarnessModel:
    """A model with a policy, a budget and a drafter, as the harness needs it."""

    def __init__(self, settings: Settings):
        self.settings = settings
        folder = model_folder(settings.pretrained)
        self.model: Model = lk.load(folder, dtype=settings.dtype, weights=settings.weights)
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
        """Token ids; `special` None adds special tokens unless the text starts with BOS."""
        bos = self.tokenizer.special_tokens.get("bos_token")
        has_bos = bool(bos) and text.startswith(bos or "")
        return self.tokenizer.encode(text, special=not has_bos if special is None else special)

    def template_source(self, name: str | None) -> str:
        """The Jinja source of a chat template; ValueError if the tokenizer does not have it."""
        templates = self.tokenizer.chat_templates
        if (source := templates.get(name or "default")) is None:
            known = ", ".join(sorted(templates)) or "none"
            raise ValueError(f"no chat template {name or 'default'!r}; this tokenizer has: {known}")
        return source

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
    ) -> str:
        """The chat as text; without a generation prompt, its last message stays open.

        The harness asks for the latter when a task puts words into the assistant's mouth
        (`gen_prefix`).
        """
        return self.tokenizer.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            template=template,
        )

    @property
    def prefix_token(self) -> int:
        """The token that stands in for an empty context."""
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

        Nothing is evicted unless the settings ask for it. Contexts that are too long lose their
        beginning.
        """
        size, scored = self.settings.batch_size, {}
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        for at in range(0, len(order), size):
            group = order[at : at + size]
            filled = [pairs[group[i % len(group)]] for i in range(size)]
            scores = self._scored([self._fitted(*pair) for pair in filled])
            scored |= dict(zip(group, scores, strict=False))
            tick(len(group))
        return [scored[i] for i in range(len(pairs))]

    def rolling_loglikelihoods(
        self, texts: Sequence[str], tick: Callable[[int], Any] = lambda n: None
    ) -> list[float]:
        """Log-probability of every whole text, read in windows of `max_length` tokens.

        As in the harness's own models: the first window follows the prefix token, each later one
        at least one token of the text, and special tokens that the tokenizer adds count as text.
        """
        pairs: list[Pair] = []
        ends: list[int] = []
        size = self.max_length
        for text in texts:
            tokens = self.encode(text, None)
            for at in range(0, len(tokens), size):
                window = tokens[at : at + size]
                begin = at + len(window) - size - 1  # a short last window has a longer context
                pairs.append(([self.prefix_token] if at == 0 else tokens[begin:at], window))
            ends.append(len(pairs))
        scores = [log_p for log_p, _ in self.loglikelihoods(pairs, tick)]
        return [sum(scores[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]

    def _fitted(self, context: Sequence[int], continuation: Sequence[int]) -> Pair:
        """The pair without the beginning of a context that is too long.

        The last token of the continuation is predicted but not read, so it takes no position.
        """
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens exceeds max_length={self.max_length}"
            )
        return list(context)[-room:], list(continuation)

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
            cache_dtype=self.settings.cache_dtype,
        )  # fmt: skip
        last = (forced >= 0).sum(1) - 1
        given = np.where(np.arange(forced.shape[1]) == last[:, None], -1, forced)
        logits = forced_logits(params, read.cache, read.logits, jnp.asarray(given), config=config)
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
        """Continuations of contexts, each with the harness's generation kwargs.

        A sample depends on its context, on the `seed` among the kwargs and on how often the same
        request came before, but neither on its place nor on its neighbours. Raises ValueError for
        kwargs that cannot be followed.
        """
        groups: dict[GenerationOptions, list[int]] = {}
        repeats: collections.Counter[tuple[str, GenerationOptions]] = collections.Counter()
        seeds: list[int] = []
        for i, (context, kwargs) in enumerate(requests):
            options = GenerationOptions.of(kwargs, default_length=self.settings.max_gen_toks)
            if options.max_new_tokens >= self.max_length:
                raise ValueError(
                    f"max_gen_toks={options.max_new_tokens} leaves no room for a prompt in "
                    f"max_length={self.max_length}"
                )
            groups.setdefault(options, []).append(i)
            seeds.append(seed_of(context, options.seed, repeats[context, options]))
            repeats[context, options] += 1
        texts: dict[int, str] = {}
        for options, members in groups.items():
            members.sort(key=lambda i: -len(requests[i][0]))
            for at in range(0, len(members), self.settings.batch_size):
                group = members[at : at + self.settings.batch_size]
                contexts = [requests[i][0] for i in group]
                answers = self._continued(contexts, options, [seeds[i] for i in group])
                texts |= dict(zip(group, answers, strict=True))
                tick(len(group))
        return [texts[i] for i in range(len(requests))]

    def _continued(
        self, contexts: Sequence[str], options: GenerationOptions, seeds: Sequence[int]
    ) -> list[str]:
        """One batch; a short one is filled up, since another number of rows would compile anew."""
        longest = self.max_length - options.max_new_tokens
        places = [i % len(contexts) for i in range(self.settings.batch_size)]
        rows = [self.encode(context, None)[-longest:] for context in contexts]
        result = lk.generate(
            self.model, [rows[i] for i in places], policy=self.policy,
            budget=self.settings.budget, max_new_tokens=options.max_new_tokens,
            sampling=options.sampling, seeds=[seeds[i] for i in places], stop=options.stop,
            lookahead=self._modules, drafter=self.settings.drafter,
            cache_dtype=self.settings.cache_dtype,
        )  # fmt: skip
        return (result.text or [])[: len(contexts)]
