"""Token ids of several lengths in one tensor, and which of them to put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad(rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
    """Token ids → ids, mask [B, longest] int64; padding is 0, on the `left` or the `right`."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, span] = torch.as_tensor(row, dtype=torch.long)
        mask[i, span] = 1
    return ids, mask


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """The indices of `lengths` in batches of similar length: the shortest first, equal ones in
    their own order. What shares a batch depends on the lengths alone."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)  # stable
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
