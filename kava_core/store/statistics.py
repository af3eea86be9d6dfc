"""Sums of a store's numbers, from which the manifest's standard deviations come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Sums are taken over pieces of about this many numbers, which stay in the processor's cache.
PIECE = 1 << 17

# of each row: how many numbers, their sum, the sum of their squares
Sums = dict[str, list[float]]


def row_sums(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Σx and Σx² of x [A, R, …] for each of its R rows, in float64; the same for any threads."""
    x = x.reshape(x.shape[0], x.shape[1], -1)
    step = max(1, PIECE // x[0].numel())
    total, squares = torch.empty(2, *x.shape[:2], dtype=torch.float64)  # [A, R] each
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # pieces this small only lose by being cut up further
    try:
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            exact = x[part].double()
            torch.sum(exact, -1, out=total[part])
            torch.sum(exact.square_(), -1, out=squares[part])
        return total.sum(0).numpy(), squares.sum(0).numpy()
    finally:
        torch.set_num_threads(threads)


def deviations(parts: Sequence[Sums]) -> tuple[float, ...]:
    """Standard deviation (of the population) per row from the shards' sums, in shard order."""
    count, total, squares = (
        np.sum([part[key] for part in parts], axis=0, dtype=np.float64)
        for key in ("count", "sum", "squares")
    )
    variance = squares / count - (total / count) ** 2
    return tuple(np.sqrt(np.maximum(variance, 0)).tolist())
