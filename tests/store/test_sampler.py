"""The order of training is fixed by seed and epoch, and shared out without loss or repetition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader, Dataset

from kava_core.store import ShardShuffleSampler, TargetsStore
from tests.store.make import make_targets_store

SIZES = (5, 3, 7, 1, 4, 6)  # 26 records


def order(seed: int = 1, epoch: int = 0, window: int = 16) -> list[int]:
    sampler = ShardShuffleSampler(SIZES, seed=seed, window=window)
    assert len(sampler) == 26
    sampler.set_epoch(epoch)
    return list(sampler)


def test_an_epoch_has_every_record_once() -> None:
    for window in (1, 2, 4, 100):
        assert sorted(order(window=window)) == list(range(26))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    assert order() == order()
    assert order(seed=2) != order()
    assert order(epoch=1) != order()
    assert order(seed=1, epoch=2) != order(seed=2, epoch=1)


def test_a_window_reads_few_shards_at_a_time() -> None:
    shard_of = [k for k, size in enumerate(SIZES) for _ in range(size)]
    seen = [shard_of[i] for i in order(window=1)]
    assert len([k for k, before in zip(seen, [-1, *seen], strict=False) if k != before]) == 6


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(ValueError, match="window must be at least 1, found 0"):
        ShardShuffleSampler(SIZES, seed=1, window=0)


class Batches(Dataset[Any]):
    """A store as torch's loader sees it: whole batches through `__getitems__`."""

    def __init__(self, store: TargetsStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        return self.store.batch(indices).keys.codes


def as_it_is(batch: torch.Tensor) -> torch.Tensor:
    return batch


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_and_accelerate_keep_the_order(tmp_path: Path, workers: int) -> None:
    make_targets_store(tmp_path / "store", sizes=(4, 3, 5))
    store = TargetsStore.open(tmp_path / "store")
    sampler = ShardShuffleSampler(store.sizes, seed=3, window=2)
    loader: Any = DataLoader(
        Batches(store),
        batch_size=5,
        sampler=sampler,
        num_workers=workers,
        collate_fn=as_it_is,
        multiprocessing_context="forkserver" if workers else None,
    )
    loader = Accelerator(cpu=True).prepare(loader)
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        keys = torch.cat(list(loader))
        alone = ShardShuffleSampler(store.sizes, seed=3, window=2)
        alone.set_epoch(epoch)
        assert torch.equal(keys, store.batch(list(alone)).keys.codes)
        # as transformers.Trainer goes on in the middle of an epoch
        rest = skip_first_batches(loader, 1)
        rest.set_epoch(epoch)
        assert torch.equal(torch.cat(list(rest)), keys[5:])
