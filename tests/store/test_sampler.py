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


def order(seed: int = 1, epoch: int = 0, start: int = 0, **options: int) -> list[int]:
    sampler = ShardShuffleSampler(SIZES, seed=seed, **options)
    sampler.set_epoch(epoch, start)
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


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_are_disjoint_and_complete(world: int) -> None:
    parts = [order(window=2, rank=rank, world=world) for rank in range(world)]
    assert sorted(i for part in parts for i in part) == list(range(26))
    lengths = [len(ShardShuffleSampler(SIZES, seed=1, rank=r, world=world)) for r in range(world)]
    assert [len(part) for part in parts] == lengths
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("world", [1, 3])
def test_an_epoch_goes_on_from_its_middle(world: int) -> None:
    for rank in range(world):
        whole = order(window=2, rank=rank, world=world, epoch=3)
        for start in range(len(whole) + 1):
            rest = order(window=2, rank=rank, world=world, epoch=3, start=start)
            assert rest == whole[start:]


def test_skipping_happens_once() -> None:
    sampler = ShardShuffleSampler(SIZES, seed=1)
    sampler.set_epoch(0, start=20)
    assert len(list(sampler)) == 6
    assert len(list(sampler)) == 26


@pytest.mark.parametrize("options", [{"window": 0}, {"rank": 2, "world": 2}])
def test_impossible_settings_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        ShardShuffleSampler(SIZES, seed=1, **options)


class Batches(Dataset[Any]):
    """A store as torch's loader sees it: whole batches through `__getitems__`."""

    def __init__(self, store: TargetsStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        return self.store.batch(indices).keys.codes


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_and_accelerate_keep_the_order(tmp_path: Path, workers: int) -> None:
    make_targets_store(tmp_path / "store", sizes=(4, 3, 5))
    store = TargetsStore.open(tmp_path / "store")
    sampler = ShardShuffleSampler(store.sizes, seed=3, window=2)
    loader: Any = DataLoader(
        Batches(store), batch_size=5, sampler=sampler, num_workers=workers, collate_fn=lambda x: x
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
