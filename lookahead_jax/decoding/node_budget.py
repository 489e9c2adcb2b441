"""One budget of nodes per step for all rows, spent where most is expected to be accepted.

A step in which a row may have up to n nodes has about n / 4 for each row, or more where they are
cheap. The root of every row is among them; the others go to the nodes that are likeliest to be
accepted, whichever row they belong to. A node's chance is that of its place in the drafts of its
row, as observed. Nodes that a draft does not have cost nothing. B batch, P nodes of the largest
tree.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lookahead_jax.decoding.host_drafter import Draft
from lookahead_jax.decoding.tree import NODE_BUCKETS
from lookahead_jax.kernels.dispatch import target_platform

SHARE = 4  # a row's largest tree over its share of the budget
CHEAP_NODES = 256  # on accelerators, where reading the weights takes longer than so many products
PLACES = 7  # node i of a tree, from 1 on, belongs to the group of places log2(i)
KEEP = 0.97  # of the evidence on a row, per step
PRIOR_NODES = 4.0  # nodes that the chances of all rows count as evidence on one row
FIRST_CHANCES = 0.5 * 0.75 ** np.arange(PLACES)  # before any evidence; they count as much


def total_nodes(batch: int, nodes: int) -> int:
    """Nodes of a step of `batch` rows that have up to `nodes` nodes each; at least one per row."""
    least = 0 if target_platform() == "cpu" else CHEAP_NODES
    if nodes == 1:
        return batch
    return min(max(nodes * batch // SHARE, nodes, batch, least), batch * nodes)


def needed(
    drafts: Sequence[Draft], most: int, buckets: Sequence[int], batch: int
) -> tuple[int, bool]:
    """The smallest size up to `most` that reads as many nodes as `most`, and if that cuts drafts.

    If it does, larger sizes might have read more. `batch` rows share a budget; 1: they do not.
    """
    sizes = [len(draft.tokens) + 1 for draft in drafts] or [1]

    def read(nodes: int) -> tuple[int, int]:
        total = sum(sizes)
        if batch > 1:
            total = min(total, total_nodes(batch, nodes))
        return min(max(sizes), nodes), total

    enough = next(nodes for nodes in buckets if read(nodes) == read(most))
    return enough, max(sizes) >= most or read(most)[1] < sum(sizes)


@functools.cache
def place_groups(nodes: int) -> np.ndarray:
    """float32 [P, PLACES], 1 where a node belongs to a group of places; the root has none."""
    groups = np.zeros((nodes, PLACES), np.float32)
    index = np.arange(1, nodes)
    groups[index, np.log2(index).astype(int)] = 1.0
    return groups


def affordable(
    worth: Float[Array | np.ndarray, "B P"] | None,
    valid: Bool[Array | np.ndarray, "B P"],
    part: float = 1.0,
) -> Bool[Array | np.ndarray, "#B P 6"]:
    """The nodes of `valid` trees that steps with up to NODE_BUCKETS[i] nodes per row would read.

    These are the ones that are worth most. A node is taken for worth no more than the nodes before
    it, so that no node is read without those above it. `worth` None: there is no common budget, and
    a step reads the first nodes of each tree. `part` of the budget is for these trees, the rest for
    rows that have none here. Arrays of NumPy give one of NumPy.
    """
    on_device = isinstance(valid, jax.Array)
    xp: Any = jnp if on_device else np
    running_minimum: Any = jax.lax.cummin if on_device else np.minimum.accumulate
    batch, nodes = valid.shape
    index = np.arange(nodes, dtype=np.int32)[:, None]
    first = index < np.asarray(NODE_BUCKETS, np.int32)[None]  # [P, 6]
    if worth is None:
        return xp.asarray(first[None])
    scores = xp.where(index.T == 0, np.float32(np.inf), running_minimum(worth, axis=1))
    order = xp.argsort(xp.where(valid, -scores, np.float32(np.inf)).reshape(-1), stable=True)
    wanted = (valid[..., None] & first[None]).reshape(batch * nodes, -1)[order]
    budgets = np.asarray([round(part * total_nodes(batch, n)) for n in NODE_BUCKETS], np.int32)
    taken = wanted & (xp.cumsum(wanted, axis=0, dtype=np.int32) <= budgets[None])
    if on_device:
        taken = jnp.zeros_like(taken).at[order].set(taken, unique_indices=True)
    else:
        taken[order] = taken.copy()
    return taken.reshape(batch, nodes, -1)


class RowChances:
    """How likely nodes are to be accepted, by row and place in the draft, from what was observed.

    Without evidence on a row, and as it fades, the chances are those of all rows.
    """

    def __init__(self, batch: int):
        self._read = np.zeros((batch, PLACES))
        self._accepted = np.zeros((batch, PLACES))
        self._all_read = np.zeros(PLACES)
        self._all_accepted = np.zeros(PLACES)

    def begin(self, row: int) -> None:
        """Another request has the row."""
        self._read[row] = self._accepted[row] = 0.0

    def learn(self, places: np.ndarray, steps: int) -> None:
        """So many steps have read and accepted these nodes, [B, 2, PLACES]."""
        read, accepted = places.swapaxes(0, 1)
        keep = KEEP**steps
        self._read = keep * self._read + read
        self._accepted = keep * self._accepted + accepted
        self._all_read = keep * self._all_read + read.sum(0)
        self._all_accepted = keep * self._all_accepted + accepted.sum(0)

    def worth(self, nodes: int) -> np.ndarray:
        """The chance of each node, float32 [B, P]; smooth over the places, and falling."""
        common = self._all_accepted + PRIOR_NODES * FIRST_CHANCES
        common /= self._all_read + PRIOR_NODES
        rates = (self._accepted + PRIOR_NODES * common) / (self._read + PRIOR_NODES)
        rates = np.minimum.accumulate(rates, axis=1)
        return (rates @ _shares_of_places(nodes)).astype(np.float32)


@functools.cache
def _shares_of_places(nodes: int) -> np.ndarray:
    """[PLACES, P] how much each group's chance counts for each node: interpolated between groups.

    Of equal chances the earlier places come first, whatever their row.
    """
    place = np.log2(np.maximum(np.arange(nodes), 1))
    middle = np.arange(PLACES) + np.where(np.arange(PLACES) > 0, 0.5, 0.0)
    smooth = np.stack([np.interp(place, middle, group) for group in np.eye(PLACES)])
    return smooth * (1.0 - 1e-3 * np.arange(nodes) / NODE_BUCKETS[-1])
