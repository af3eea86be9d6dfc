"""How far slots have an identity: what a target is before one has looked at its problem."""

from __future__ import annotations

import torch
from torch import Tensor

from kava_core.findings.eviction import Explained
from kava_core.store.read import TargetsStore

RECORDS = 512  # the first ones of a store, enough for a share of a variance
READ_RECORDS = 16
SAMPLE_BYTES = 2**28
DIGITS = 6  # beyond them sums differ from processor to processor


def identity_explained(store: TargetsStore) -> Explained:
    """Share of the targets' variance that the pair (slot, position in the trace) explains.

    1 − Σ within the pairs / Σ around the mean, of squares, in each row, head and dimension, over
    the filled slots of the first records; the mean over rows, heads and the dimensions that vary.
    """
    geometry = store.geometry
    count, rows = min(len(store), RECORDS), len(geometry.rows)
    row_bytes = 2 * 4 * count * geometry.kv_heads * geometry.slots * geometry.head_dim
    at_once = max(1, SAMPLE_BYTES // row_bytes)
    shares: dict[str, list[Tensor]] = {"keys": [], "values": []}
    for first in range(0, rows, at_once):
        keys, values, positions = _sample(store, count, slice(first, first + at_once))
        for row in range(keys.shape[1]):
            for head in range(geometry.kv_heads):
                places = positions[:, row, head].long()  # [N, M]
                filled = places >= 0
                slots = torch.arange(geometry.slots).expand_as(places)
                pairs = (slots * (int(places.max()) + 1) + places)[filled]
                for name, tensor in (("keys", keys), ("values", values)):
                    shares[name].append(_explained(tensor[:, row, head][filled], pairs))
    return Explained(**{name: _mean(parts) for name, parts in shares.items()})


def _sample(store: TargetsStore, count: int, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values [N, L', H, M, D] and positions [N, L', H, M] of the first `count` records."""
    pieces = []
    for first in range(0, count, READ_RECORDS):
        batch = store.batch(range(first, min(first + READ_RECORDS, count))).dequantise()
        parts = (batch.keys, batch.values, batch.slot_positions)
        pieces.append(tuple(part[:, rows].clone() for part in parts))
    keys, values, positions = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return keys, values, positions


def _explained(x: Tensor, groups: Tensor) -> Tensor:
    """x [n, D], groups [n] → the share of each dimension that varies, float64."""
    x = x.double()
    _, group, sizes = groups.unique(return_inverse=True, return_counts=True)
    means = x.new_zeros(len(sizes), x.shape[1]).index_add_(0, group, x) / sizes[:, None]
    within = (x - means[group]).square().sum(0)
    total = (x - x.mean(0)).square().sum(0)
    return (1 - within / total)[total > 0]


def _mean(shares: list[Tensor]) -> float | None:
    every = torch.cat(shares)
    return round(float(every.mean()), DIGITS) if len(every) else None
