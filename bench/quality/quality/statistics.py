# SPDX-License-Identifier: Apache-2.0
"""Means with intervals, and paired differences, over samples that all variants answered."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 2000


@dataclass(frozen=True)
class Mean:
    """A mean, its 95 % bootstrap interval, and the number of samples behind it."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean(values: np.ndarray, seed: int = 0) -> Mean:
    """The mean of `values` [samples]. An interval takes at least two different values: else it is the mean itself."""
    if values.size == 0:
        raise ValueError("0 samples have no mean")
    value = float(values.mean())
    if values.size < 2 or np.all(values == values[0]):
        return Mean(value, value, value, values.size)
    interval = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return Mean(value, float(interval.low), float(interval.high), values.size)


def paired_difference(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Mean:
    """Mean of `first - second` [samples] over the same samples: its interval leaves out what makes samples differ."""
    if first.shape != second.shape:
        raise ValueError(f"{first.size} and {second.size} samples are not paired")
    return mean(first - second, seed)
