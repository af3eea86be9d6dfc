"""Value norm: keep the tokens with the longest values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kava_core.eviction.base import Policy
from kava_core.eviction.batch import CacheBatch


@dataclass(frozen=True)
class ValueNorm(Policy):
    """S = ‖v_i‖, in the spirit of VaSE (arXiv 2606.03928), which protects large value norms."""

    def score(self, batch: CacheBatch) -> Tensor:
        score = torch.empty(batch.shape, device=batch.keys.device)
        for tokens, _ in batch.pieces():
            score[tokens] = torch.linalg.vector_norm(batch.float_values(tokens), dim=-1)
        return score
