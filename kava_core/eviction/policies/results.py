"""Results: the tokens that state what each step comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kava_core.eviction.policies.base import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from kava_core.eviction.batch import CacheBatch


@dataclass(frozen=True)
class Results(Policy):
    """The tokens of the steps' results, and nothing else, in every layer and head.

    Where there are more of them than slots the later ones stay. Of a trace of equations these are
    the right sides; a trace of sentences does not say which of its tokens are results.
    """

    name = "results"

    def score(self, batch: CacheBatch) -> Tensor:
        return batch.token_indices.float()[:, None, None].expand(batch.shape)

    def keepable(self, batch: CacheBatch) -> Tensor:
        return batch.is_result
