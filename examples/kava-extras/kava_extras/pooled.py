"""Pooled: what the answer looks at, and what stands beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kava_core.errors import KavaError
from kava_core.eviction import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from kava_core.eviction import CacheBatch


@dataclass(frozen=True)
class Pooled(Policy):
    """S_i = max of the importance of the tokens i − radius … i + radius, as SnapKV pools it
    (Li et al., arXiv 2404.14469), so that whole phrases are kept instead of single tokens.

    radius: how many tokens to each side, 1 or more.
    """

    name = "pooled"

    radius: int = 1

    def __post_init__(self) -> None:
        if self.radius < 1:
            raise KavaError(
                f"expected `radius` to be 1 or more, found {self.radius}; 0 is policy attention."
            )

    def score(self, batch: CacheBatch) -> Tensor:
        scores = batch.empty_scores()
        importance = batch.float_importance()  # [T, L', H]
        for first, last in batch.spans:  # each record for itself: none sees its neighbour
            for token in range(first, last):
                window = slice(max(first, token - self.radius), min(last, token + self.radius + 1))
                scores[token] = importance[window].amax(dim=0)
        return scores
