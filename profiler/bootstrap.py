"""Percentile bootstrap of means over prompts: seeded and summed in a fixed order, so that plans are bit-identical."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
# Weights held at a time; memory does not grow with the number of prompts.
BLOCK_VALUES = 4_000_000


def mean_intervals(values: np.ndarray, seed: int) -> np.ndarray:
    """95 % intervals of the mean of each column.

    Prompts are resampled together for all columns, so that intervals of layers and estimators belong together.

    Args:
        values: ``[prompts, ...]`` fp64, at least two prompts.
        seed: of the resampling.

    Returns:
        ``[2, ...]``: lower and upper ends.
    """
    n = len(values)
    columns = values.reshape(n, -1)
    rng = np.random.default_rng(seed)
    means = np.empty((RESAMPLES, columns.shape[1]))
    block = max(1, BLOCK_VALUES // n)
    for start in range(0, RESAMPLES, block):
        drawn = rng.integers(n, size=(min(block, RESAMPLES - start), n))
        # Not a matrix product: BLAS sums in an order that depends on its number of threads.
        means[start : start + len(drawn)] = np.einsum("rn,nc->rc", _counts(drawn, n), columns) / n
    ends = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return ends.reshape(2, *values.shape[1:])


def _counts(drawn: np.ndarray, n: int) -> np.ndarray:
    """``[resamples, n]`` fp64: how often each prompt was drawn."""
    offset = drawn + n * np.arange(len(drawn))[:, None]
    return np.bincount(offset.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
