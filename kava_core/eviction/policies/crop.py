"""Crop: keep the beginning of the trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kava_core.eviction.policies.base import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from kava_core.eviction.batch import CacheBatch


@dataclass(frozen=True)
class Crop(Policy):
    """The first M tokens, an ablation of the KaVa paper."""

    name = "crop"

    def score(self, batch: CacheBatch) -> Tensor:
        return (-batch.token_indices.float())[:, None, None].expand(batch.shape)
