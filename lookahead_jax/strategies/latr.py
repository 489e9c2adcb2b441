"""LATR: rows that branch where the model is unsure, and stay where the branch differs for long."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.decoding.step import NEVER, Steer
from lookahead_jax.strategies.base import Ranked, check_at_least
from lookahead_jax.strategies.rows import Rows
from lookahead_jax.strategies.self_consistency import SelfConsistency


class Choices(NamedTuple):
    """What a row's last token was chosen from."""

    ids: jax.Array  # [B, W] int32 the likeliest tokens, best first
    p: jax.Array  # [B, W] float32 their probabilities
    growing: jax.Array  # [B] bool whether the row takes the likeliest


@dataclasses.dataclass(frozen=True)
class Grow:
    """Growing rows take the likeliest token; `width` alternatives are remembered."""

    width: int

    def __call__(
        self, state: Choices, logits: jax.Array, last: jax.Array
    ) -> tuple[Choices, jax.Array]:
        p, ids = jax.lax.top_k(jax.nn.softmax(logits), self.width)
        others = jnp.arange(logits.shape[1])[None] != ids[:, :1]
        steered = jnp.where(state.growing[:, None] & others, NEVER, logits)
        return Choices(ids.astype(jnp.int32), p, state.growing), steered


@dataclasses.dataclass(eq=False)
class Branch:
    """One text of a prompt's tree."""

    row: int
    parent: "Branch | None"
    birth: int  # place of its first token that is not its parent's


Tree = list[Branch]  # in the order in which they began; parents come before their children


