"""Cosine similarity by layer and slot, against loops over records, heads and dimensions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kava_core.latents.similarity import slot_similarity
from kava_core.models.latent import LatentReasoner
from kava_core.store import Codec, Geometry, TargetsStore
from tests.distill.toy import FLOAT32, PLAIN, toy_student, toy_traces, write_store

MERGED = Geometry(**{**PLAIN.model_dump(), "groups": ((0, 1), (2,)), "share": "merged"})
SUBSET = Geometry(**{**PLAIN.model_dump(), "layers": (0, 2), "groups": ((0,), (2,))})


def cosine(a: Tensor, b: Tensor) -> float:
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    norms = math.sqrt(sum(x * x for x, _ in pairs)) * math.sqrt(sum(y * y for _, y in pairs))
    return sum(x * y for x, y in pairs) / norms


def naive(student: LatentReasoner, store: TargetsStore, records: int) -> dict[str, Any]:
    """Record by record, slot by slot."""
    found: dict[str, dict[tuple[int, int], list[float]]] = {"keys": {}, "values": {}}
    phase = store.manifest.rotary.phase
    for index in range(records):
        record = store.index.record(index)
        question, answer = (torch.tensor([list(ids)]).long()
                            for ids in (record.question_ids, record.answer_ids))  # fmt: skip
        with torch.no_grad():
            reasoning = student(
                question, torch.ones_like(question), answer, torch.ones_like(answer)
            )
            ours = {"keys": student.slot_keys(reasoning, phase)[0],
                    "values": torch.stack(reasoning.values, 1)[0]}  # fmt: skip
        targets = store.batch([index]).dequantise()
        theirs = {"keys": targets.keys[0], "values": targets.values[0]}
        for name, cells in found.items():
            for place, (layer, row) in enumerate(sorted(store.layer_map.items())):
                for head in range(store.geometry.kv_heads):
                    for slot in range(int(targets.slot_counts[0, row, head])):
                        cells.setdefault((place, slot), []).append(
                            cosine(ours[name][layer, head, slot], theirs[name][row, head, slot])
                        )
    return {
        name: [
            [
                sum(values) / len(values) if (values := cells.get((place, slot))) else None
                for slot in range(store.geometry.slots)
            ]
            for place in range(len(store.layer_map))
        ]
        for name, cells in found.items()
    }


def assert_close(actual: list[list[float | None]], expected: list[list[float | None]]) -> None:
    assert len(actual) == len(expected)
    for row, wanted in zip(actual, expected, strict=True):
        assert row == [None if x is None else pytest.approx(x, abs=1e-5) for x in wanted]


@pytest.mark.parametrize("phase", ["pre_rope", "post_rope"])
@pytest.mark.parametrize("geometry", [PLAIN, MERGED, SUBSET], ids=["plain", "merged", "subset"])
def test_similarity_is_the_mean_over_records_and_heads(
    tmp_path: Path, geometry: Geometry, phase: str
) -> None:
    store = write_store(tmp_path / "store", toy_traces(7), geometry=geometry, phase=phase)
    student = toy_student().eval()
    told: list[int] = []
    found = slot_similarity(student, store, records=7, batch_size=3, advance=told.append)
    expected = naive(student, store, 7)
    assert told == [3, 3, 1]
    assert found.records == 7 and found.layers == list(geometry.layers)
    for name in ("keys", "values"):
        assert_close(getattr(found, name), expected[name])


@pytest.mark.parametrize("codec", [FLOAT32, Codec.from_bits(keys=8, values=4, endpoint=8)],
                         ids=["float32", "codes"])  # fmt: skip
def test_only_the_first_records_count_and_no_batch_shows(tmp_path: Path, codec: Codec) -> None:
    store = write_store(tmp_path / "store", toy_traces(7), codec=codec)
    student = toy_student().eval()
    expected = naive(student, store, 5)
    for batch_size in (1, 2, 50):
        found = slot_similarity(student, store, records=5, batch_size=batch_size)
        assert found.records == 5
        for name in ("keys", "values"):
            assert_close(getattr(found, name), expected[name])
    assert slot_similarity(student, store, records=99, batch_size=4).records == 7


def test_a_slot_that_no_record_fills_has_no_similarity(tmp_path: Path) -> None:
    traces = [replace(t, cot_ids=t.cot_ids[:2]) for t in toy_traces(5)]
    store = write_store(tmp_path / "store", traces)
    found = slot_similarity(toy_student().eval(), store, records=5, batch_size=2)
    for name in ("keys", "values"):
        for row in getattr(found, name):
            assert row[2:] == [None, None] and all(isinstance(x, float) for x in row[:2])


def test_a_cache_is_entirely_similar_to_itself(tmp_path: Path) -> None:
    """One record, whose own cache is written into the store as its target."""
    from kava_core.distill.batches import TargetsDataset
    from kava_core.models.phase import rotary_of
    from kava_core.store import StoreSpec, finalise, write_targets_shard

    student, traces = toy_student().eval(), [replace(toy_traces(1)[0], cot_ids=[9] * 6)]
    batch = TargetsDataset(write_store(tmp_path / "any", traces), chains=False).__getitems__([0])
    with torch.no_grad():
        reasoning = student(
            *(batch[k] for k in ("question_ids", "question_mask", "answer_ids", "answer_mask"))
        )
    folder = tmp_path / "own"
    folder.mkdir()
    spec = StoreSpec(PLAIN, FLOAT32, "pre_rope", rotary_of(student.decoder))
    write_targets_shard(
        folder,
        spec,
        0,
        traces,
        keys=student.slot_keys(reasoning, "pre_rope").detach(),
        values=torch.stack(reasoning.values, 1).detach(),
        slot_counts=torch.full((1, 3, 2), 4),
        slot_positions=torch.arange(4).expand(1, 3, 2, 4).contiguous(),
        endpoint=reasoning.endpoint.detach(),
    )
    finalise(
        folder,
        spec,
        shards=1,
        settings={},
        fingerprints={"problems": "p", "teacher": "t", "tokenizer": "k", "teacher_kv": "c"},
    )
    found = slot_similarity(student, TargetsStore.open(folder), records=1, batch_size=1)
    for name in ("keys", "values"):
        assert_close(getattr(found, name), [[1.0] * 4] * 3)
