"""Compiled functions of device drafters outside the decoding step, and a check of their devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lookahead_jax.decoding.device_drafter import DeviceDrafter
from lookahead_jax.decoding.state import DecodeState
from lookahead_jax.decoding.tree import TokenTree
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.jit import program


def check_devices(weights: Any, state: Any) -> None:
    """Raises ValueError if a draft model's arrays are on other devices than the target's.

    One program runs both models, so all arrays must be on the same devices.
    """
    drafts, target = (
        {
            device
            for leaf in jax.tree.leaves(part)
            if isinstance(leaf, jax.Array) and leaf.committed
            for device in leaf.sharding.device_set
        }
        for part in (weights, state)
    )
    if drafts and target and drafts != target:
        raise ValueError(
            f"the draft model is on {len(drafts)} of the devices and the target on {len(target)}: "
            "load both with the same mesh="
        )


@program(static_argnames=("drafter", "room", "config"), donate_argnames=("state",))
def attach(
    state: DecodeState,
    weights: Any,
    prompts: jax.Array,
    *,
    drafter: DeviceDrafter,
    room: int,
    config: ModelConfig,
) -> DecodeState:
    """Every row begins with its prompt [B, T] in the state of a device drafter, new or not."""
    rows = jnp.arange(prompts.shape[0], dtype=jnp.int32)
    known = jax.tree.leaves(state.draft)
    draft = state.draft if known else drafter.init(len(rows), room, config)
    draft = drafter.begin(weights, draft, rows, prompts)
    return dataclasses.replace(state, draft=draft)


@program(static_argnames=("drafter", "nodes"))
def propose_trees(
    weights: Any, state: Any, root: jax.Array, *, drafter: DeviceDrafter, nodes: int
) -> tuple[Any, TokenTree]:
    """The state of a device drafter after proposing, and the trees of the next step."""
    return drafter.propose(weights, state, root, nodes)


@program(static_argnames=("drafter", "nodes"))
def draft_trees(
    weights: Any, state: Any, root: jax.Array, *, drafter: DeviceDrafter, nodes: int
) -> TokenTree:
    """The trees that a device drafter would propose for the next step."""
    return drafter.propose(weights, state, root, nodes)[1]