@dataclasses.dataclass(frozen=True, kw_only=True)
class LATR(SelfConsistency):
    """`n` texts that grow as a tree, of which a reward or the most frequent answer chooses one.

    A prompt begins with one branch. While its tree grows, branches take the likeliest token. Where
    one of the `width` likeliest tokens has a probability above `absolute` and less than `relative`
    below the best, it begins a branch, up to `n`. After each of the `lookahead` numbers of tokens a
    branch is pruned, with its own branches, if the edit distance to its parent over these tokens is
    below `distance` times their number; not if either has ended, nor if the token it replaces is,
    without spaces, a part of `symbols`. The tree is grown when it has `n` branches, all older than
    the last look, when all have ended, or at `tree_tokens`. Free rows then become copies of the
    first branch, unless it has ended, and all rows go on as samples.

    (Xing et al. 2025, arXiv:2510.24302; order and defaults of their code, `tree_tokens` of its runs
    on Countdown. Theirs rolls out texts for training: it grows a batch until all trees are full,
    repeats ended texts to fill a group and mixes in plain samples by a schedule. The choice of one
    text is not theirs.)
    """

    default_sampling: ClassVar[Sampling] = Sampling(temperature=1.0)
    drafts: ClassVar[bool] = False  # rows grow by a logit processor
    reads_reward: ClassVar[bool | None] = None
    n: int = 8
    width: int = 2
    absolute: float = 0.25
    relative: float = 0.15
    lookahead: str = "20,30,50"
    distance: float = 0.4
    symbols: str = "+-*/\\<>=()[]{}_^&%$0123456789"
    tree_tokens: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("width", 1), ("tree_tokens", 1)):
            check_at_least(name, getattr(self, name), least)
        for name in ("absolute", "relative", "distance"):
            check_at_least(name, getattr(self, name), 0)
        if not all(part.strip().isdecimal() and int(part) for part in self.lookahead.split(",")):
            raise ValueError(
                f"lookahead={self.lookahead} must be numbers of tokens from 1, such as 20,30,50"
            )

    @property
    def windows(self) -> list[int]:
        """After how many tokens a branch is compared with its parent."""
        return [int(part) for part in self.lookahead.split(",")]

    def steering(
        self, texts: jax.Array, room: int, sampling: Sampling, vocab_size: int
    ) -> tuple[Steer | None, Any]:
        """Greedy growth; ValueError for a repetition penalty."""
        if sampling.repetition_penalty != 1.0:
            raise ValueError(
                "LATR replaces tokens, which repetition_penalty would still count: leave it 1"
            )
        if sampling.logit_bias:
            raise ValueError("LATR grows by the model's own probabilities: leave logit_bias out")
        if self.width > vocab_size:
            raise ValueError(f"width={self.width} is more than the vocabulary: lower it")
        shape = (texts.shape[0], self.width)
        choices = Choices(
            jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.ones(shape[0], jnp.bool_)
        )
        return Grow(self.width), choices

    def run(self, rows: Rows) -> list[Ranked]:
        """Moves the rows to their ends; one answer for each prompt."""
        if rows.model.tokenizer is None:
            raise ValueError("LATR compares answers, and this model has no tokenizer.json")
        candidates = self._grow(rows)
        rows.advance()
        ranked = []
        for g, group in enumerate(rows.groups):
            chosen = group[: candidates[g]].tolist()
            if rows.reward is None:
                ranked.append(self.voted(rows, chosen))
            else:
                scores = rows.score(chosen)
                ranked.append(Ranked(int(np.argmax(scores)), [*scores]))
        return ranked

    def _grow(self, rows: Rows) -> dict[int, int]:
        """Grows all trees. A prompt's branches are then its first rows; how many are candidates."""
        first = np.arange(rows.groups.size) % self.n == 0
        # The opening has chosen a token in every row; only that of the first branch counts.
        rows.refund(np.ones_like(first))
        rows.end(~first)
        rows.fork(np.arange(len(first)), np.asarray(rows.state.token), first)
        trees: dict[int, Tree] = {
            g: [Branch(int(group[0]), None, 0)] for g, group in enumerate(rows.groups)
        }
        candidates: dict[int, int] = {}
        drew, length = first, 1
        while trees:
            self._branch(rows, trees, drew, length)
            self._prune(rows, trees, length)
            grown = {g: t for g, t in trees.items() if self._grown(rows, t, length)}
            if grown:
                candidates |= self._settle(rows, grown)
                trees = {g: tree for g, tree in trees.items() if g not in grown}
            if trees:
                drew = rows.running
                rows.advance(1)
                length += 1
        return candidates

    def _branch(self, rows: Rows, trees: Mapping[int, Tree], drew: np.ndarray, length: int) -> None:
        """Begins branches beside the last tokens of the rows that `drew` one."""
        choices, left = rows.state.steering, rows.tokens_left
        ids, p = np.asarray(choices.ids), np.asarray(choices.p, np.float64)
        likely = (p > self.absolute) & (p[:, :1] - p < self.relative) & drew[:, None]
        parents, tokens = np.arange(len(drew)), np.zeros(len(drew), np.int32)
        new = np.zeros(len(drew), bool)
        for g, tree in trees.items():
            used = {branch.row for branch in tree}
            free = [row for row in rows.groups[g].tolist() if row not in used]
            # Better tokens come first where not all alternatives find a row.
            options = [
                (i, rank)
                for rank in range(1, self.width)
                for i, branch in enumerate(tree)
                if likely[branch.row, rank]
            ]
            for i, rank in sorted(options[: min(len(free), int(left[g]))]):
                row = free.pop(0)
                parents[row], new[row] = tree[i].row, True
                tokens[row] = ids[tree[i].row, rank]
                tree.append(Branch(row, tree[i], length - 1))
        if new.any():
            rows.fork(parents, tokens, new)

    def _prune(self, rows: Rows, trees: Mapping[int, Tree], length: int) -> None:
        """Ends the branches that are like their parents, with all that began in them."""
        gone: set[Branch | None] = set()
        for tree in trees.values():
            for branch in tree:
                if branch.parent in gone or self._like_its_parent(rows, branch, length):
                    gone.add(branch)
            tree[:] = [branch for branch in tree if branch not in gone]
        ended = np.zeros(rows.groups.size, bool)
        ended[[branch.row for branch in gone if branch is not None]] = True
        rows.end(ended)

    def _like_its_parent(self, rows: Rows, branch: Branch, length: int) -> bool:
        parent, window = branch.parent, length - branch.birth
        if parent is None or window not in self.windows:
            return False
        tokens, ends = np.asarray(rows.state.tokens), np.asarray(rows.state.eos[branch.row])
        pair = tokens[[branch.row, parent.row], branch.birth : length]
        if (pair < 0).any() or np.isin(pair, ends).any():
            return False
        tokenizer: Any = rows.model.tokenizer
        # As in the source, white space is a part of any symbols.
        if self.symbols and tokenizer.decode([int(pair[1, 0])]).strip() in self.symbols:
            return False
        return edit_distance(*pair.tolist()) < self.distance * window

    def _grown(self, rows: Rows, tree: Tree, length: int) -> bool:
        if rows.finished[[branch.row for branch in tree]].all() or length >= self.tree_tokens:
            return True
        youngest = max(branch.birth for branch in tree)
        return len(tree) == self.n and youngest + max(self.windows) < length - 1

    def _settle(self, rows: Rows, trees: Mapping[int, Tree]) -> dict[int, int]:
        """Puts each prompt's branches first, and copies of the first one in its free rows.

        Returns the number of candidates for each prompt.
        """
        index, candidates = rows.groups.copy(), {}
        growing = np.array(rows.state.steering.growing)
        for g, tree in trees.items():
            in_use = [branch.row for branch in tree]
            index[g] = in_use + in_use[:1] * (self.n - len(tree))
            candidates[g] = len(tree) if rows.finished[in_use[0]] else self.n
            growing[rows.groups[g]] = False
        rows.gather(index.reshape(-1))
        # Placed as it was: an array without a place would compile the step once more.
        steering: Choices = rows.state.steering
        growing = jax.device_put(growing, steering.growing.sharding)
        rows.steer_from(steering._replace(growing=growing))
        return candidates


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Insertions, deletions and replacements that lead from one text to the other."""
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
        last = row
    return last[-1]
