"""From teacher caches to targets: choose layers, select slots, gather them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kava_core.errors import KavaError
from kava_core.eviction.base import Policy, score_all, select
from kava_core.eviction.batch import CacheBatch


@dataclass(frozen=True)
class Targets:
    """What is left of B caches.

    keys, values:   [B, L', H, M, D] in the dtype of the cache, zero in slots without a token.
    slot_positions: [B, L', H, M] int32, index into the chain of thought, ascending; −1 = no token.
    slot_counts:    [B, L', H] int32, the number of valid slots, which come first.
    lengths:        [B] int32, N_C of each record.
    """

    keys: Tensor
    values: Tensor
    slot_positions: Tensor
    slot_counts: Tensor
    lengths: Tensor

    @property
    def engaged(self) -> Tensor:
        """[B, L', H] bool: eviction really dropped something there."""
        return self.slot_counts < self.lengths[:, None, None]


def evict(batch: CacheBatch, policy: Policy, budgets: Sequence[int]) -> Targets:
    """Keep the budgets[l] best slots of every record, layer and head; M is the largest budget.

    Scores are computed in float32, keys and values are copied in their stored dtype.
    """
    budgets = _checked_budgets(budgets, len(batch.layers))
    scores = score_all(policy, replace(batch, budgets=budgets))
    positions, counts = select(scores, batch.lengths, budgets)
    heads = batch.keys.shape[2]
    return Targets(
        _gather(batch.keys, batch, positions),
        _gather(batch.values, batch, positions),
        positions,
        counts[..., None].expand(-1, -1, heads).contiguous(),
        torch.tensor(batch.lengths, dtype=torch.int32, device=positions.device),
    )


def _checked_budgets(budgets: Sequence[int], count: int) -> tuple[int, ...]:
    if len(budgets) != count:
        raise KavaError(f"expected {count} budgets, one per layer, found {len(budgets)}.")
    for budget in budgets:
        if budget < 1:
            raise KavaError(f"expected `budget` to be at least 1, found {budget}.")
    return tuple(budgets)


def _gather(rows: Tensor, batch: CacheBatch, positions: Tensor) -> Tensor:
    """rows [T, L, H, D] at positions [B, L', H, M] → [B, L', H, M, D], zero where −1."""
    _, n_layers, heads, dim = rows.shape
    device = rows.device
    starts = torch.tensor(batch.offsets[:-1], device=device)[:, None, None, None]
    layers = torch.tensor(batch.layers, device=device)[:, None, None]
    head = torch.arange(heads, device=device)[:, None]
    tokens = starts + positions.clamp(min=0)
    index = (tokens * n_layers + layers) * heads + head  # row of the [T·L·H, D] table
    kept = rows.reshape(-1, dim).index_select(0, index.flatten()).view(*positions.shape, dim)
    return kept.masked_fill_((positions < 0)[..., None], 0)
