"""Settings that travel together: eviction, drafting, and how rows are continued."""

import dataclasses
from collections.abc import Sequence

from lookahead_jax.decoding.device_drafter import DeviceDrafter
from lookahead_jax.decoding.eviction import DecodeEviction
from lookahead_jax.decoding.grammar import CompiledGrammar
from lookahead_jax.decoding.host_drafter import HostDrafter
from lookahead_jax.decoding.logprobs import check_alternatives
from lookahead_jax.decoding.node_choice import Controller
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.model.cache import CacheType
from lookahead_jax.modules.definition import LookaheadModules, staying_entries
from lookahead_jax.policies.base import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvictionSettings:
    """Which prompt entries are kept, how many, and whether decoding evicts too."""

    policy: Policy
    budget: int
    """Entries kept per layer and KV head."""
    modules: LookaheadModules | None = None
    """Lookahead modules, for the policies that read them."""
    evict_every: int | None = None
    """Evict again at every position that is a multiple of this; None: only after the prompt."""
    cache_dtype: CacheType | None = None
    """int8: entries are stored in eight bits; None: in the dtype of the weights."""

    @property
    def staying(self) -> int:
        """Entries of the budget that are a memory of the modules, and positions that it takes."""
        return staying_entries(self.policy, self.modules)

    def while_decoding(self) -> DecodeEviction | None:
        """The eviction of the decoding steps, if there is any.

        Raises ValueError for a policy that cannot evict during decoding.
        """
        if self.evict_every is None:
            return None
        return DecodeEviction(
            policy=self.policy, budget=self.budget, interval=self.evict_every, staying=self.staying
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftSettings:
    """What proposes token trees, and how large they are."""

    drafter: HostDrafter | DeviceDrafter
    nodes: int | Controller | None = None
    """Nodes of a step's tree; None chooses by measured cost and accepted tokens."""

    @classmethod
    def of(
        cls, drafter: str | HostDrafter | DeviceDrafter, nodes: int | Controller | None
    ) -> "DraftSettings":
        """The settings with a drafter that may be given by its name for `make_drafter`."""
        made = make_drafter(drafter) if isinstance(drafter, str) else drafter
        return cls(drafter=made, nodes=nodes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuationSettings:
    """How the rows of a batch are continued, and what ends them."""

    max_new_tokens: int
    sampling: Sampling
    seeds: Sequence[int]
    """One per row."""
    eos_ids: tuple[int, ...]
    """Tokens that end a row."""
    logprobs: int | None = None
    """Record log-probabilities, and those of so many alternatives; None: neither."""
    grammar: CompiledGrammar | None = None
    """What every row must be; None: anything."""

    def __post_init__(self) -> None:
        check_alternatives(self.logprobs)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
