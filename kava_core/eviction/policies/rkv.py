"""R-KV: what the answer looks at, plus what nothing else repeats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kava_core.errors import KavaError
from kava_core.eviction.policies.base import Policy, RotaryPhase, check_phase
from kava_core.eviction.policies.redundancy import redundancy

if TYPE_CHECKING:
    from torch import Tensor

    from kava_core.eviction.batch import CacheBatch


@dataclass(frozen=True)
class RKV(Policy):
    """S = λ·I + (1 − λ)·R (Cai et al., *R-KV*, arXiv 2505.24133; KaVa uses λ = 0.1).

    lambda_: λ in [0, 1], the weight of importance; 1 is attention only, 0 redundancy only.
    redundancy_phase: the keys that redundancy compares, `pre_rope` or `post_rope`.
    """

    name = "rkv"

    lambda_: float = 0.1
    redundancy_phase: RotaryPhase = "pre_rope"

    def __post_init__(self) -> None:
        if not isinstance(self.lambda_, int | float) or not 0 <= self.lambda_ <= 1:
            raise KavaError(f"expected `lambda` to be from 0 to 1, found {self.lambda_!r}.")
        check_phase("redundancy_phase", self.redundancy_phase)

    def score(self, batch: CacheBatch) -> Tensor:
        if self.lambda_ == 1:
            return batch.float_importance()
        score = redundancy(batch, self.redundancy_phase).mul_(1 - self.lambda_)
        if self.lambda_ == 0:
            return score
        return score.add_(batch.float_importance() * self.lambda_)
