"""What goes into a store comes out of it, whoever wrote the shards and in whatever order."""

from __future__ import annotations

import pickle
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from kava_core.errors import KavaError
from kava_core.store import (
    Codec,
    Geometry,
    TargetsBatch,
    TargetsStore,
    TeacherStore,
    finished_shards,
    write_targets_shard,
    write_teacher_shard,
)
from kava_core.store.statistics import PIECE
from tests.store.make import (
    GEOMETRY,
    TARGETS,
    TEACHER,
    finish,
    make_spec,
    make_targets_store,
    make_teacher_store,
    targets_data,
    teacher_data,
)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_teacher_store_gives_back_what_went_in(tmp_path: Path) -> None:
    data = make_teacher_store(tmp_path / "store")
    store = TeacherStore.open(tmp_path / "store")
    assert (len(store), store.shards) == (7, 2)
    for k, expected in enumerate(data):
        shard = store.shard(k)
        assert shard.records == expected.records
        assert shard.offsets.diff().tolist() == [len(r.cot_ids) for r in expected.records]
        assert torch.equal(shard.keys.dequantise(), expected.keys)
        assert torch.equal(shard.values[2:5].dequantise(), expected.values[2:5])
        assert torch.equal(shard.importance, expected.importance)
        assert torch.equal(shard.endpoint.dequantise(), expected.endpoint)


def test_targets_store_gives_any_records_in_any_order(tmp_path: Path) -> None:
    data = make_targets_store(tmp_path / "store")
    store = TargetsStore.open(tmp_path / "store")
    order = [6, 0, 3, 3, 4]
    batch = store.batch(order).dequantise()
    for slot, i in enumerate(order):
        shard, row = data[0 if i < 4 else 1], i if i < 4 else i - 4
        assert store.index.record(i) == shard.records[row]
        assert store.index.tokens(i, "cot_ids").tolist() == shard.records[row].cot_ids
        assert torch.equal(batch.keys[slot], shard.keys[row].nan_to_num(0))
        assert torch.equal(batch.values[slot], shard.values[row].nan_to_num(0))
        assert torch.equal(batch.endpoint[slot], shard.endpoint[row])
        assert torch.equal(batch.slot_counts[slot], shard.slot_counts[row].int())
        assert torch.equal(batch.slot_positions[slot], shard.slot_positions[row].int())
        assert torch.equal(batch.slot_mask[slot].sum(-1), shard.slot_counts[row])


def test_a_buffer_is_used_again_and_may_be_larger_than_the_batch(tmp_path: Path) -> None:
    make_targets_store(tmp_path / "store")
    store = TargetsStore.open(tmp_path / "store")
    buffer = store.buffer(5)
    first = store.batch([0, 1, 2, 3, 4], out=buffer)
    place = first.keys.codes.data_ptr()
    second = store.batch([5, 6], out=buffer)
    assert second.keys.codes.data_ptr() == place
    assert torch.equal(second.keys.codes, store.batch([5, 6]).keys.codes)
    with pytest.raises(ValueError, match="buffer for 5"):
        store.batch(range(6), out=buffer)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_sixteen_bits_round_to_nearest(tmp_path: Path, half: str) -> None:
    data = make_targets_store(tmp_path / "store", codec=Codec.from_bits(half=half))
    keys = TargetsStore.open(tmp_path / "store").batch([0]).keys.dequantise()
    assert keys.dtype == getattr(torch, half)
    assert torch.equal(keys[0], data[0].keys[0].nan_to_num(0).to(keys.dtype))


def test_bytes_do_not_depend_on_who_wrote_the_shards(tmp_path: Path) -> None:
    make_targets_store(tmp_path / "one", sizes=(4, 3, 2))
    many = tmp_path / "many"
    many.mkdir()

    def write(shard: int) -> None:
        data = targets_data((4, 3, 2)[shard], seed=shard)
        write_targets_shard(many, TARGETS, shard, **vars(data))

    for shard in (2, 1, 2):  # any order; a repeated shard changes nothing
        write(shard)
    assert finished_shards(many) == {1, 2}
    thread = threading.Thread(target=write, args=(0,))
    thread.start()
    thread.join()
    (many / ".shard-00001.safetensors.77.tmp").write_bytes(b"left by a killed writer")
    finish(many, TARGETS, 3)
    assert contents(many) == contents(tmp_path / "one")
    assert finished_shards(many) == {0, 1, 2}
    finish(many, TARGETS, 3)  # repeating it is harmless
    assert contents(many) == contents(tmp_path / "one")


