"""A disk that is full at any write: a sentence, nothing half, and with more room the same bytes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Tell
from tests.faults.stage import STAGES, Stage
from tests.stages.project import Project, digest

MakeStage = Callable[[str], Stage]
ROOM = 1 << 30


class Disk:
    """A small file system in memory, on which a stage's home lies."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def leave(self, free: int) -> None:
        """Make it so small that `free` bytes are left."""
        found = os.statvfs(self.path)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        self.resize(used + free)

    def resize(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", self.path], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "kava-test", folder]
    if shutil.which("mount") is None or subprocess.call(command, stderr=subprocess.DEVNULL):
        pytest.skip("no file system can be mounted here")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def written(stage: Stage) -> int:
    """Bytes that the stage's artefacts take."""
    return sum(
        -(-file.stat().st_size // 4096) * 4096
        for output in stage.outputs
        for file in output.rglob("*")
        if file.is_file()
    )


def check_full(
    whole: Stage, home: Stage, disk: Disk, shares: list[float], tell: Tell
) -> None:  # fmt: skip
    """Run `home` with room for a share of what `whole` wrote, then with room for all of it."""
    before, expected = home.digests(), whole.digests()
    for share in shares:
        disk.leave(int(share * written(whole)))
        code, _ = home.run()
        if code == 0:  # it needed less
            break
        assert code == 1 and "Traceback" not in home.said, home.said
        said = " ".join(home.said.split())
        # torch's writer of checkpoints does not say why it could not write.
        assert re.search("No space left on device|torch could not write all of it", said), said
        assert "finished work is kept" in said, said
        for old, new, found in zip(before, expected, home.digests(), strict=True):
            assert found in ({}, old, new), f"half an artefact of {home.name}"
        tell(f"{home.name} on a full disk", "room for a part of what it writes",
             "a sentence; with more room the same bytes")  # fmt: skip
    disk.resize(ROOM)
    assert home.run()[0] == 0, home.said
    assert home.digests() == expected
    assert list(home.work.iterdir()) == []


def prepared(make_stage: MakeStage, name: str, disk: Disk) -> tuple[Stage, Stage]:
    """A stage that has run, and the same on the small disk before it has."""
    whole = make_stage(name)
    shutil.copytree(whole.home, disk.path / "home")
    code, _ = whole.run()
    assert code == 0, whole.said
    home = Stage(disk.path / "home", name)
    home.log.unlink(missing_ok=True)
    home.log.symlink_to(disk.path.parent / f"{name}.log")  # what is said must find room
    return whole, home


@pytest.mark.parametrize("name", ["generate", "distill", "evaluate"])
def test_a_full_disk_loses_nothing(
    make_stage: MakeStage, name: str, disk: Disk, tell: Tell
) -> None:
    whole, home = prepared(make_stage, name, disk)
    check_full(whole, home, disk, [0.5], tell)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_disk_full_at_any_write_loses_nothing(
    make_stage: MakeStage, name: str, disk: Disk, tell: Tell
) -> None:
    whole, home = prepared(make_stage, name, disk)
    check_full(whole, home, disk, [0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9, 0.97], tell)


@pytest.mark.slow
def test_a_cache_of_dvc_without_room_loses_nothing(tmp_path: Path, disk: Disk, tell: Tell) -> None:
    """On a disk of its own. The outputs stand, and `dvc commit` takes them in once there is room;
    DVC itself says why it could not, and yet that all went well."""
    project = Project.clone(tmp_path / "project")
    project.run("dvc", "config", "cache.dir", str(disk.path / "cache"))
    target = "pipelines/smoke/dvc.yaml:prepare"
    (disk.path / "cache").mkdir()
    disk.leave(16_384)
    said = project.run("dvc", "repro", target)
    assert "No space left on device" in said, said
    outputs = [project.path / "data" / "smoke" / name for name in ("problems", "test_sets")]
    made = [digest(output) for output in outputs]
    assert all(made)
    disk.resize(ROOM)
    project.run("dvc", "commit", "-f", target)
    assert [digest(output) for output in outputs] == made
    for output in outputs:
        shutil.rmtree(output)
    project.run("dvc", "checkout", target)
    assert [digest(output) for output in outputs] == made
    tell("DVC's cache on a full disk", "room for a part of prepare's outputs",
         "DVC says why; with more room `dvc commit` caches the same bytes")  # fmt: skip
