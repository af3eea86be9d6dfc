"""What a file system refuses: a sentence with the path, nothing half, and once it is allowed the
same command ends with the same bytes."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import starve
from tests.faults.conftest import Tell, Whole
from tests.faults.stage import STAGES, Stage
from tests.golden.inputs import NAME
from tests.stages.project import ROOT

Before = Callable[[], object]
MakeWhole = Callable[[str], Whole]
AFTERWARDS = "a sentence; once it is allowed the same bytes"


def check_refused(whole: Whole, stage: Stage, before: Before | None, words: str) -> bool:
    """Run the stage where it is refused something; False if it did not need that."""
    there = stage.digests()
    code, _ = stage.run(before)
    if code == 0:
        assert stage.digests() == whole.expected
        return False
    said = " ".join(stage.said.split())
    assert code == 1 and "Traceback" not in said, said
    assert said.count("error: ") == 1 and words in said, said
    for old, new, found in zip(there, whole.expected, stage.digests(), strict=True):
        assert found in ({}, old, new), f"half an artefact of {stage.name}"
    return True


def check_allowed(whole: Whole, stage: Stage) -> None:
    assert stage.run()[0] == 0, stage.said
    assert stage.digests() == whole.expected
    assert list(stage.work.iterdir()) == []


REFUSALS = [
    ("fsync", errno.EDQUOT, "a quota, met when a file is synced"),
    ("fsync", errno.EIO, "a disk that fails, once"),
    ("replace", errno.EBUSY, "a rename that fails, once"),
    ("replace", errno.ESTALE, "a stale handle of a network's disk, once"),
]


def check_moments(
    whole: Whole, name: str, place: Path, refusal: tuple[str, int, str], moments: list[int],
    tell: Tell,
) -> None:  # fmt: skip
    call, error, how = refusal
    for at in moments:
        stage = whole.again(place / f"{call}-{at}", name)
        before = functools.partial(starve.refusing, call, error, at)
        refused = check_refused(whole, stage, before, os.strerror(error))
        check_allowed(whole, stage)
        shutil.rmtree(stage.home)
        if not refused:  # it makes fewer such calls
            break
        tell(f"{name} refused a write", how, AFTERWARDS)


@pytest.mark.parametrize("refusal", [REFUSALS[0], REFUSALS[2]], ids=lambda x: x[0])
def test_a_refusal_that_passes_costs_nothing_but_time(
    whole: MakeWhole, refusal: tuple[str, int, str], tmp_path: Path, tell: Tell
) -> None:
    check_moments(whole("generate"), "generate", tmp_path, refusal, [0, 3, 9], tell)


@pytest.mark.slow
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda x: f"{x[0]}-{errno.errorcode[x[1]]}")
@pytest.mark.parametrize("name", STAGES)
def test_a_refusal_at_any_call_costs_nothing_but_time(
    whole: MakeWhole, name: str, refusal: tuple[str, int, str], tmp_path: Path, tell: Tell
) -> None:
    moments = [1, 6, 20]
    check_moments(whole(name), name, tmp_path, refusal, moments, tell)


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that every user may enter; needs root, to become another one."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    folder = Path(f"/dev/shm/kava-open-{os.getpid()}")
    folder.mkdir(mode=0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["evict", "distill"])
def test_a_folder_that_may_not_be_written_to(
    whole: MakeWhole, name: str, open_to_all: Path, tell: Tell
) -> None:
    stage = whole(name).again(open_to_all / name, name)
    stage.home.chmod(0o755)
    stage.log.touch()
    stage.log.chmod(0o666)
    assert check_refused(whole(name), stage, starve.as_nobody, "Permission denied")
    check_allowed(whole(name), stage)
    tell(f"{name} refused a write", "a data folder of another user", AFTERWARDS)


@pytest.mark.parametrize("name", ["generate", "evaluate"])
def test_files_of_a_limited_size(whole: MakeWhole, name: str, tmp_path: Path, tell: Tell) -> None:
    stage = whole(name).again(tmp_path / "home", name)
    assert check_refused(whole(name), stage, starve.small_files, "File too large")
    check_allowed(whole(name), stage)
    tell(f"{name} refused a write", "a limit on the size of files", AFTERWARDS)


def test_a_shard_says_what_it_takes(whole: MakeWhole, tmp_path: Path) -> None:
    stage = whole("generate").again(tmp_path / "home", "generate")
    assert check_refused(whole("generate"), stage, starve.small_files, "shard-00000.safetensors")
    check_allowed(whole("generate"), stage)
    size = (stage.outputs[0] / "shard-00000.safetensors").stat().st_size
    assert f"it takes {size:,} bytes" in " ".join(stage.said.split())


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "mounted"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "kava-test", folder]
    if shutil.which("mount") is None or subprocess.call(command, stderr=subprocess.DEVNULL):
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("name", ["prepare", "teacher"])
def test_a_disk_that_is_read_only(
    whole: MakeWhole, name: str, mounted: Path, tmp_path: Path, tell: Tell
) -> None:
    stage = whole(name).again(mounted / "home", name)
    stage.log.symlink_to(tmp_path / "log")
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    assert check_refused(whole(name), stage, None, "Read-only file system")
    subprocess.run(["mount", "-o", "remount,rw", mounted], check=True)
    check_allowed(whole(name), stage)
    tell(f"{name} refused a write", "a disk that is read-only", AFTERWARDS)


@pytest.mark.parametrize("kind", ["a file for the folder", "a folder for the file"])
def test_a_run_log_that_cannot_be_written_fails_no_stage(
    whole: MakeWhole, kind: str, tmp_path: Path, tell: Tell
) -> None:
    """What the stage made is published by then, and DVC would remove it after a failure."""
    stage = whole("prepare").again(tmp_path / "home", "prepare")
    runs = stage.home / "data" / ".runs"
    if kind == "a file for the folder":
        runs.touch()
    else:
        (runs / f"{NAME}.jsonl").mkdir(parents=True)
    assert stage.run()[0] == 0, stage.said
    assert stage.digests() == whole("prepare").expected
    said = " ".join(stage.said.split())
    assert f".runs/{NAME}.jsonl cannot be written" in said and "prepare: done in" in said
    tell("a run log that cannot be written", kind, "a warning; the stage has not failed")


def test_a_name_that_is_too_long(whole: MakeWhole, tmp_path: Path, tell: Tell) -> None:
    home = whole("prepare").again(tmp_path / "home", "prepare").home
    for data in ("n" * 300, "/".join(["deep" * 20] * 60)):
        done = subprocess.run(
            [sys.executable, "-m", "stages", "prepare", "--data", data],
            cwd=home, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        said = " ".join(done.stdout.split())
        assert done.returncode == 1 and "Traceback" not in said, said
        assert said.count("error: ") == 1 and "name too long" in said, said
    tell("prepare refused a write", "a name that is too long", "a sentence")
