"""95 % confidence intervals, by scipy."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def of_share(share: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share of n trials (Wilson 1927)."""
    result = stats.binomtest(round(share * n), n)
    low, high = result.proportion_ci(CONFIDENCE, method="wilson")
    return float(low), float(high)


def of_mean(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Student's t interval of the mean of independent values; infinite for a single one."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return -math.inf, math.inf
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * float(stats.sem(values))
    return mean - half, mean + half
