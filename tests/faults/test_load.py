"""Stores of a million records, of 100,000 files, and under 32 readers: seconds, and flat memory."""

from __future__ import annotations

import json
import os
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from kava_core.memory import STATUS
from kava_core.record import Record
from kava_core.store import Geometry, ShardShuffleSampler, TargetsStore, write_targets_shard
from kava_core.store.layout import shard_name
from kava_core.store.verify import verify
from kava_core.store.write import side_path
from tests.faults.conftest import Measured, Tell
from tests.faults.stage import CONTEXT
from tests.store.make import finish, make_spec, make_targets_store

GEOMETRY = Geometry.plain(layers=1, kv_heads=1, head_dim=2, hidden_size=2, slots=1)
SHARDS, SIZE = 100, 10_000
SMALL_SHARDS, SMALL_SIZE = 100_000, 2
LINKS = 50_000  # of one file: ext4 allows 65,000
READERS, READS, BATCH = 32, 50, 64


def write_shard(folder: Path, shard: int, size: int) -> None:
    """`size` records with one slot each."""
    records = [
        Record(
            id=f"{shard}-{i}", question_ids=[1, 2], cot_ids=[3, 4], answer_prompt_ids=[5],
            answer_ids=[6], source="made up", topic="", n_steps=1,
        )
        for i in range(size)
    ]  # fmt: skip
    write_targets_shard(
        folder, make_spec(GEOMETRY), shard, records,
        keys=torch.ones(size, 1, 1, 1, 2), values=torch.ones(size, 1, 1, 1, 2),
        slot_counts=torch.ones(size, 1, 1, dtype=torch.long),
        slot_positions=torch.zeros(size, 1, 1, 1, dtype=torch.long),
        endpoint=torch.ones(size, 2, 2),
    )  # fmt: skip


def make_large_store(folder: Path) -> None:
    """SHARDS shards of SIZE records."""
    folder.mkdir()
    for shard in range(SHARDS):
        write_shard(folder, shard, SIZE)
    finish(folder, make_spec(GEOMETRY), SHARDS)


def make_scattered_store(folder: Path) -> None:
    """SMALL_SHARDS shards of SMALL_SIZE records, all of one content but for their ids: the tensors
    of the first, with what a writer notes of each. Files of one content are one file by several
    names, but for every LINKS-th, which is a copy."""
    folder.mkdir()
    write_shard(folder, 0, SMALL_SIZE)
    linked = folder / shard_name(0)
    note = json.loads(side_path(folder, 0).read_text(encoding="utf-8"))
    for shard in range(1, SMALL_SHARDS):
        if shard % LINKS:
            os.link(linked, folder / shard_name(shard))
        else:
            linked = Path(shutil.copyfile(linked, folder / shard_name(shard)))
        own = {
            "id": [f"{shard}-{i}" for i in range(SMALL_SIZE)],
            "shard": [shard] * SMALL_SIZE,
        }
        of_this = {**note, "shard": shard, "columns": {**note["columns"], **own}}
        side_path(folder, shard).write_text(json.dumps(of_this), encoding="utf-8")
    finish(folder, make_spec(GEOMETRY), SMALL_SHARDS)


def anonymous_megabytes() -> float:
    """Of memory that is this process's own, mapped files left out."""
    (line,) = [x for x in STATUS.read_text().splitlines() if x.startswith("RssAnon:")]
    return int(line.split()[1]) / 1000


def open_and_verify(folder: Path) -> tuple[TargetsStore, float, float]:
    """The store, and seconds of the processor for opening it and for checking it."""
    began = time.process_time()
    store = TargetsStore.open(folder)
    opened = time.process_time() - began
    began = time.process_time()
    assert verify(folder) == []
    return store, opened, time.process_time() - began


