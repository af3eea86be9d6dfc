"""R-KV: what the answer looks at, plus what nothing else repeats."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kava_core.errors import KavaError
from kava_core.eviction.base import Policy
from kava_core.eviction.batch import CacheBatch, check_phase
from kava_core.eviction.policies.redundancy import redundancy
from kava_core.rotary import RotaryPhase


@dataclass(frozen=True)
class RKV(Policy):
    """S = λ·I + (1 − λ)·R (Cai et al., *R-KV*, arXiv 2505.24133; KaVa uses λ = 0.1).

    lam: λ in [0, 1], the weight of importance; 1 is attention only, 0 redundancy only.
    redundancy_phase: the keys that redundancy compares, `pre_rope` or `post_rope`.
    """

    lam: float = 0.1
    redundancy_phase: RotaryPhase = "pre_rope"

    def __post_init__(self) -> None:
        if not isinstance(self.lam, int | float) or not 0 <= self.lam <= 1:
            raise KavaError(f"expected λ (`lam`) to be a number from 0 to 1, found {self.lam!r}.")
        check_phase("redundancy_phase", self.redundancy_phase)

    def score(self, batch: CacheBatch) -> Tensor:
        if self.lam == 1:
            return batch.float_importance()
        score = redundancy(batch, self.redundancy_phase).mul_(1 - self.lam)
        return score if self.lam == 0 else score.add_(batch.float_importance() * self.lam)
