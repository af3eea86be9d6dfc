"""How far slots have an identity, against slow references."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from kava_core.store import TargetsStore, identity, write_targets_shard
from kava_core.store.identity import identity_explained
from kava_core.store.summary import eviction_findings
from tests.store.make import (
    TARGETS,
    TARGETS_GEOMETRY,
    TargetsData,
    finish,
    make_targets_store,
    targets_data,
)

ROWS, HEADS, SLOTS = 3, TARGETS_GEOMETRY.kv_heads, TARGETS_GEOMETRY.slots


def write(folder: Path, shards: list[TargetsData]) -> TargetsStore:
    folder.mkdir()
    for number, shard in enumerate(shards):
        write_targets_shard(folder, TARGETS, number, **vars(shard))
    finish(folder, TARGETS, len(shards))
    return TargetsStore.open(folder)


def with_results(shard: TargetsData, every: int) -> TargetsData:
    """Each `every`-th record says that its even places state results."""
    records = [
        replace(r, results=list(range(0, len(r.cot_ids), 2))) if i % every == 0 else r
        for i, r in enumerate(shard.records)
    ]
    return replace(shard, records=records)


def places(shard: TargetsData, record: int, slot: int) -> list[int]:
    """The places that a record's slot holds in each row and head that fills it."""
    return [p for p in shard.slot_positions[record, :, :, slot].flatten().tolist() if p >= 0]


def slow_explained(shards: list[TargetsData], name: str, records: int) -> float:
    """In float64, one number after the other."""
    shares = []
    every = [(shard, i) for shard in shards for i in range(len(shard.records))][:records]
    for row in range(ROWS):
        for head in range(HEADS):
            for d in range(TARGETS_GEOMETRY.head_dim):
                groups = defaultdict(list)
                for shard, i in every:
                    for slot in range(SLOTS):
                        place = int(shard.slot_positions[i, row, head, slot])
                        if place >= 0:
                            number = float(getattr(shard, name)[i, row, head, slot, d])
                            groups[slot, place].append(number)
                numbers = [x for group in groups.values() for x in group]
                mean = math.fsum(numbers) / len(numbers)
                total = math.fsum((x - mean) ** 2 for x in numbers)
                within = math.fsum(
                    (x - math.fsum(group) / len(group)) ** 2
                    for group in groups.values()
                    for x in group
                )
                if total > 0:
                    shares.append(1 - within / total)
    return math.fsum(shares) / len(shares)


def test_agreement_and_results_are_those_of_a_slow_count(tmp_path: Path) -> None:
    shards = [with_results(targets_data(n, seed=k), every=2) for k, n in enumerate((9, 6))]
    agreeing = kept = judged = results = 0
    for shard in shards:
        for i, record in enumerate(shard.records):
            for slot in range(SLOTS):
                held = places(shard, i, slot)
                kept += len(held)
                agreeing += max(Counter(held).values(), default=0)
                if record.results:
                    judged += len(held)
                    results += sum(place in record.results for place in held)
    found = eviction_findings(write(tmp_path / "store", shards))
    assert 0 < agreeing < kept and 0 < results < judged < kept
    assert found.agreement_percent == pytest.approx(100 * agreeing / kept)
    assert found.result_percent == pytest.approx(100 * results / judged)


def test_where_no_record_says_which_tokens_are_results_nothing_is_said(tmp_path: Path) -> None:
    make_targets_store(tmp_path / "store")
    found = eviction_findings(TargetsStore.open(tmp_path / "store"))
    assert found.result_percent is None
    assert ("results", "not known") in found.identity


@pytest.mark.parametrize("records", [512, 7])
@pytest.mark.parametrize("sample_bytes", [2**28, 1])
def test_what_slot_and_position_explain_is_that_of_a_slow_sum(
    tmp_path: Path, records: int, sample_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [targets_data(n, seed=k) for k, n in enumerate((20, 5))]
    monkeypatch.setattr(identity, "RECORDS", records)
    monkeypatch.setattr(identity, "SAMPLE_BYTES", sample_bytes)  # all rows at once, or one by one
    found = identity_explained(write(tmp_path / "store", shards))
    for name in ("keys", "values"):
        expected = slow_explained(shards, name, records)
        assert 0 < expected < 1
        assert getattr(found, name) == pytest.approx(expected, abs=2e-6)


def test_targets_that_are_a_function_of_slot_and_position_are_explained_whole(
    tmp_path: Path,
) -> None:
    shard = targets_data(20)
    values = (100.0 * shard.slot_positions + 1)[..., None].expand_as(shard.values)
    found = identity_explained(write(tmp_path / "whole", [replace(shard, values=values)]))
    assert found.values == 1.0 and found.keys is not None and found.keys < 1
    constant = replace(shard, values=shard.values.new_ones(shard.values.shape))
    assert identity_explained(write(tmp_path / "flat", [constant])).values is None
