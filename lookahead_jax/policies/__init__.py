"""Eviction policies: each file decides which prompt entries are kept."""

from lookahead_jax.policies.registry import POLICIES, make_policy, policy_summaries

__all__ = ["POLICIES", "make_policy", "policy_summaries"]
