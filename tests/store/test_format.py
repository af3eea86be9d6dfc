"""A stranger's reader, written from docs/store-format.md: nothing of ours but the folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from kava_core.store import Codec, Geometry, TargetsStore, TeacherStore, calibrate
from tests.store.make import (
    TARGETS_GEOMETRY,
    make_targets_store,
    make_teacher_store,
    teacher_data,
)


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Manifest, index rows, and per shard its decoded tensors."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    body = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert blake3(text.encode()).hexdigest() == manifest["digest"]
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert len(content) == entry["bytes"]
        assert blake3(content).hexdigest() == entry["blake3"]
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *manifest["files"]}
    with pa.OSFile(str(folder / "index.arrow")) as file:
        reader = pa.ipc.open_file(file)
        index = [reader.get_batch(k).to_pylist() for k in range(reader.num_record_batches)]
    calibration = folder / "calibration.safetensors"
    shared = load_file(calibration) if calibration.exists() else {}
    shards = []
    for k, records in enumerate(manifest["shards"]):
        tensors = load_file(folder / f"shard-{k:05d}.safetensors")
        assert [row["row"] for row in index[k]] == list(range(records))
        assert {row["shard"] for row in index[k]} == {k}
        numbers = {
            name: decode(name, tensors, shared, manifest) for name in ("keys", "values", "endpoint")
        }
        rest = {
            name: x.numpy() for name, x in tensors.items() if not name.startswith(tuple(numbers))
        }
        shards.append({**numbers, **rest})
    return manifest, [row for batch in index for row in batch], shards


def decode(
    name: str, tensors: dict[str, Any], shared: dict[str, Any], manifest: dict[str, Any]
) -> np.ndarray:
    encoding = manifest["codec"][name]
    codes = tensors[name]
    if encoding not in ("uint8", "uint4"):
        return codes.float().numpy()
    codes = codes.numpy()
    if encoding == "uint4":
        length = manifest["geometry"]["head_dim"]
        both = np.stack([codes & 15, codes >> 4], axis=-1)
        codes = both.reshape(*codes.shape[:-1], -1)[..., :length]
    source = tensors if f"{name}_scale" in tensors else shared
    scale = source[f"{name}_scale"].float().numpy()
    zero = source[f"{name}_zero"].numpy().astype(np.int32)
    if source is tensors:
        scale, zero = scale[..., None], zero[..., None]
    elif scale.ndim == 1:
        scale, zero = (x.reshape(-1, *[1] * (codes.ndim - 2)) for x in (scale, zero))
    elif codes.ndim == 5:
        scale, zero = scale[:, :, None], zero[:, :, None]
    return (codes.astype(np.int32) - zero).astype(np.float32) * scale


CODECS = [
    Codec(),
    Codec.from_bits(keys=8, values=4, endpoint=8),
    Codec.from_bits(keys=4, values=8, granularity="channel"),
    Codec.from_bits(keys=8, values=32, granularity="tensor"),
]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("kind", ["teacher_kv", "kv_targets"])
def test_a_reader_written_from_the_page_agrees_with_ours(
    tmp_path: Path, kind: str, codec: Codec
) -> None:
    sample = teacher_data(9, seed=3)
    ranges = calibrate([(sample.keys, sample.values)], codec.granularity, 99.9)
    make = make_teacher_store if kind == "teacher_kv" else make_targets_store
    data = make(tmp_path / "store", codec=codec, ranges=ranges)
    manifest, index, shards = read(tmp_path / "store")
    assert manifest["kind"] == kind
    assert manifest["records"] == len(index) == 7
    records = [record for shard in data for record in shard.records]
    for row, record in zip(index, records, strict=True):
        expected = asdict(record)
        assert expected.pop("answer") == ""  # a store keeps its ids only
        for name, value in expected.items():
            assert row[name] == value
        assert row["n_cot"] == len(record.cot_ids)
        assert row["cot_start"] == row["n_question"] == len(record.question_ids)
        assert row["n_answer"] == len(record.answer_ids)
    if kind == "teacher_kv":
        teacher = TeacherStore.open(tmp_path / "store")
        for k, shard in enumerate(shards):
            ours = teacher.shard(k)
            for name in ("keys", "values", "endpoint"):
                assert np.array_equal(
                    shard[name], getattr(ours, name).dequantise(dtype=torch.float32)
                )
            assert np.array_equal(shard["importance"], data[k].importance)
            assert np.array_equal(np.diff(shard["offsets"]), [len(r.cot_ids) for r in ours.records])
    else:
        batch = TargetsStore.open(tmp_path / "store").batch(range(7)).dequantise()
        for name in ("keys", "values", "endpoint", "slot_counts", "slot_positions"):
            assert np.array_equal(
                np.concatenate([shard[name] for shard in shards]), getattr(batch, name)
            )


@pytest.mark.parametrize(
    ("share", "rows"),
    [
        ("none", [[0], [3], [4], [5]]),
        ("selection", [[0], [3], [4], [5]]),
        ("merged", [[0], [3, 4, 5]]),
    ],
)
def test_layers_and_sharing(tmp_path: Path, share: str, rows: list[list[int]]) -> None:
    groups = ((0,), (3,), (4,), (5,)) if share == "none" else ((0,), (3, 4, 5))
    geometry = Geometry.model_validate(
        {
            **TARGETS_GEOMETRY.model_dump(),
            "model_layers": 6,
            "layers": (0, 3, 4, 5),
            "groups": groups,
            "share": share,
        }
    )
    make_targets_store(tmp_path / "store", geometry=geometry)
    store = TargetsStore.open(tmp_path / "store")
    assert [list(row) for row in store.geometry.rows] == rows
    assert store.layer_map == {layer: i for i, row in enumerate(rows) for layer in row}
    batch = store.batch([0, 5]).dequantise()
    assert batch.keys.shape == (2, len(rows), 2, 4, 6)
    assert batch.slot_mask.shape == (2, len(rows), 2, 4)
    assert batch.endpoint.shape == (2, 7, 10)
    manifest, _, shards = read(tmp_path / "store")
    assert manifest["geometry"]["layers"] == [0, 3, 4, 5]
    assert manifest["geometry"]["groups"] == [list(group) for group in groups]
    assert shards[0]["keys"].shape[1] == len(rows)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": (1, 0)},
        {"layers": (0, 3)},
        {"layers": ()},
        {"groups": ((0, 1), (2,))},
        {"share": "merged", "groups": ((0, 2), (1,))},
        {"share": "merged", "groups": ((0, 1), (), (2,))},
        {"slots": -1},
        {"kv_heads": 0},
    ],
)
def test_impossible_geometries_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"layers|groups|group|slots|kv_heads"):
        Geometry.model_validate({**TARGETS_GEOMETRY.model_dump(), **change})
