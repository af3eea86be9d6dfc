"""From scores to slots: the check of the scores, the best M per head, temporal order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kava_core.errors import KavaError
from kava_core.eviction.batch import CacheBatch
from kava_core.eviction.policies import REGISTRY, Policy

PADDING = torch.iinfo(torch.int64).min
SELECT_ELEMENTS = 1 << 24  # scores ranked at a time


def score_all(policy: Policy, batch: CacheBatch) -> Tensor:
    """Scores of a batch, [T, L', H] float32.

    KavaError, naming the policy, for scores of another shape or type and where another package's
    cannot score; one naming the record with a score not finite.
    """
    with REGISTRY.guarded(type(policy), "to score"):
        scores = policy.score(batch)
    if not _is(scores, batch.shape, torch.float32):
        raise KavaError(
            f"{REGISTRY.whose(type(policy))}: expected scores [T, L', H] = {list(batch.shape)} of "
            f"torch.float32 from {policy}, found {_described(scores)}. Mend the policy."
        )
    broken = (~torch.isfinite(scores)).flatten(1).any(1)
    if broken.any():
        token = int(broken.nonzero()[0])
        record = next(i for i, (_, last) in enumerate(batch.spans) if token < last)
        blame = (
            "The teacher's cache of the record is finite: mend the policy, or choose another."
            if _is_finite(batch, record)
            else "The teacher cache holds broken numbers: run the generate stage again."
        )
        raise KavaError(
            f"{REGISTRY.whose(type(policy))}: record {batch.ids[record]!r}: expected finite scores "
            f"from {policy}, found NaN or infinity at token {token - batch.offsets[record]} of the "
            f"trace. {blame}"
        )
    return scores


def keepable_tokens(policy: Policy, batch: CacheBatch) -> Tensor | None:
    """[T] bool, what may be kept, at least one token of each record; None: anything.

    KavaError, naming the policy, for anything else and where another package's cannot say.
    """
    with REGISTRY.guarded(type(policy), "to say what may be kept"):
        keepable = policy.keepable(batch)
    if keepable is None:
        return None
    whose = REGISTRY.whose(type(policy))
    if not _is(keepable, batch.shape[:1], torch.bool):
        raise KavaError(
            f"{whose}: expected None or [T] = {list(batch.shape[:1])} of torch.bool from "
            f"`keepable` of {policy}, found {_described(keepable)}. Mend the policy."
        )
    kept = torch.stack([part.any() for part in keepable.split(list(batch.lengths))]).tolist()
    if not all(kept):
        raise KavaError(
            f"{whose}: expected {policy} to let at least one token of every record be kept, found "
            f"none of record {batch.ids[kept.index(False)]!r}. Mend the policy."
        )
    return keepable


def select_best(
    scores: Tensor,
    lengths: Sequence[int],
    budgets: Sequence[int],
    keepable: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The budgets[l] best tokens of each record and head, in temporal order.

    scores [T, L', H] float32 of records of `lengths` laid end to end; budgets: one per layer;
    keepable [T] bool: the tokens to choose from, None: all. Returns positions [B, L', H, M] int32,
    the kept tokens' places in their trace, −1 after the last (M is the largest budget), and counts
    [B, L'] int32 = min(tokens to choose from, budget). Of equal scores the earlier token wins.
    """
    n_layers, heads = scores.shape[1:]
    width = max(budgets)
    device = scores.device
    sizes = torch.tensor(lengths, device=device)
    starts = sizes.cumsum(0) - sizes
    choices = sizes
    if keepable is not None:
        choices = torch.stack([part.sum() for part in keepable.split(list(lengths))])  # [B]
    counts = torch.minimum(choices[:, None], torch.tensor(budgets, device=device))  # [B, L']
    positions = torch.full(
        (len(lengths), n_layers, heads, width), -1, dtype=torch.int32, device=device
    )
    ranks = _ranking_keys(scores, sizes, starts)
    if keepable is not None:
        ranks = ranks.masked_fill(~keepable[:, None, None], PADDING)
    for chosen in _similar_lengths(lengths, n_layers * heads):
        records = torch.tensor(chosen, device=device)
        longest = max(lengths[record] for record in chosen)
        tokens = torch.arange(longest, device=device)
        valid = tokens < sizes[records, None]  # [B', N]
        rows = (starts[records, None] + tokens).clamp(max=scores.shape[0] - 1)
        padded = ranks[rows].masked_fill(~valid[..., None, None], PADDING)  # [B', N, L', H]
        kept = min(width, longest)
        best = padded.permute(0, 2, 3, 1).topk(kept, dim=-1).indices  # best first
        excess = torch.arange(kept, device=device) >= counts[records, :, None, None]
        best = best.masked_fill(excess, longest).sort(dim=-1).values
        positions[records, ..., :kept] = best.masked_fill(best == longest, -1).to(torch.int32)
    return positions, counts.to(torch.int32)


def _is(found: object, shape: Sequence[int], dtype: torch.dtype) -> bool:
    return isinstance(found, Tensor) and found.shape == tuple(shape) and found.dtype == dtype


def _described(found: object) -> str:
    if isinstance(found, Tensor):
        return f"{list(found.shape)} of {found.dtype}"
    return str(type(found))


def _is_finite(batch: CacheBatch, record: int) -> bool:
    """Whether all is finite that the cache holds of a record in the layers that take part."""
    first, last = batch.spans[record]
    held = [x for x in (batch.keys, batch.values, batch.importance) if x is not None]
    return all(bool(x[first:last, list(batch.layers)].isfinite().all()) for x in held)


def _ranking_keys(scores: Tensor, sizes: Tensor, starts: Tensor) -> Tensor:
    """[T, L', H] int64, ordered as the scores and, among equals, from late to early.

    A top-k over distinct integers has one answer; over floats with ties it may have many. The upper
    half is the float's bits made monotone, the lower half counts down along the trace.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns −0 into 0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    tokens = torch.arange(scores.shape[0], device=scores.device)
    place = tokens - starts.repeat_interleave(sizes, output_size=scores.shape[0])
    return (ordered << 32) + (0x7FFFFFFF - place)[:, None, None]


def _similar_lengths(lengths: Sequence[int], columns: int) -> list[list[int]]:
    """Records cut into groups that pad each other to less than twice their length."""
    groups: list[list[int]] = []
    open_groups: dict[int, list[int]] = {}
    for record, length in enumerate(lengths):
        scale = (length - 1).bit_length()
        group = open_groups.get(scale)
        if group is None or len(group) * columns << scale >= SELECT_ELEMENTS:
            group = open_groups[scale] = []
            groups.append(group)
        group.append(record)
    return groups