def epoch(store: TargetsStore, size: int, batches: int) -> tuple[float, float]:
    """Read batches in a training's order; seconds, and by how many megabytes memory grew."""
    order = iter(ShardShuffleSampler(store.sizes, seed=0))
    store.batch([next(order) for _ in range(size)])
    before, began = anonymous_megabytes(), time.process_time()
    for _ in range(batches - 1):
        store.batch([next(order) for _ in range(size)])
    return time.process_time() - began, anonymous_megabytes() - before


@pytest.mark.slow
def test_a_million_records(tmp_path: Path, tell: Tell, measured: Measured) -> None:
    make_large_store(tmp_path / "store")
    store, opened, verified = open_and_verify(tmp_path / "store")
    assert len(store) == SHARDS * SIZE
    assert opened < 2 and verified < 10, (opened, verified)
    seconds, grown = epoch(store, 250, len(store) // 250)
    assert grown < 64, grown
    tell("a million records", "opened, checked, an epoch read", "in time; memory stays")
    measured("opening 1,000,000 records", f"{opened:.2f} s of the processor", "under 2 s")
    measured("their fast verification", f"{verified:.1f} s of the processor", "under 10 s")
    what = "an epoch of them in batches of 250: memory at its end beyond that of its first batch"
    measured(what, f"{grown:.0f} MB, after {seconds:.0f} s", "under 64 MB")


@pytest.mark.slow
def test_a_hundred_thousand_small_shards(tmp_path: Path, tell: Tell, measured: Measured) -> None:
    make_scattered_store(tmp_path / "store")
    store, opened, verified = open_and_verify(tmp_path / "store")
    assert len(store) == SMALL_SHARDS * SMALL_SIZE
    seconds, grown = epoch(store, BATCH, 200)
    assert len(list(Path("/proc/self/fd").iterdir())) < 900  # few of the files are open at once
    assert opened < 10 and verified < 60 and grown < 64, (opened, verified, grown)
    tell("100,000 shards of two records", "opened, checked, 200 batches read", "memory stays")
    measured("opening 100,000 shards", f"{opened:.1f} s of the processor", "under 10 s")
    measured("their fast verification ", f"{verified:.1f} s of the processor", "under 60 s")
    what = f"200 batches of {BATCH} from as many files as records: memory"
    measured(what, f"{grown:.0f} MB more, after {seconds:.0f} s", "under 64 MB")


def read_much(folder: Path, seed: int, there: Connection) -> None:
    """Batches of a store in the order of a training, and a sum of all that they hold."""
    began = time.monotonic()
    store = TargetsStore.open(folder)
    order = list(ShardShuffleSampler(store.sizes, seed=seed))
    total = 0.0
    for first in range(READS):
        batch = store.batch(order[first * BATCH : (first + 1) * BATCH])
        total += float(batch.keys.dequantise().double().sum())
    there.send((total, time.monotonic() - began))


@pytest.mark.slow
def test_many_readers_of_one_store(tmp_path: Path, tell: Tell, measured: Measured) -> None:
    make_targets_store(tmp_path / "store", (400,) * 10)
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(READERS)]
    readers = [
        CONTEXT.Process(target=read_much, args=(tmp_path / "store", i % 4, there))
        for i, (_, there) in enumerate(pipes)
    ]
    for reader in readers:
        reader.start()
    found = [here.recv() for here, _ in pipes if here.poll(300)]
    for reader in readers:
        reader.join()
    assert len(found) == READERS and all(reader.exitcode == 0 for reader in readers)
    sums = {i % 4: {total for j, (total, _) in enumerate(found) if j % 4 == i} for i in range(4)}
    assert all(len(each) == 1 for each in sums.values())  # each order reads the same numbers
    tell("32 readers of one store", "each opens it and reads 50 batches", "the same numbers")
    slowest = max(seconds for _, seconds in found)
    what = f"32 processes at once, {READS} batches of {BATCH} each: the slowest"
    measured(what, f"{slowest:.1f} s on {os.cpu_count()} cores", "it ends")
