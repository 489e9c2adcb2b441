"""Settings that travel together: what the cache keeps, and what drafts tokens."""

import dataclasses

from lookahead_jax.decoding.device_drafter import DeviceDrafter
from lookahead_jax.decoding.host_drafter import HostDrafter
from lookahead_jax.decoding.node_choice import Controller
from lookahead_jax.modules.definition import LookaheadModules
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftSettings:
    """What proposes token trees, and how large they are."""

    drafter: HostDrafter | DeviceDrafter
    nodes: int | Controller | None = None
    """Nodes of a step's tree; None chooses by measured cost and accepted tokens."""
