"""Redundancy alone: drop what other tokens of the trace already say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kava_core.eviction.base import Policy
from kava_core.eviction.batch import CacheBatch, check_phase
from kava_core.rotary import RotaryPhase


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
    is unlike the others. Σ_{j≠i} cos(k_i, k_j) = k̂_i·(Σ_j k̂_j) − 1, so the cost is linear in N_C:
    one pass over the keys for the sum of unit keys, one for the products with it.
    A zero key has no direction: its cosine with every key is 0.
    """
    device = batch.keys.device
    norms = torch.empty(*batch.shape, 1, device=device)
    _, layers, heads = batch.shape
    totals = torch.zeros(len(batch.ids), layers, heads, batch.keys.shape[3], device=device)
    for tokens, parts in batch.pieces():
        units = batch.float_keys(tokens, phase)
        norms[tokens] = torch.linalg.vector_norm(units, dim=-1, keepdim=True)
        units.div_(_nonzero(norms[tokens]))
        for record, part in parts:
            totals[record] += units[part].sum(dim=0)
    scores = torch.empty(batch.shape, device=device)
    # The keys are read and widened once more: cheaper than keeping them all in float32.
    for tokens, parts in batch.pieces():
        keys = batch.float_keys(tokens, phase)
        for record, part in parts:
            keys[part].mul_(totals[record])
        scores[tokens] = keys.sum(dim=-1)
    norms = norms[..., 0]
    scores.div_(_nonzero(norms)).sub_((norms > 0).float())  # Σ_{j≠i} cos(k_i, k_j)
    scores.neg_().div_(batch.token_lengths[:, None, None])
    for first, last in batch.spans:
        scores[first:last] = scores[first:last].softmax(dim=0)
    return scores


def _nonzero(norms: Tensor) -> Tensor:
    return norms.masked_fill(norms == 0, 1.0)
