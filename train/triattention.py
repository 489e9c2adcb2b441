"""Compute the statistics of the policy triattention for a model, from texts.

    lookahead train triattention --model DIR --text FILE ... --out QUERIES.safetensors
    lookahead generate --model DIR --policy triattention \\
        --policy-arg file=QUERIES.safetensors --evict-every 128 ...

They are the mean of each head's queries before RoPE over all texts, and the mean norms of the pairs
of dimensions that RoPE turns together (policies/triattention.py).
"""

from collections.abc import Sequence

import numpy as np
import tyro

from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.policies.triattention import MEAN, NORMS, TriAttention
from lookahead_jax.train.query_statistics import StatisticsConfig, read_texts, write_statistics


class QueryConfig(StatisticsConfig):
    """Compute the statistics of the policy triattention from texts."""


def write_centres(config: QueryConfig) -> None:
    """Computes the mean queries [L, N, H] and norms [L, N, F] and writes them to `config.out`."""
    model, sums = read_texts(config, TriAttention())
    count = np.asarray(sums.count)[:, None, None]
    mean, norms = (np.asarray(total) / count for total in (sums.queries, sums.norms))
    write_statistics(config, model, **{MEAN: mean, NORMS: norms})


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    prog = "lookahead train triattention"
    return run_command(
        lambda: tyro.cli(QueryConfig, args=args, prog=prog), write_centres, prog=prog
    )


if __name__ == "__main__":
    end_process(main())
