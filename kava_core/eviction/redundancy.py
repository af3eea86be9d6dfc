"""Redundancy alone: drop what other tokens of the trace already say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kava_core.eviction.base import Policy
from kava_core.eviction.batch import CacheBatch, RotaryPhase, check_phase


@dataclass(frozen=True)
class Redundancy(Policy):
    """The cosine-only ablation of the KaVa paper (λ = 0 in R-KV).

    redundancy_phase: whether similarity is between keys as stored, `pre_rope`, or as attention
        sees them, `post_rope`.
    """

    redundancy_phase: RotaryPhase = "pre_rope"

    def __post_init__(self) -> None:
        check_phase("redundancy_phase", self.redundancy_phase)

    def score(self, batch: CacheBatch) -> Tensor:
        return redundancy(batch, self.redundancy_phase)


def redundancy(batch: CacheBatch, phase: RotaryPhase = "pre_rope") -> Tensor:
    """R = softmax_i( −(1/N_C) Σ_{j≠i} cos(k_i, k_j) ), [T, L', H] float32.

    From R-KV (Cai et al., arXiv 2505.24133) as METHOD.md section 2 states it; high for a token that
    is unlike the others. Σ_{j≠i} cos(k_i, k_j) = k̂_i·(Σ_j k̂_j) − 1, so the cost is linear in N_C.
    A zero key has no direction: its cosine with every key is 0.
    """
    units = batch.float_keys(phase)
    norms = torch.linalg.vector_norm(units, dim=-1, keepdim=True)  # [T, L', H, 1]
    units.div_(norms.masked_fill(norms == 0, 1.0))
    for first, last in batch.spans:
        units[first:last].mul_(units[first:last].sum(dim=0))
    others = units.sum(dim=-1) - (norms[..., 0] > 0).float()  # [T, L', H]
    logits = others.neg_().div_(batch.token_lengths()[:, None, None])
    for first, last in batch.spans:
        logits[first:last] = logits[first:last].softmax(dim=0)
    return logits
