"""KeyDiff, as a scorer in kvpress' convention, and as a policy around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kava_core.eviction.press import PressPolicy


@dataclass
class KeyDiffScorer:
    """Keeps keys that are unlike the mean direction of all keys (arXiv 2504.15364)."""

    compression_ratio: float = 0.0

    def score(
        self,
        module: Any,
        hidden_states: Any,
        keys: Tensor,
        values: Tensor,
        attentions: Any,
        kwargs: Any,
    ) -> Tensor:
        mean = normalize(keys, dim=-1).mean(dim=2, keepdim=True)  # [1, H, 1, D]
        return -cosine_similarity(keys, mean, dim=-1)


@dataclass(frozen=True)
class KeyDiff(PressPolicy):
    """Policy `keydiff`."""

    name = "keydiff"

    def press(self) -> KeyDiffScorer:
        return KeyDiffScorer()
