"""Drafters: each file proposes token trees from one source."""

from lookahead_jax.drafters.registry import DRAFTERS, drafter_summaries, make_drafter

__all__ = ["DRAFTERS", "drafter_summaries", "make_drafter"]
