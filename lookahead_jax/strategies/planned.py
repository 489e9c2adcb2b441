"""PG-TD: Monte-Carlo tree search over tokens; each node is judged by the text it leads to."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.decoding.step import Steer
from lookahead_jax.strategies.base import Ranked, Strategy, check_at_least, check_share
from lookahead_jax.strategies.rows import Rows
from lookahead_jax.strategies.texts import is_complete, put_texts, read_texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned(Strategy):
    """Searches the tree of the `k` likeliest tokens after each text for the highest reward.

    A rollout goes down the tree by P-UCB, adds a node, completes its text greedily, and gives the
    reward of the complete text, between 0 and 1, to all nodes above; a node's value is the highest
    that it was given. The tree also has the choices at each token of a completed text, so a node
    on one costs no step of the model. The text of highest reward is the answer, the first of
    equals; the search ends at a reward of 1. (Planning-Guided Transformer Decoding, Zhang et al.
    2023, arXiv:2303.05510; constants, formula and order of their code. They stop after `rollouts`
    only; their completion by beam search is left out, whose default is one beam.)
    """

    reads_reward: ClassVar[bool] = True
    k: int = 3
    rollouts: int = 256
    exploration: float = 4.0
    base: float = 10.0

    def __post_init__(self) -> None:
        check_at_least("k", self.k, 1)
        check_at_least("rollouts", self.rollouts, 1)
        check_at_least("exploration", self.exploration, 0)
        if not math.isfinite(self.exploration):
            raise ValueError(f"exploration={self.exploration} must be a finite number")
        if not 0 < self.base < math.inf:
            raise ValueError(f"base={self.base} must be a finite number above 0")

    def steering(
        self, texts: jax.Array, room: int, sampling: Sampling, vocab_size: int
    ) -> tuple[Steer | None, Any]:
        """Keeps the likeliest tokens of each step."""
        if self.k > vocab_size:
            raise ValueError(f"k={self.k} is more than the vocabulary: lower it")
        shape = (texts.shape[0], room, self.k)
        return Likeliest(self.k), Choices(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape))

    def run(self, rows: Rows) -> list[Ranked]:
        """Moves the rows to their ends; one answer for each prompt."""
        trees = [Tree(self) for _ in rows.texts]
        asked = np.ones(len(trees), bool)
        while True:
            rows.advance()
            texts = {row: trees[row].written(rows, row) for row in np.flatnonzero(asked).tolist()}
            new = {row: text for row, text in texts.items() if text is not None}
            for row, reward in zip(new, rows.score(list(new)), strict=True):
                trees[row].take(new[row]._replace(reward=check_share(reward)))
            wanted = [tree.select() for tree in trees]
            asked = np.array([text is not None for text in wanted])
            if not asked.any():
                break
            texts = [
                output.tokens if text is None else text
                for text, output in zip(wanted, rows.outputs, strict=True)
            ]
            put_texts(rows, texts)
            rows.steer_from(_after(rows.state.steering, rows.state.count))
            read_texts(rows, texts, asked)
            rows.hold(~asked)
        put_texts(rows, [tree.best.tokens for tree in trees])
        return [Ranked(0, [tree.best.reward]) for tree in trees]


class Choices(NamedTuple):
    """The likeliest tokens at each place of a row's text."""

    ids: jax.Array  # [B, W, k] int32, -1 where the text has not come to
    logits: jax.Array  # [B, W, k] float32


@dataclasses.dataclass(frozen=True)
class Likeliest:
    """Changes nothing, and keeps the `k` likeliest tokens of each step, the greedy one first."""

    k: int

    def __call__(
        self, state: Choices, logits: jax.Array, last: jax.Array
    ) -> tuple[Choices, jax.Array]:
        top, ids = jax.lax.top_k(logits, self.k)
        place = (state.ids[..., 0] >= 0).sum(1, dtype=jnp.int32)
        at = jnp.arange(len(ids)), place
        return Choices(
            state.ids.at[at].set(ids.astype(jnp.int32), mode="drop"),
            state.logits.at[at].set(top, mode="drop"),
        ), logits


