"""What an eviction policy is: how it reads a prompt, how it scores entries, what it must keep.

A policy is a frozen, hashable dataclass, a static argument of the jitted prefill, whose methods
are pure functions of arrays. Inside each layer's step it returns one score per prompt entry and KV
head; selection.py protects, allocates and selects. A new policy is one small file.

Letters: B batch, M observing queries, N query heads, K KV heads, H head dim, T entries, L layers,
C budget = entries kept per layer and KV head, protected entries included.
"""

import dataclasses
import numbers
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from lookahead_jax.host.integers import check_integer
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.policies.view import Chunk, LayerView, Stats

_LONGEST_INTERVAL = 1 << 20  # prompts that are cut while they are read are padded to a multiple


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnePass:
    """Reads the prompt once; its last tokens observe, or none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithModules:
    """Reads the prompt once; the tokens of lookahead modules, placed after it, observe."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsePattern:
    """Which earlier tokens a prompt token sees where a long prompt is read sparsely (sparse.py)."""

    columns: int
    """Best entries of each KV head, which all later prompt tokens see."""
    band: int
    """Tokens before a chunk of the prompt that the chunk sees as well."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithDraft:
    """Reads the prompt once; its last tokens and a draft answer from outside, behind it, observe.

    The caller supplies the draft, for example from a small model or a drafter (speculation.py).
    """

    tokens: int
    """Draft tokens that observe, at most."""
    by_drafter: bool = False
    """Whether a drafter that runs on the host supplies it; a row may then have none."""
    sparse: SparsePattern | None = None
    """How long prompts are read; None reads every prompt densely."""

    def sparse_pattern(self, tokens: int) -> SparsePattern | None:
        """The pattern for a prompt padded to `tokens`; None if columns and band cover all of it."""
        if self.sparse is None or tokens <= self.sparse.columns + self.sparse.band:
            return None
        return self.sparse


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithLookup:
    """Reads the prompt once; its last tokens and a draft found in the prompt itself observe.

    The draft is what followed an earlier occurrence of the prompt's last tokens
    (drafters/prompt_lookup.py). A row without one has no draft tokens (position -1).
    """

    tokens: int
    """Draft tokens that observe, at most."""
    ngram: int
    """Most tokens of the prompt's end that are looked up."""
    least: int
    """Fewest tokens that must occur again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithResponse:
    """Keeps the whole prompt, decodes a response, and evicts by what the response attends to.

    The prompt's full cache exists for a moment: there is no bound on memory.
    """

    tokens: int
    """Length of the response, at most."""
    draft_policy: "Policy | None" = None
    """Cuts the copy of the cache that the response is decoded on; None: decoded on the full one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithReplay:
    """Keeps the whole prompt, reads it once more in chunks, and evicts by what these attend to.

    The prompt's full cache exists for a moment: there is no bound on memory.
    """

    chunk: int
    """Prompt tokens that are read again at a time."""
    sinks: int
    """First entries, which every chunk sees besides itself."""
    across_layers: bool
    """Whether all layers and heads of a row share one budget, or each layer has its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithCuts:
    """Reads the prompt once, behind its own cache, and cuts this at every multiple of `every`.

    The cuts are those of decoding (decoding/eviction.py).
    """

    every: int
    """Tokens between two cuts."""


Reading = OnePass | WithModules | WithDraft | WithLookup | WithResponse | WithReplay | WithCuts
"""How a policy reads a prompt. `prompts/read.py` has one function for each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutByEntries:
    """While decoding, evicts by keys, values and positions alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutByTokens:
    """While decoding, evicts by what the tokens since the last cut attend to."""

    adds_up: bool
    """Whether scores add up from one cut to the next, new entries beginning at 0
    (`LayerView.sums`): all these tokens observe. Otherwise the last `window_rows` of them do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutByModules:
    """While decoding, evicts by what lookahead tokens, placed after the text, attend to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutByQuestion:
    """While decoding, evicts by what the prompt's last `window_rows` tokens attend to.

    They are read once more at every cut, placed after the text.
    """


DecodeCut = CutByEntries | CutByTokens | CutByModules | CutByQuestion
"""How a policy evicts while decoding (decoding/eviction.py)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Base of all policies. A subclass defines `score` and overrides what differs.

    A policy that changes one step of another is a `PolicyWrapper` (wrapper.py). Raises ValueError
    for a field whose value has another type than its annotation: int, float, bool or
    Literal.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # named sets of fields

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), field.type)

    @property
    def reading(self) -> Reading:
        """How prompts are read."""
        return OnePass()

    @property
    def decode_cut(self) -> DecodeCut | None:
        """How entries are evicted while decoding; None: this policy cannot do so."""
        return None

    def notice(self, budget: int) -> str | None:
        """What the user should know about this policy at this budget, in one line."""
        return None

    def window_rows(self, budget: int) -> int:
        """How many of the last prompt tokens observe, besides a draft or a response."""
        return 0

    def init_stats(self, batch: int, tokens: int, config: ModelConfig) -> Stats:
        """An empty accumulator over all prompt queries; None if the policy needs none."""
        return None

    def accumulate(self, stats: Stats, chunk: Chunk) -> Stats:
        """Adds one chunk of prompt queries to the accumulator."""
        return stats

    def score(self, view: LayerView) -> jax.Array:
        """One score per entry and KV head, float32 [B, K, T]; the highest are kept."""
        raise NotImplementedError(f"{type(self).__name__} does not score")

    def adjust(self, scores: jax.Array, pos: jax.Array, competing: jax.Array) -> jax.Array:
        """The scores by which entries are ranked, float32 [B, K, T].

        `scores` [B, K, T] are those of `score`, and `competing`, bool shaped like `pos`, marks the
        entries that are neither protected nor excluded.
        """
        return scores

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        """Entries kept whatever their score: bool, shaped like `pos` [B, K or 1, T]."""
        return jnp.zeros(pos.shape, bool)

    def candidates(self, pos: jax.Array, length: jax.Array, window: jax.Array | None) -> jax.Array:
        """Entries that may be kept, bool shaped like `pos`: those the next token can still see."""
        return visible_to_next(pos, length, window)

    def layer_budgets(self, length: jax.Array, budget: int, config: ModelConfig) -> jax.Array:
        """Entries per KV head in each layer, int32 [L, B]; the mean over layers is min(C, T)."""
        uniform = jnp.minimum(length, budget)
        return jnp.broadcast_to(uniform[None], (config.num_layers, *length.shape))

    def head_budgets(
        self, ranked: jax.Array, candidates: jax.Array, layer_budget: jax.Array
    ) -> jax.Array:
        """Entries of each KV head in one layer, int32 [B, K]; their mean is `layer_budget` [B].

        `ranked` [B, K, T] are the scores, +inf for protected entries and -inf for entries that may
        not be kept; `candidates` [B, K] counts the entries that a head may keep.
        """
        return jnp.minimum(layer_budget[:, None], candidates)

    def rerank(self, ranked: jax.Array, budgets: jax.Array, view: LayerView) -> jax.Array:
        """`ranked` [B, K, T], as `head_budgets` sees it, once each head's share [B, K] is known.

        Each head keeps its `budgets` best entries of the result.
        """
        return ranked

    @property
    def renumbers(self) -> bool:
        """Whether `arrange` gives entries new positions, which are not those of the prompt."""
        return False

    def arrange(self, cache: KVCache, config: ModelConfig) -> KVCache:
        """What becomes of a prompt's cut cache before anything follows."""
        return cache

    def max_entries(self, tokens: int, budget: int, config: ModelConfig) -> int:
        """The most entries any layer and head can keep, for the static number of slots."""
        return min(tokens, budget)


