"""How far quantisation moves keys and values: relative error, and changed nearest neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# Neighbours cost the square of a trace's length. Slots are few and all are looked at; of a teacher
# shard, these many records and tokens each.
SAMPLE_RECORDS = 16
SAMPLE_TOKENS = 128
# Records (or tokens) worked on together.
RECORDS, TOKENS = 8, 512


def drift_sums(
    x: Tensor, decoded: Tensor, spans: Tensor, valid: Tensor | None
) -> dict[str, list[float]]:
    """Sums for `merge_drift`, per cache row [L'].

    x, decoded: [N, L', H, M, D] with valid [N, L', H, M], or [ΣN_C, L', H, D] with valid None and
    spans [N+1] cutting it into records.
    """
    error, norm = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    changed, slots = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    step = TOKENS if valid is None else RECORDS
    for start in range(0, len(x), step):
        before, after = x[start : start + step], decoded[start : start + step]
        exact, moved = before.double(), after.double()
        if valid is not None:
            mask = valid[start : start + step]
            exact, moved = exact * mask[..., None], moved * mask[..., None]
            seen = _changed(before, after, mask)
            changed += seen[0]
            slots += seen[1]
        error += (moved - exact).square().flatten(2).sum(-1).numpy().sum(0)
        norm += exact.square().flatten(2).sum(-1).numpy().sum(0)
    if valid is None:
        for start, stop in zip(spans[:-1].tolist(), spans[1:].tolist(), strict=True):
            if start >= spans[min(SAMPLE_RECORDS, len(spans) - 1)]:
                break
            part = slice(start, min(stop, start + SAMPLE_TOKENS))
            before, after = (y[part].movedim(0, 2)[None] for y in (x, decoded))  # [1, L', H, n, D]
            seen = _changed(before, after, torch.ones(before.shape[:-1], dtype=torch.bool))
            changed += seen[0]
            slots += seen[1]
    sums = {"error": error, "norm": norm, "changed": changed, "slots": slots}
    return {name: total.tolist() for name, total in sums.items()}


def merge_drift(shards: list[dict[str, Any] | None]) -> dict[str, tuple[float, ...]] | None:
    """The manifest's `drift` from the shards' sums, in order; None if nothing is quantised."""
    merged: dict[str, tuple[float, ...]] = {}
    for name in ("keys", "values"):
        parts = [shard[name] for shard in shards if shard is not None]
        if not parts:
            return None
        error, norm, changed, slots = (
            np.sum([part[key] for part in parts], axis=0, dtype=np.float64)
            for key in ("error", "norm", "changed", "slots")
        )
        tiny = np.finfo(np.float64).tiny
        merged[f"{name}_relative_l2"] = tuple(np.sqrt(error / np.maximum(norm, tiny)).tolist())
        merged[f"{name}_neighbour_changed"] = tuple((changed / np.maximum(slots, 1)).tolist())
    return merged


def _changed(before: Tensor, after: Tensor, valid: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Slots whose nearest other slot changed, and slots that have one; [L'] each.

    before, after: [n, L', H, M, D]; valid: [n, L', H, M].
    """
    has_other = valid & (valid.sum(-1, keepdim=True) > 1)
    moved = (_nearest(before, valid) != _nearest(after, valid)) & has_other
    return tuple(flags.sum((0, 2, 3)).double().numpy() for flags in (moved, has_other))  # type: ignore[return-value]


def _nearest(x: Tensor, valid: Tensor) -> Tensor:
    """Index of the nearest other valid slot: x [n, L', H, M, D] → [n, L', H, M]."""
    x = x.float()
    # without matrix products, whose rounding depends on the number of threads
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance.masked_fill(~valid[..., None, :], torch.inf)
    return distance.diagonal_scatter(torch.full(x.shape[:-1], torch.inf), dim1=-2, dim2=-1).argmin(
        -1
    )