def test_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            folder = tmp_path / str(threads)
            make_teacher_store(folder, sizes=(40,), codec=Codec.from_bits(keys=8, values=4))
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_std_is_one_number_per_layer_over_valid_slots_of_the_whole_store(tmp_path: Path) -> None:
    data = make_targets_store(tmp_path / "store")
    statistics = TargetsStore.open(tmp_path / "store").manifest.statistics
    for layer in range(3):
        for name in ("keys", "values"):
            kept = torch.cat([getattr(shard, name)[:, layer].flatten() for shard in data])
            expected = kept[~kept.isnan()].double().std(correction=0).item()
            assert getattr(statistics, f"{name}_std")[layer] == pytest.approx(expected, rel=1e-9)
    endpoint = torch.cat([shard.endpoint for shard in data]).double().std((0, 2), correction=0)
    assert np.allclose(statistics.endpoint_std, endpoint, rtol=1e-9)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_std_of_halves_over_many_pieces_is_that_of_float64(tmp_path: Path, half: str) -> None:
    geometry = Geometry.plain(layers=4, kv_heads=4, head_dim=64, hidden_size=512, slots=8)
    codec = Codec.from_bits(half=half)
    make_targets_store(tmp_path / "store", sizes=(40, 3), geometry=geometry, codec=codec)
    store = TargetsStore.open(tmp_path / "store")
    assert store.batch([0]).keys.codes.numel() * 40 > 2 * PIECE
    batch = store.batch(range(43)).dequantise(dtype=torch.float64)
    for layer in range(4):
        for name in ("keys", "values"):
            kept = getattr(batch, name)[:, layer][batch.slot_mask[:, layer]]
            found = getattr(store.manifest.statistics, f"{name}_std")[layer]
            assert found == pytest.approx(kept.std(correction=0).item(), rel=1e-12)
    endpoint = batch.endpoint.std((0, 2), correction=0)
    assert np.allclose(store.manifest.statistics.endpoint_std, endpoint, rtol=1e-12)


def test_std_of_a_teacher_store(tmp_path: Path) -> None:
    data = make_teacher_store(tmp_path / "store")
    statistics = TeacherStore.open(tmp_path / "store").manifest.statistics
    keys = torch.cat([shard.keys for shard in data]).double().std((0, 2, 3), correction=0)
    assert np.allclose(statistics.keys_std, keys, rtol=1e-9)


def test_a_store_travels_to_another_process_by_its_path(tmp_path: Path) -> None:
    make_targets_store(tmp_path / "store")
    store = TargetsStore.open(tmp_path / "store")
    store.batch([1])
    copy = pickle.loads(pickle.dumps(store))
    assert torch.equal(copy.batch([5]).keys.codes, store.batch([5]).keys.codes)


def test_finalise_names_what_is_missing(tmp_path: Path) -> None:
    data = teacher_data(2)
    write_teacher_shard(tmp_path, TEACHER, 1, **vars(data))
    with pytest.raises(KavaError, match=r"lacks 1 of 2 shards, first shard-00000"):
        finish(tmp_path, TEACHER, 2)
    write_teacher_shard(tmp_path, TEACHER, 0, **vars(data))
    with pytest.raises(KavaError, match=r"two records have the id '0-0'"):
        finish(tmp_path, TEACHER, 2)
    others = (
        make_spec(GEOMETRY, Codec()),
        make_spec(Geometry.plain(layers=3, kv_heads=2, head_dim=6, hidden_size=11)),
        replace(TEACHER, phase="post_rope"),
        replace(TEACHER, rotary=None),
    )
    for spec in others:
        with pytest.raises(KavaError, match=r"shard-00000.* another geometry or codec"):
            finish(tmp_path, spec, 2)
    with pytest.raises(KavaError, match="needs records, found none"):
        finish(tmp_path, TEACHER, 0)


def tensors_of(batch: TargetsBatch) -> list[torch.Tensor]:
    encoded = (batch.keys, batch.values, batch.endpoint)
    parts = [x for item in encoded for x in (item.codes, item.scale, item.zero)]
    return [x for x in (*parts, batch.slot_counts, batch.slot_positions) if x is not None]


@pytest.mark.parametrize(("bits", "tensors"), [(16, 5), (8, 9)])
def test_torchs_loader_pins_every_tensor_of_a_batch(
    tmp_path: Path, bits: int, tensors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[int] = []

    def pin(x: torch.Tensor) -> torch.Tensor:  # which only a machine with a device can do
        copy = x.clone()
        pinned.append(copy.data_ptr())
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    make_targets_store(tmp_path / "store", codec=Codec.from_bits(keys=bits, values=bits))
    batch = TargetsStore.open(tmp_path / "store").batch([4, 2])
    loaded = pin_memory({"ids": ["a", "b"], "targets": batch})["targets"]
    assert isinstance(loaded, TargetsBatch)
    assert loaded.indices == [4, 2]
    assert len(pinned) == tensors
    assert [x.data_ptr() for x in tensors_of(loaded)] == pinned
    for there, here in zip(tensors_of(loaded), tensors_of(batch), strict=True):
        assert torch.equal(there, here)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_batches_reach_a_cuda_device_through_pinned_memory(tmp_path: Path, bits: int) -> None:
    make_targets_store(tmp_path / "store", codec=Codec.from_bits(keys=bits, values=bits))
    store = TargetsStore.open(tmp_path / "store")
    here = store.batch([4, 2]).dequantise()
    pinned = store.batch([4, 2]).pin_memory()
    assert all(x.is_pinned() for x in tensors_of(pinned))
    there = pinned.dequantise("cuda")
    assert there.keys.is_cuda
    assert torch.allclose(there.keys.cpu(), here.keys)
    assert torch.allclose(there.values.cpu(), here.values)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    data = teacher_data(1)
    with pytest.raises(KavaError, match=r"shard-00000\.safetensors.* cannot be written"):
        write_teacher_shard(tmp_path / "no", TEACHER, 0, **vars(data))