@jax.jit
def _after(state: Choices, count: jax.Array) -> Choices:
    """The next choices are those after `count` tokens [B]; `Tree` knows the earlier ones."""
    earlier = jnp.arange(state.ids.shape[1])[None, :, None] < count[:, None, None]
    return state._replace(ids=jnp.where(earlier, jnp.maximum(state.ids, 0), -1))


class Text(NamedTuple):
    """A completed text: T tokens."""

    tokens: list[int]
    reward: float
    ids: np.ndarray  # [T, k] int32 choices at each token
    logits: np.ndarray  # [T, k] float32


class Node:
    """The first `depth` tokens of a text, and what is known of the choices after them."""

    def __init__(self, text: Text, depth: int):
        self.text = text
        self.depth = depth
        self.visits = 1
        self.ids: list[int] = []
        if depth < len(text.tokens):
            self.ids = text.ids[depth].tolist()
            odds = np.exp(text.logits[depth].astype(np.float64) - text.logits[depth].max())
            self.prior: list[float] = (odds / odds.sum()).tolist()
        self.children: list[Node | None] = [None] * len(self.ids)
        self.value = [0.0] * len(self.ids)
        self.tried = [0] * len(self.ids)


Path = list[tuple[Node, int]]  # nodes from the root down, and the choice taken at each


class Tree:
    """The search for one prompt."""

    def __init__(self, rules: Planned):
        self._rules = rules
        self._left = rules.rollouts
        self._path: Path = []
        self._root: Node | None = None
        self.best = Text([], -1.0, np.zeros((0, rules.k)), np.zeros((0, rules.k)))

    def written(self, rows: Rows, row: int) -> Text | None:
        """The text that a row has completed for `select`, without its reward.

        None for one that the limits on work have cut: with it the search ends. Only if it is the
        first, that of the prompt, does it count.
        """
        if not is_complete(rows, row):
            self._left = 0
            if self._root is not None:
                return None
        tokens = list(rows.outputs[row].tokens)
        ids, logits = (np.asarray(a)[row, : len(tokens)] for a in rows.state.steering)
        if self._path:  # the row has chosen after the node only
            parent, _ = self._path[-1]
            begin, known = parent.depth + 1, parent.text
            ids = np.concatenate([known.ids[:begin], ids[begin:]])
            logits = np.concatenate([known.logits[:begin], logits[begin:]])
        return Text(tokens, 0.0, ids.copy(), logits.copy())

    def take(self, text: Text) -> None:
        """Takes a text with its reward."""
        if text.reward > self.best.reward:
            self.best = text
        if self._root is None:
            self._root = Node(text, 0)
        else:
            self._add(text)

    def select(self) -> list[int] | None:
        """Makes rollouts until one needs a text completed; that text, or None at the end."""
        while self._root is not None and self._left > 0 and self.best.reward < 1:
            self._left -= 1
            self._path, node = [], self._root
            while node is not None and node.ids:
                choice = self._choose(node)
                self._path.append((node, choice))
                node = node.children[choice]
            if node is not None:  # the end of a text
                self._back_up(node)
                continue
            parent, choice = self._path[-1]
            token, known = parent.ids[choice], parent.text
            if token != known.tokens[parent.depth]:
                return [*known.tokens[: parent.depth], token]
            self._add(known)
        return None

    def _choose(self, node: Node) -> int:
        rules = self._rules
        weight = math.log((node.visits + rules.base + 1) / rules.base) + rules.exploration
        weight *= math.sqrt(math.log(node.visits))
        bounds = [
            value + weight * prior / (1 + tried)
            for value, prior, tried in zip(node.value, node.prior, node.tried, strict=True)
        ]
        return bounds.index(max(bounds))

    def _add(self, text: Text) -> None:
        parent, choice = self._path[-1]
        node = parent.children[choice] = Node(text, parent.depth + 1)
        self._back_up(node)

    def _back_up(self, node: Node) -> None:
        node.visits += 1
        for parent, choice in self._path:
            parent.visits += 1
            parent.tried[choice] += 1
            parent.value[choice] = max(parent.value[choice], node.text.reward)
