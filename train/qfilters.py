"""Compute the filters of the policy qfilter for a model, from texts.

    lookahead train qfilters --model DIR --text FILE ... --out FILTERS.safetensors
    lookahead generate --model DIR --policy qfilter --policy-arg file=FILTERS.safetensors ...

The main direction of each KV head's queries over all texts is its filter (policies/qfilter.py).
Directions depend on positions, so long windows (`--length`) are better.
"""

from collections.abc import Sequence

import numpy as np
import tyro

from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.kernels.reductions import reduce_group
from lookahead_jax.policies.qfilter import TENSOR, QFilter, filters_of
from lookahead_jax.train.query_statistics import StatisticsConfig, read_texts, write_statistics


class FilterConfig(StatisticsConfig):
    """Compute the filters of the policy qfilter from texts."""


def write_filters(config: FilterConfig) -> None:
    """Computes the filters, float32 [L, K, H], and writes them to `config.out`."""
    model, sums = read_texts(config, QFilter())
    filters = reduce_group(filters_of(sums), model.config.num_kv_heads, "mean")
    write_statistics(config, model, **{TENSOR: np.asarray(filters)})


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    prog = "lookahead train qfilters"
    return run_command(
        lambda: tyro.cli(FilterConfig, args=args, prog=prog), write_filters, prog=prog
    )


if __name__ == "__main__":
    end_process(main())
