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


def of_pairs(pairs: Sequence[tuple[float, float]], *, binary: bool) -> tuple[float, float, float]:
    """The mean of first minus second, and its interval.

    Of scores that are 0 or 1, Wald's with half a pair added to each of the four outcomes (Agresti &
    Min 2005), which is not empty where all pairs agree; of others Student's t.
    """
    first, second = np.array(pairs, np.float64).T
    differences = first - second
    mean = float(differences.mean())
    if not binary:
        return mean, *of_mean(differences)
    n = len(pairs) + 2
    gained, lost = (int((differences == sign).sum()) + 0.5 for sign in (1, -1))
    center = (gained - lost) / n
    error = math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * error
    return mean, max(center - half, -1.0), min(center + half, 1.0)


def of_mean(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Student's t interval of the mean of independent values; infinite for a single one."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return -math.inf, math.inf
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * float(stats.sem(values))
    return mean - half, mean + half
