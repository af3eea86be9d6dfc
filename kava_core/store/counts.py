"""What eviction did to the traces of a store: counted as its shards are written, or read again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Self

import numpy as np

from kava_core.store.read import TargetsStore


@dataclass(frozen=True)
class EvictionCounts:
    """What eviction did to some traces, counted per (record, cache row, head).

    places: how many of these there are; engaged: those from which a token was really dropped.
    tokens: of all traces, once per row and head; kept: those that fill a slot; agreeing: those of
    the kept that are the most common one of their record's slot over all rows and heads. judged:
    the kept tokens of records that say which tokens state results; results: those that do.
    """

    places: int
    engaged: int
    tokens: int
    kept: int
    agreeing: int
    judged: int
    results: int

    @classmethod
    def of(cls, store: TargetsStore) -> Self:
        """Those of `store`, whose tensors are read shard by shard."""
        return cls.sum(cls._read(store, shard) for shard in range(len(store.sizes)))

    @classmethod
    def _read(cls, store: TargetsStore, shard: int) -> Self:
        index = store.index.shard(shard)
        starts, results = index["results"]
        known = [results[first:last] for first, last in pairwise(starts)]
        return cls.count(store.slot_positions(shard), index["n_cot"], known)

    @classmethod
    def sum(cls, parts: Iterable[Self]) -> Self:
        return cls(*(sum(column) for column in zip(*map(astuple, parts), strict=True)))

    @classmethod
    def count(
        cls, positions: np.ndarray, lengths: np.ndarray, results: Iterable[Sequence[int]]
    ) -> Self:
        """positions: [N, L', H, M], −1 where a slot is empty; lengths: [N]; results: of each record
        the places in its trace that state a result, none where that is not known."""
        counts = (positions >= 0).sum(-1)
        tokens = np.broadcast_to(lengths[:, None, None], counts.shape)
        agreeing = judged = stated = 0
        for row, (record, known) in enumerate(zip(positions, results, strict=True)):
            agreeing += _most_common(record.reshape(-1, record.shape[-1]))
            if len(known):
                judged += int(counts[row].sum())
                stated += int(np.isin(record, known).sum())
        return cls(
            places=counts.size,
            engaged=int((counts < tokens).sum()),
            tokens=int(tokens.sum(dtype=np.int64)),
            kept=int(counts.sum(dtype=np.int64)),
            agreeing=agreeing,
            judged=judged,
            results=stated,
        )

    @property
    def engaged_percent(self) -> float:
        return 100 * self.engaged / self.places

    @property
    def kept_percent(self) -> float:
        return 100 * self.kept / self.tokens

    @property
    def agreement_percent(self) -> float:
        return 100 * self.agreeing / self.kept

    @property
    def result_percent(self) -> float | None:
        """None where no record says which tokens state results."""
        return 100 * self.results / self.judged if self.judged else None


def _most_common(positions: np.ndarray) -> int:
    """positions [places, M] → how many hold the most common one of their slot; −1 is none."""
    slots = positions.shape[1]
    ids = positions * slots + np.arange(slots)  # a number for each pair of position and slot
    held = np.bincount(ids[positions >= 0])
    held = np.pad(held, (0, -len(held) % slots)).reshape(-1, slots)
    return int(held.max(0).sum())
