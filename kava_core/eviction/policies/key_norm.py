"""Key norm: keep the tokens with the shortest keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kava_core.eviction.policies.base import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from kava_core.eviction.batch import CacheBatch


@dataclass(frozen=True)
class KeyNorm(Policy):
    """S = −‖k_i‖: a short key tends to draw much attention (Devoto et al., arXiv 2406.11430)."""

    name = "key_norm"

    def score(self, batch: CacheBatch) -> Tensor:
        score = batch.empty_scores()
        for tokens, _ in batch.pieces():
            score[tokens] = batch.float_keys(tokens).norm(dim=-1)
        return score.neg_()
