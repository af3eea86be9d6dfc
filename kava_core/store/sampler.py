"""The order in which a trainer reads a store: shards shuffled, then records in a window of them.

A window keeps reads near each other (few shards are in use at a time) without giving up the
randomness of an order over many shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class ShardShuffleSampler(Sampler[int]):
    """Record indices of a store in an order that depends on `seed` and the epoch, nothing else.

    sizes: records per shard (`TargetsStore.sizes`). window: how many shards are mixed at a time; at
    least the number of shards gives a full shuffle. rank, world: this process takes every
    `world`-th record of the common order, so ranks are disjoint, together complete, and differ in
    length by at most one. Leave them alone under `transformers.Trainer`, whose accelerate deals the
    batches out itself (and calls `set_epoch`). Loader workers need nothing: the order is made in
    the main process.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        seed: int,
        window: int = 16,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, found {window}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be from 0 to {world - 1}, found {rank}")
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.seed = seed
        self.window = window
        self.rank = rank
        self.world = world
        self.epoch = 0
        self._start = 0

    def __len__(self) -> int:
        """Records of this rank in a whole epoch."""
        return (int(self.sizes.sum()) - self.rank + self.world - 1) // self.world

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch; `start` records of this rank are skipped, once, to go on in its middle.

        With batches of B records, `start` is B times the number of batches already trained on.
        """
        self.epoch = epoch
        self._start = start

    def __iter__(self) -> Iterator[int]:
        start, self._start = self._start, 0
        # one stream per epoch, drawn from in a fixed order, so that skipping changes nothing after
        rng = np.random.Generator(np.random.PCG64([self.seed, self.epoch]))
        begins = np.concatenate(([0], np.cumsum(self.sizes)[:-1]))
        shards = rng.permutation(len(self.sizes))
        passed = 0  # records of all ranks before this window
        skip = self.rank + start * self.world  # place of this rank's next record among all ranks'
        for first in range(0, len(shards), self.window):
            chosen = shards[first : first + self.window]
            records = np.concatenate(
                [np.arange(begins[k], begins[k] + self.sizes[k]) for k in chosen]
            )
            rng.shuffle(records)
            if skip < passed + len(records):
                mine = records[skip - passed :: self.world]
                skip += len(mine) * self.world
                yield from mine.tolist()
            passed += len(records)
