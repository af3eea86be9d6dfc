"""Streaming: the beginning as an anchor, and the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kava_core.errors import KavaError
from kava_core.eviction.policies.base import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from kava_core.eviction.batch import CacheBatch


@dataclass(frozen=True)
class Streaming(Policy):
    """The first tokens of the trace and the most recent ones (Xiao et al., arXiv 2309.17453).

    first: how many tokens of the beginning come before the recent ones, 0 or more. With fewer slots
        than that only the beginning is kept.
    """

    name = "streaming"

    first: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.first, int) or isinstance(self.first, bool) or self.first < 0:
            raise KavaError(
                f"expected `first` to be an integer of 0 or more, found {self.first!r}."
            )

    def score(self, batch: CacheBatch) -> Tensor:
        index = batch.token_indices
        anchors = batch.token_lengths + self.first - index  # above every index
        score = anchors.where(index < self.first, index).float()
        return score[:, None, None].expand(batch.shape)