def _check_type(name: str, value: Any, annotation: Any) -> None:
    if annotation is int:
        check_integer(name, value)
    elif annotation is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, not {value!r}")
    elif annotation is float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(f"{name} must be a number, not {value!r}")
    elif typing.get_origin(annotation) is Literal and value not in typing.get_args(annotation):
        choices = ", ".join(map(str, typing.get_args(annotation)))
        raise ValueError(f"{name}={value} is not possible; choose {choices}")


def visible_to_next(pos: jax.Array, length: jax.Array, window: jax.Array | None) -> jax.Array:
    """Which entries at `pos` [B, K or 1, T] the next token (position `length` [B]) can see."""
    filled = pos >= 0
    if window is None:
        return filled
    return filled & (length[:, None, None] - pos < window)


def check_positions(policy: Policy, reader: str) -> None:
    """Raises ValueError if kept entries do not have the positions of the prompt."""
    if policy.renumbers:
        raise ValueError(
            f"{reader} reads which entries a policy keeps, and rerotate gives them other "
            "positions: leave rerotate out"
        )


def check_interval(name: str, value: Any) -> None:
    """Raises ValueError unless `value` can be the tokens between two cuts: 1 to 2^20."""
    check_integer(name, value, least=1)
    if value > _LONGEST_INTERVAL:
        raise ValueError(f"{name}={value} must be at most {_LONGEST_INTERVAL} tokens")


def protected_share(wanted: int, budget: int) -> int:
    """How many of `wanted` protected entries fit: all below the budget, else half the budget."""
    return wanted if wanted < budget else budget // 2


def share_notice(window: int, kept: int, budget: int) -> str | None:
    """A notice for the user if only `kept` entries of the window fit the budget."""
    if kept == window:
        return None
    return f"window {window} exceeds budget {budget}; reduced to {kept}"
