"""Attention alone: keep what the answer looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kava_core.eviction.policies.base import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from kava_core.eviction.batch import CacheBatch


@dataclass(frozen=True)
class Attention(Policy):
    """The attention-only ablation of the KaVa paper (λ = 1 in R-KV): the captured importance I."""

    name = "attention"

    def score(self, batch: CacheBatch) -> Tensor:
        return batch.float_importance()
