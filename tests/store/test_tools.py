"""`kava store inspect` and `export`: for people, and for `datasets`."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from kava_core.errors import KavaError
from kava_core.store import Codec, TargetsStore, TeacherStore
from kava_core.store.counts import EvictionCounts
from kava_core.store.export import export
from kava_core.store.summary import (
    eviction_findings,
    length_histogram,
)
from kava_core.store.verify import verify
from stages.store import store_group
from tests.store.make import make_targets_store, make_teacher_store


def test_inspect_says_what_a_store_is(tmp_path: Path) -> None:
    codec = Codec.from_bits(keys=8, values=4, endpoint=8)
    data = make_targets_store(tmp_path / "store", codec=codec)
    result = CliRunner(env={"COLUMNS": "120"}).invoke(
        store_group, ["inspect", str(tmp_path / "store")], catch_exceptions=False
    )
    assert result.exit_code == 0
    for text in ("kv_targets", "7 in 2 shards", "tttttttt", "uint4", "drift of keys", "pre-RoPE"):
        assert text in result.stdout
    lengths = [len(record.cot_ids) for shard in data for record in shard.records]
    store = TargetsStore.open(tmp_path / "store")
    kept = [counts.flatten().tolist() for shard in data for counts in shard.slot_counts]
    counts = EvictionCounts.of(store)
    assert counts.places == sum(map(len, kept)) == 7 * 3 * 2
    assert counts.engaged == sum(k < n for row, n in zip(kept, lengths, strict=True) for k in row)
    assert counts.kept == sum(map(sum, kept))
    assert counts.tokens == 3 * 2 * sum(lengths)
    histogram = length_histogram(store)
    assert sum(count for _, _, count in histogram) == 7
    for first, last, count in histogram:
        assert count == sum(first <= n <= last for n in lengths)
    assert f"on {counts.engaged_percent:.1f} % of (record, layer, head)" in result.stdout
    for what, how_much in eviction_findings(store).identity:
        assert what in result.stdout and how_much in result.stdout


def test_inspect_of_a_teacher_store(tmp_path: Path) -> None:
    make_teacher_store(tmp_path / "store", sizes=(1,))  # a single trace length
    result = CliRunner().invoke(store_group, ["inspect", str(tmp_path / "store")])
    assert result.exit_code == 0
    assert "teacher_kv" in result.stdout
    assert "eviction engaged" not in result.stdout


@pytest.mark.parametrize("kind", ["teacher_kv", "kv_targets"])
def test_an_export_opens_in_datasets_and_as_a_store(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    make = make_teacher_store if kind == "teacher_kv" else make_targets_store
    data = make(tmp_path / "store")
    result = CliRunner().invoke(
        store_group, ["export", str(tmp_path / "store"), str(tmp_path / "hub")]
    )
    assert result.exit_code == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = datasets.load_dataset(
        str(tmp_path / "hub"), split="train", cache_dir=str(tmp_path / "c")
    )
    expected = [record for shard in data for record in shard.records]
    assert rows["id"] == [record.id for record in expected]
    assert rows["cot_ids"] == [record.cot_ids for record in expected]
    card = (tmp_path / "hub" / "README.md").read_text()
    assert card.startswith("---\n")
    assert f"| kind | {kind}" in card
    assert verify(tmp_path / "hub" / "store", full=True) == []
    reader = TeacherStore if kind == "teacher_kv" else TargetsStore
    assert len(reader.open(tmp_path / "hub" / "store")) == 7


def test_verify_says_what_it_checked(tmp_path: Path) -> None:
    make_targets_store(tmp_path / "store")
    for flags, checked in (([], "lengths, headers and index"), (["--full"], "every checksum")):
        result = CliRunner().invoke(store_group, ["verify", str(tmp_path / "store"), *flags])
        assert result.exit_code == 0
        assert f"is whole: {checked} of 4 files checked" in result.stdout


def test_export_refuses_a_damaged_store_and_a_folder_in_use(tmp_path: Path) -> None:
    make_targets_store(tmp_path / "store")
    with pytest.raises(KavaError, match="exists already"):
        export(tmp_path / "store", tmp_path)
    with pytest.raises(KavaError, match="lies in the store itself"):
        export(tmp_path / "store", tmp_path / "store" / "hub")
    (tmp_path / "file").touch()
    with pytest.raises(KavaError, match=r"file/hub cannot be written \(Not a directory\)"):
        export(tmp_path / "store", tmp_path / "file" / "hub")
    shard = tmp_path / "store" / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(KavaError, match=r"shard-00000\.safetensors does not match its checksum"):
        export(tmp_path / "store", tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
