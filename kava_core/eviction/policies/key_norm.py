"""Key norm: keep the tokens with the shortest keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kava_core.eviction.base import Policy
from kava_core.eviction.batch import CacheBatch


@dataclass(frozen=True)
class KeyNorm(Policy):
    """S = −‖k_i‖: a short key tends to draw much attention (Devoto et al., arXiv 2406.11430)."""

    def score(self, batch: CacheBatch) -> Tensor:
        score = torch.empty(batch.shape, device=batch.keys.device)
        for tokens, _ in batch.pieces():
            score[tokens] = torch.linalg.vector_norm(batch.float_keys(tokens), dim=-1)
        return score.neg_()
