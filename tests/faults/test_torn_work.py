"""Torn pieces of unfinished work are made again, and a store is complete before it is published."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kava_core.errors import KavaError
from kava_core.store import finalise, finished_shards
from kava_core.store.verify import verify
from tests.faults.conftest import Tell
from tests.faults.stage import Stage
from tests.stages.project import digest
from tests.store.make import FINGERPRINTS, TARGETS
from tests.targets.test_build import SIZES, Job, build

MakeStage = Callable[[str], Stage]
SHARD, SIDE = "shard-00001.safetensors", "shard-00001.json"


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A working folder with all shards written but the last, by a run that broke there."""
    with pytest.raises(KavaError, match="shard 2 is broken"):
        build(Job(tmp_path / "work", broken=2))
    assert finished_shards(tmp_path / "work") == {0, 1}
    return tmp_path / "work"


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "inside").touch()


TORN: dict[str, Callable[[Path], object]] = {
    "half a shard": lambda work: half(work / SHARD),
    "an empty shard": lambda work: (work / SHARD).write_bytes(b""),
    "a folder for a shard": lambda work: folder_instead(work / SHARD),
    "half a side record": lambda work: half(work / SIDE),
    "an empty side record": lambda work: (work / SIDE).write_bytes(b""),
    "{} for a side record": lambda work: (work / SIDE).write_text("{}"),
    "a list for a side record": lambda work: (work / SIDE).write_text("[]"),
    "a folder for a side record": lambda work: folder_instead(work / SIDE),
}
MANIFEST: dict[str, Callable[[Path], object]] = {
    "an empty manifest": lambda file: file.write_bytes(b""),
    "{} for a manifest": lambda file: file.write_text("{}"),
    "a folder for a manifest": Path.mkdir,
}


@pytest.mark.parametrize("kind", TORN)
def test_a_torn_shard_is_made_again(
    unfinished: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str], tell: Tell
) -> None:
    whole = build(Job(tmp_path / "whole")).manifest
    TORN[kind](unfinished)
    job = Job(unfinished)
    assert build(job).manifest == whole and job.worked == [1, 2]
    assert verify(unfinished, full=True) == []
    said = " ".join(capsys.readouterr().err.split())
    assert f"{SHARD} is damaged, and is made again" in said
    tell("a torn piece of unfinished work", kind, "made again, and said; the rest is kept")


@pytest.mark.parametrize("kind", MANIFEST)
def test_a_torn_manifest_is_made_again(
    unfinished: Path, tmp_path: Path, kind: str, tell: Tell
) -> None:
    whole = build(Job(tmp_path / "whole")).manifest
    MANIFEST[kind](unfinished / "manifest.json")
    job = Job(unfinished)
    assert build(job).manifest == whole and job.worked == [2]
    tell("a torn piece of unfinished work", kind, "made again, and said; the rest is kept")


def test_a_store_that_lost_a_shard_since_is_made_whole(unfinished: Path) -> None:
    """Its manifest was written, and it was killed before it was published."""
    whole = build(Job(unfinished)).manifest
    folder_instead(unfinished / SHARD)
    assert build(Job(unfinished)).manifest == whole
    assert verify(unfinished, full=True) == []


def test_what_another_process_left_in_a_store_is_not_published(unfinished: Path) -> None:
    build(Job(unfinished))
    (unfinished / ".shard-00000.safetensors.7.tmp.x").touch()
    with pytest.raises(KavaError, match=r"7\.tmp\.x does not belong to the store that was made"):
        finalise(unfinished, TARGETS, shards=len(SIZES), settings={}, fingerprints=FINGERPRINTS)


@pytest.mark.parametrize("name", ["evict", "generate-targets"])
def test_targets_are_kept_until_all_that_is_said_of_them_is_written(
    make_stage: MakeStage, name: str
) -> None:
    """Something is in the place of eviction.json, as a disk may have no room for it."""
    stage = make_stage(name)
    targets, finding = stage.outputs
    before = digest(targets)
    (finding / "inside").mkdir(parents=True)
    assert stage.run()[0] == 1 and "Traceback" not in stage.said, stage.said
    assert "eviction.json cannot be used (Is a directory)" in " ".join(stage.said.split())
    assert digest(targets) == before
    (built,) = stage.work.glob("kv_targets-*/output")
    shards = len(list(built.glob("shard-*.safetensors")))
    shutil.rmtree(finding)
    assert stage.run()[0] == 0, stage.said
    assert f"kv_targets: {shards} of {shards} shards are finished already" in stage.said
    assert digest(targets) != before and finding.is_file()
    assert list(stage.work.iterdir()) == []


def test_a_file_in_the_place_of_a_working_folder_goes(make_stage: MakeStage, tell: Tell) -> None:
    stage = make_stage("evict")
    whole = make_stage("generate")  # only for its home: the same inputs
    shutil.copytree(whole.home / "data", whole.home / "kept")
    assert stage.run()[0] == 0
    expected = stage.digests()
    again = Stage(whole.home, "evict")
    process = again.start()
    assert process.pid is not None
    while not list(again.work.glob("kv_targets-*/output")) and process.is_alive():
        pass
    process.kill()
    process.join()
    for work in again.work.glob("kv_targets-*"):
        shutil.rmtree(work)
        work.write_text("no folder")
    assert again.run()[0] == 0, again.said
    assert again.digests() == expected
    tell("a torn piece of unfinished work", "a file for a folder", "made again")


@pytest.mark.parametrize("content", [b"", b"{}", b'{"answers": [', b"[" * 5000, None])
def test_a_torn_part_of_fidelity_is_made_again(
    make_stage: MakeStage, content: bytes | None, tell: Tell
) -> None:
    stage = make_stage("fidelity")
    process = stage.start()
    while len(parts := sorted(stage.work.glob("fidelity-*/batch-*.json"))) < 2:
        assert process.is_alive(), stage.said
    process.kill()
    process.join()
    first = parts[0]
    if content is None:
        folder_instead(first)
    else:
        first.write_bytes(content)
    assert stage.run()[0] == 0, stage.said
    said = " ".join(stage.said.split())
    assert f"{first.name} is damaged, and is made again" in said and "finished already" in said
    assert list(stage.work.iterdir()) == []
    tell("a torn piece of unfinished work", "a part of fidelity", "made again, and said")
