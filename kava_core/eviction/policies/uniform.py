"""Uniform: evenly spaced tokens, whatever they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kava_core.eviction.policies.base import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from kava_core.eviction.batch import CacheBatch


@dataclass(frozen=True)
class Uniform(Policy):
    """Tokens round(j·(N_C − 1)/(m − 1)), j = 0 … m − 1, with m = min(M, N_C): both ends are kept.

    Halves are rounded up. With one slot it is the middle token.
    """

    name = "uniform"

    def score(self, batch: CacheBatch) -> Tensor:
        if batch.budgets is None:
            raise ValueError("uniform spacing depends on the budgets: set batch.budgets")
        lengths = batch.token_lengths[:, None]
        index = batch.token_indices[:, None]
        slots = lengths.minimum(lengths.new_tensor(batch.budgets))  # [T, L']
        gaps = 2 * (lengths - 1).clamp(min=1)

        def reached(token: Tensor) -> Tensor:
            """How many of the m places lie at or before `token`, in whole numbers."""
            return -(-(2 * token + 1) * (slots - 1)).div(gaps, rounding_mode="floor")

        chosen = reached(index) > reached(index - 1)
        chosen |= (slots == 1) & (index == (lengths - 1) // 2)
        return chosen.float()[..., None].expand(batch.shape)
