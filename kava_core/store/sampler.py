"""The order in which a trainer reads a store: shards shuffled, then records in a window of them.

A window keeps reads near each other (few shards are in use at a time) without giving up the
randomness of an order over many shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class ShardShuffleSampler(Sampler[int]):
    """Record indices of a store in an order that depends on `seed` and the epoch, nothing else.

    sizes: records per shard (`TargetsStore.sizes`). window: how many shards are mixed at a time; at
    least the number of shards gives a full shuffle.

    ahead: called before the shards of a window are needed, with those and the ones that come next,
    even in the next epoch (`TargetsStore.fetch_ahead`).

    Every process makes the whole order: `transformers.Trainer`'s accelerate deals the batches out
    to ranks, calls `set_epoch`, and skips what an interrupted epoch has already seen.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        seed: int,
        window: int = 16,
        ahead: Callable[[Sequence[int], Sequence[int]], None] | None = None,
    ) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, found {window}")
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.seed = seed
        self.window = window
        self.ahead = ahead
        self.epoch = 0

    def __len__(self) -> int:
        """Records in an epoch."""
        return int(self.sizes.sum())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng, shards = self._shards(self.epoch)
        begins = np.concatenate(([0], np.cumsum(self.sizes)[:-1]))
        for first in range(0, len(shards), self.window):
            chosen = shards[first : first + self.window]
            if self.ahead is not None:
                after = shards[first + self.window : first + 2 * self.window]
                if not len(after):
                    after = self._shards(self.epoch + 1)[1][: self.window]
                self.ahead(chosen.tolist(), after.tolist())
            records = np.concatenate(
                [np.arange(begins[k], begins[k] + self.sizes[k]) for k in chosen]
            )
            rng.shuffle(records)
            yield from records.tolist()

    def _shards(self, epoch: int) -> tuple[np.random.Generator, np.ndarray]:
        """The shards in the order of an epoch, and the generator that goes on to mix records."""
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        return rng, rng.permutation(len(self.sizes))
