"""A store of a million records opens and is checked in seconds, and an epoch holds little of it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from kava_core.memory import STATUS
from kava_core.record import Record
from kava_core.store import Geometry, ShardShuffleSampler, TargetsStore, write_targets_shard
from kava_core.store.verify import verify
from tests.faults.conftest import Tell
from tests.store.make import finish, make_spec

GEOMETRY = Geometry.plain(layers=1, kv_heads=1, head_dim=2, hidden_size=2, slots=1)
SHARDS, SIZE = 100, 10_000


def make_large_store(folder: Path) -> None:
    """SHARDS shards of SIZE records with one slot each."""
    folder.mkdir()
    spec = make_spec(GEOMETRY)
    for shard in range(SHARDS):
        records = [
            Record(
                id=f"{shard}-{i}", question_ids=[1, 2], cot_ids=[3, 4], answer_prompt_ids=[5],
                answer_ids=[6], source="made up", topic="", n_steps=1,
            )
            for i in range(SIZE)
        ]  # fmt: skip
        write_targets_shard(
            folder, spec, shard, records,
            keys=torch.ones(SIZE, 1, 1, 1, 2), values=torch.ones(SIZE, 1, 1, 1, 2),
            slot_counts=torch.ones(SIZE, 1, 1, dtype=torch.long),
            slot_positions=torch.zeros(SIZE, 1, 1, 1, dtype=torch.long),
            endpoint=torch.ones(SIZE, 2, 2),
        )  # fmt: skip
    finish(folder, spec, SHARDS)


def anonymous_megabytes() -> float:
    """Of memory that is this process's own, mapped files left out."""
    (line,) = [x for x in STATUS.read_text().splitlines() if x.startswith("RssAnon:")]
    return int(line.split()[1]) / 1000


@pytest.mark.slow
def test_a_million_records(tmp_path: Path, tell: Tell) -> None:
    make_large_store(tmp_path / "store")
    began = time.process_time()
    store = TargetsStore.open(tmp_path / "store")
    assert len(store) == SHARDS * SIZE
    opened = time.process_time() - began
    began = time.process_time()
    assert verify(tmp_path / "store") == []
    verified = time.process_time() - began
    assert opened < 2 and verified < 10, (opened, verified)
    sampler = ShardShuffleSampler(store.sizes, seed=0)
    order = iter(sampler)
    store.batch([next(order) for _ in range(64)])
    before = anonymous_megabytes()
    for _ in range(2000):
        store.batch([next(order) for _ in range(64)])
    assert anonymous_megabytes() - before < 64
    tell("a million records", "opened, checked, a part of an epoch read",
         "under 2 s and 10 s of the processor; memory stays")  # fmt: skip
