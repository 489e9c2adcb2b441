"""Best of n: several samples, of which a reward chooses one."""

import dataclasses
from typing import ClassVar

import numpy as np

from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.strategies.base import Ranked
from lookahead_jax.strategies.rows import Rows
from lookahead_jax.strategies.samples import Samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfN(Samples):
    """The sample of the highest reward; the first of equals."""

    default_sampling: ClassVar[Sampling] = Sampling(temperature=0.8)
    reads_reward: ClassVar[bool] = True

    def run(self, rows: Rows) -> list[Ranked]:
        """Moves the rows to their ends; one answer for each prompt."""
        rows.advance()
        scores = np.reshape(rows.score(range(rows.groups.size)), rows.groups.shape)
        return [Ranked(int(np.argmax(s)), s.tolist()) for s in scores]
