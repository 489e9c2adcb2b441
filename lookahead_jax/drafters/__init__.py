"""Drafters: each file proposes token trees from one source."""

from lookahead_jax.drafters.registry import DRAFTERS, make_drafter

__all__ = ["DRAFTERS", "make_drafter"]
