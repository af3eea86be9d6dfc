"""From teacher caches to targets: score, select, gather, and merge where layers share a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kava_core.errors import KavaError
from kava_core.eviction.batch import CacheBatch
from kava_core.eviction.layers import Share, check_groups
from kava_core.eviction.policies.base import Policy, RotaryPhase, Selection, check_phase
from kava_core.eviction.selection import keepable_tokens, score_all, select_best
from kava_core.rotary import rotate


@dataclass(frozen=True)
class Targets:
    """What is left of B caches.

    L' counts the chosen layers, or the groups of layers where each has one merged cache.

    keys, values:   [B, L', H, M, D] in the dtype of the cache, zero in slots without a token.
    slot_positions: [B, L', H, M] int32, index into the chain of thought, ascending; −1 = no token.
    slot_counts:    [B, L', H] int32, the number of valid slots, which come first.
    lengths:        [B] int32, N_C of each record.
    """

    keys: Tensor
    values: Tensor
    slot_positions: Tensor
    slot_counts: Tensor
    lengths: Tensor

    @property
    def engaged(self) -> Tensor:
        """[B, L', H] bool: a token was really dropped there."""
        return self.slot_counts < self.lengths[:, None, None]


def evict(
    batch: CacheBatch,
    policy: Policy,
    budgets: Sequence[int],
    *,
    select: Selection = "head",
    share: Share = "none",
    groups: Sequence[Sequence[int]] | None = None,
    rotary_phase: RotaryPhase = "pre_rope",
) -> Targets:
    """Keep the best slots of every record, layer and head; M is the largest budget.

    budgets: slots per chosen layer, or per group of layers where they share.
    select:  "head": each layer (or group) and head chooses for itself, as in the paper. "record":
             one choice for all of them, the best by the mean of all scores, so that a slot is one
             token everywhere.
    share:   "selection": the layers of a group keep the same tokens, the best by the mean of their
             scores. "merged": and their keys and values become one cache (see `merge`).
    groups:  adjacent layers that share, as indices into the chosen layers (`group_layers`).
    rotary_phase: the keys of the result, as stored or rotated to their original positions.

    Scores are float32; keys and values are copied in their stored dtype, computed with in float32.
    Raises KavaError for budgets below 1 or not one per layer or group, for budgets that differ
    where one choice serves all, and for groups that do not cover the layers.
    """
    units = check_groups(share, groups, len(batch.layers))
    _check_budgets(budgets, len(units))
    check_phase("rotary_phase", rotary_phase)
    unit_of = [unit for unit, group in enumerate(units) for _ in group]  # of each layer
    per_layer = tuple(budgets[unit] for unit in unit_of)
    scores = score_all(policy, replace(batch, budgets=per_layer))
    ranked, slots = _group_mean(scores, units), list(budgets)
    if select == "record":
        ranked, slots = _record_mean(ranked), _one_budget(budgets)
    positions, counts = select_best(ranked, batch.lengths, slots, keepable_tokens(policy, batch))
    positions = positions.expand(-1, len(units), scores.shape[2], -1).contiguous()
    counts = counts[..., None].expand(-1, len(units), scores.shape[2]).contiguous()
    of_layer = positions[:, unit_of] if share != "none" else positions  # [B, layers, H, M]
    keys, values = _gather(batch.keys, batch, of_layer), _gather(batch.values, batch, of_layer)
    if rotary_phase == "post_rope":
        _rotate_slots(keys, batch, of_layer)
    if share == "selection":
        positions, counts = of_layer, counts[:, unit_of]
    if share == "merged":
        keys, values = _merge_groups(keys, units), _merge_groups(values, units)
    lengths = torch.tensor(batch.lengths, dtype=torch.int32, device=positions.device)
    return Targets(keys, values, positions, counts, lengths)


def merge(vectors: Sequence[Tensor]) -> Tensor:
    """One vector for several, direction and magnitude apart: [..., D] each → [..., D] float32.

    The direction is the renormalised mean of the unit vectors, which for two is the midpoint of
    their arc (the SLERP at ½ with which MiniCache, Liu et al., arXiv 2405.14366, merges adjacent
    layers); the magnitude is the mean of the norms, so that opposing vectors do not shrink it.
    Exactly opposite vectors have no common direction and give zero, as zero vectors do.
    """
    direction = torch.zeros_like(vectors[0], dtype=torch.float32)
    magnitude = direction[..., :1].clone()
    for vector in vectors:
        norm = torch.linalg.vector_norm(vector.float(), dim=-1, keepdim=True)
        direction += vector.float() / norm.masked_fill(norm == 0, 1.0)
        magnitude += norm / len(vectors)
    length = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    return direction * (magnitude / length.masked_fill(length == 0, 1.0))


def _check_budgets(budgets: Sequence[int], count: int) -> None:
    if len(budgets) != count:
        raise KavaError(
            f"expected {count} budgets, one per layer or group of layers, found {len(budgets)}."
        )
    for budget in budgets:
        if not isinstance(budget, int) or budget < 1:
            raise KavaError(f"expected `budget` to be an integer of at least 1, found {budget!r}.")


def _group_mean(scores: Tensor, groups: list[list[int]]) -> Tensor:
    """[T, L', H] → [T, groups, H], added up layer by layer so that the order is always the same."""
    if all(len(group) == 1 for group in groups):
        return scores
    means = []
    for group in groups:
        total = scores[:, group[0]]
        for layer in group[1:]:
            total = total + scores[:, layer]
        means.append(total / len(group))
    return torch.stack(means, dim=1)


def _record_mean(scores: Tensor) -> Tensor:
    """[T, L', H] → [T, 1, 1], added up row by row so that the order is always the same."""
    rows = scores.flatten(1).unbind(1)
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return (total / len(rows))[:, None, None]


def _one_budget(budgets: Sequence[int]) -> list[int]:
    if len(set(budgets)) > 1:
        raise KavaError(
            f"expected one budget where `select: record` chooses for all layers, found "
            f"{list(budgets)}. Set `budget_shape: uniform`, or `select: head`."
        )
    return [budgets[0]]


def _gather(rows: Tensor, batch: CacheBatch, positions: Tensor) -> Tensor:
    """rows [T, L, H, D] at positions [B, L', H, M] → [B, L', H, M, D], zero where −1."""
    _, n_layers, heads, dim = rows.shape
    device = rows.device
    starts = torch.tensor(batch.offsets[:-1], device=device)[:, None, None, None]
    layers = torch.tensor(batch.layers, device=device)[:, None, None]
    head = torch.arange(heads, device=device)[:, None]
    tokens = starts + positions.clamp(min=0)
    index = (tokens * n_layers + layers) * heads + head  # row of the [T·L·H, D] table
    kept = rows.reshape(-1, dim).index_select(0, index.flatten()).view(*positions.shape, dim)
    empty = positions < 0
    return kept.masked_fill_(empty[..., None], 0) if empty.any() else kept


def _rotate_slots(keys: Tensor, batch: CacheBatch, positions: Tensor) -> None:
    """Turn keys [B, L', H, M, D] in place to where their tokens stood; empty slots stay zero."""
    rotary, token_positions = batch.rotation("rotary_phase: post_rope")
    starts = token_positions[list(batch.offsets[:-1])][:, None, None]
    for index, layer in enumerate(batch.layers):
        places = starts + positions[:, index].clamp(min=0)  # [B, H, M]
        cos, sin = rotary.layers([layer]).cos_sin(places)  # [1, B, H, M, R/2]
        keys[:, index] = rotate(keys[:, index].float(), cos[0], sin[0]).to(keys.dtype)


def _merge_groups(slots: Tensor, groups: list[list[int]]) -> Tensor:
    """[B, layers, H, M, D] → [B, groups, H, M, D]; a group of one keeps its bits."""
    merged = [
        slots[:, group[0]]
        if len(group) == 1
        else merge([slots[:, layer] for layer in group]).to(slots.dtype)
        for group in groups
    ]
    return torch.stack(merged, dim=1)
