"""First Finish Search: several samples, of which the first to end is chosen."""

import dataclasses
from typing import ClassVar

import numpy as np

from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.strategies.base import Ranked
from lookahead_jax.strategies.rows import Rows
from lookahead_jax.strategies.samples import Samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstFinish(Samples):
    """The sample that ends first; the others stop there.

    Of those that end at the same token it is the first, and where none ends by itself, the first of
    all. (Agarwal et al. 2025, First Finish Search, arXiv:2505.18149.)
    """

    default_sampling: ClassVar[Sampling] = Sampling(temperature=0.6, top_p=0.95)
    n: int = 4

    def run(self, rows: Rows) -> list[Ranked]:
        """Moves the rows to their ends; one answer for each prompt."""
        rows.advance(first=True)
        ended = np.array([output.finish() != "length" for output in rows.outputs])
        ended = ended.reshape(rows.groups.shape)
        return [Ranked(int(e.argmax()), [float(x) for x in e]) for e in ended]
