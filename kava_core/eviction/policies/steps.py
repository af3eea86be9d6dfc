"""Steps: the token in which each step of the trace ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kava_core.errors import KavaError
from kava_core.eviction.policies.base import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from kava_core.eviction.batch import CacheBatch


@dataclass(frozen=True)
class Steps(Policy):
    """The last token of each step, and nothing else: one slot is one step, in every layer and head.

    Where there are more of them than slots the later steps' stay.

    last: how many tokens of the end of each step are kept, 1 or more.
    """

    name = "steps"

    last: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.last, int) or isinstance(self.last, bool) or self.last < 1:
            raise KavaError(f"expected `last` to be an integer of 1 or more, found {self.last!r}.")

    def score(self, batch: CacheBatch) -> Tensor:
        late = batch.token_indices - batch.tokens_to_step_end * batch.token_lengths
        return late.float()[:, None, None].expand(batch.shape)

    def keepable(self, batch: CacheBatch) -> Tensor:
        return batch.tokens_to_step_end < self.last
