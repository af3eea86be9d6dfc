"""Small stores for the tests, from seeded random caches."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kava_core.record import Record
from kava_core.rotary import Rotary
from kava_core.store import (
    Codec,
    Geometry,
    Manifest,
    Ranges,
    StoreSpec,
    finalise,
    write_targets_shard,
    write_teacher_shard,
)

GEOMETRY = Geometry.plain(layers=3, kv_heads=2, head_dim=6, hidden_size=10)
TARGETS_GEOMETRY = Geometry.plain(layers=3, kv_heads=2, head_dim=6, hidden_size=10, slots=4)
FLOAT32 = Codec(keys="float32", values="float32", endpoint="float32")
FINGERPRINTS = {"problems": "p" * 8, "teacher": "t" * 8, "tokenizer": "k" * 8}


@dataclass(frozen=True)
class TeacherData:
    """The arguments of `write_teacher_shard`."""

    records: list[Record]
    keys: Tensor
    values: Tensor
    importance: Tensor
    endpoint: Tensor


@dataclass(frozen=True)
class TargetsData:
    """The arguments of `write_targets_shard`."""

    records: list[Record]
    keys: Tensor
    values: Tensor
    slot_counts: Tensor
    slot_positions: Tensor
    endpoint: Tensor


def make_records(n: int, seed: int = 0, longest: int = 9) -> list[Record]:
    rng = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [rng.randrange(50_000) for _ in range(rng.randint(1, most))]

    return [
        Record(
            id=f"{seed}-{i}",
            question_ids=tokens(12),
            cot_ids=tokens(longest),
            answer_prompt_ids=[7, 8],
            answer_ids=tokens(3),
            source="made up",
            topic=rng.choice(["add", "multiply"]),
            n_steps=rng.randint(1, 4),
        )
        for i in range(n)
    ]


def teacher_data(n: int, geometry: Geometry = GEOMETRY, seed: int = 0) -> TeacherData:
    records = make_records(n, seed)
    generator = torch.Generator().manual_seed(seed)
    total = sum(len(record.cot_ids) for record in records)
    lead = (total, len(geometry.rows), geometry.kv_heads)
    return TeacherData(
        records,
        torch.randn(*lead, geometry.head_dim, generator=generator) * 2 + 0.5,
        torch.randn(*lead, geometry.head_dim, generator=generator),
        torch.rand(*lead, generator=generator),
        torch.randn(n, geometry.model_layers + 1, geometry.hidden_size, generator=generator),
    )


def targets_data(n: int, geometry: Geometry = TARGETS_GEOMETRY, seed: int = 0) -> TargetsData:
    """Targets with ragged slots; invalid slots hold NaN, which a writer must not mind."""
    records = make_records(n, seed)
    generator = torch.Generator().manual_seed(seed)
    lead = (n, len(geometry.rows), geometry.kv_heads, geometry.slots)
    counts = torch.zeros(lead[:-1], dtype=torch.int64)
    positions = torch.full(lead, -1)
    for i, record in enumerate(records):
        length = len(record.cot_ids)
        for row in range(lead[1]):
            for head in range(lead[2]):
                most = min(length, geometry.slots)
                count = int(torch.randint(1, most + 1, (), generator=generator))
                chosen = torch.randperm(length, generator=generator)[:count].sort().values
                counts[i, row, head] = count
                positions[i, row, head, :count] = chosen
    invalid = (positions < 0)[..., None]
    keys, values = (
        torch.randn(*lead, geometry.head_dim, generator=generator).masked_fill(invalid, torch.nan)
        for _ in range(2)
    )
    endpoint = torch.randn(n, geometry.model_layers + 1, geometry.hidden_size, generator=generator)
    return TargetsData(records, keys * 3, values + 1, counts, positions, endpoint)


def make_spec(
    geometry: Geometry, codec: Codec = FLOAT32, ranges: Ranges | None = None
) -> StoreSpec:
    """A spec with a plausible rotation."""
    frequencies = torch.full((geometry.model_layers, geometry.head_dim // 2), 0.1).double()
    rotary = Rotary(frequencies, torch.ones(geometry.model_layers).double())
    return StoreSpec(geometry, codec, "pre_rope", rotary, ranges)


TEACHER = make_spec(GEOMETRY)
TARGETS = make_spec(TARGETS_GEOMETRY)


def finish(folder: Path, spec: StoreSpec, shards: int) -> Manifest:
    """`finalise` with plausible settings."""
    settings = {"budget": spec.geometry.slots}
    return finalise(folder, spec, shards=shards, settings=settings, fingerprints=FINGERPRINTS)


def make_teacher_store(
    folder: Path,
    sizes: tuple[int, ...] = (4, 3),
    geometry: Geometry = GEOMETRY,
    codec: Codec = FLOAT32,
    ranges: Ranges | None = None,
    seed: int = 0,
) -> list[TeacherData]:
    """A teacher store with shards of these sizes; returns what went in."""
    folder.mkdir(parents=True)
    data = [teacher_data(n, geometry, 100 * seed + k) for k, n in enumerate(sizes)]
    spec = make_spec(geometry, codec, ranges)
    for k, shard in enumerate(data):
        write_teacher_shard(folder, spec, k, **vars(shard))
    finish(folder, spec, len(sizes))
    return data


def make_targets_store(
    folder: Path,
    sizes: tuple[int, ...] = (4, 3),
    geometry: Geometry = TARGETS_GEOMETRY,
    codec: Codec = FLOAT32,
    ranges: Ranges | None = None,
    seed: int = 0,
) -> list[TargetsData]:
    """A targets store with shards of these sizes; returns what went in."""
    folder.mkdir(parents=True)
    data = [targets_data(n, geometry, 100 * seed + k) for k, n in enumerate(sizes)]
    spec = make_spec(geometry, codec, ranges)
    for k, shard in enumerate(data):
        write_targets_shard(folder, spec, k, **vars(shard))
    finish(folder, spec, len(sizes))
    return data
