"""Redundancy alone: drop what other tokens of the trace already say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kava_core.eviction.policies.base import Policy, RotaryPhase, check_phase

if TYPE_CHECKING:
    from torch import Tensor

    from kava_core.eviction.batch import CacheBatch


@dataclass(frozen=True)
class Redundancy(Policy):
    """The cosine-only ablation of the KaVa paper (λ = 0 in R-KV).

    redundancy_phase: whether similarity is between keys as stored, `pre_rope`, or as attention
        sees them, `post_rope`.
    """

    name = "redundancy"

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
    norms = batch.empty_scores()[..., None]
    _, layers, heads = batch.shape
    totals = norms.new_zeros(len(batch.ids), layers, heads, batch.keys.shape[3])
    for tokens, parts in batch.pieces():
        units = batch.float_keys(tokens, phase)
        norms[tokens] = units.norm(dim=-1, keepdim=True)
        units.div_(_nonzero(norms[tokens]))
        for record, part in parts:
            totals[record] += units[part].sum(dim=0)
    scores = batch.empty_scores()
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
