"""Value norm: keep the tokens with the longest values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kava_core.eviction.policies.base import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from kava_core.eviction.batch import CacheBatch


@dataclass(frozen=True)
class ValueNorm(Policy):
    """S = ‖v_i‖, in the spirit of VaSE (arXiv 2606.03928), which protects large value norms."""

    name = "value_norm"

    def score(self, batch: CacheBatch) -> Tensor:
        score = batch.empty_scores()
        for tokens, _ in batch.pieces():
            score[tokens] = batch.float_values(tokens).norm(dim=-1)
        return score
