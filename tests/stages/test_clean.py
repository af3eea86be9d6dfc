"""`kava clean` lists unfinished work with sizes, asks, and removes what nobody works on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kava_core.artefacts import WORK, clear, work_folder
from kava_core.leftovers import find_leftovers, remove
from stages.cli import kava
from tests.holder import holder, kill
from tests.stages.project import ROOT


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Unfinished work of two stages, an artefact, a lock of a dead process, and something else."""
    data = tmp_path / "data"
    for name, stage, size in (("teacher_kv", "generate", 3_000_000), ("teacher", "teacher", 900)):
        work = work_folder(data / "smoke" / name, stage, {})
        (work / "piece").write_bytes(b"x" * size)
    (data / "smoke" / "teacher").mkdir(parents=True)
    (data / "smoke" / "teacher" / "model").write_text("whole")
    (data / WORK / "generate-0.lock").write_text("{}")
    (data / WORK / "notes").write_text("a person's")
    make_old(data)
    return data


def make_old(data: Path) -> None:
    """As if everything had been written three days and two hours ago."""
    then = time.time() - (3 * 24 + 2) * 3600
    for path in data.rglob("*"):
        os.utime(path, (then, then))


def run(data: Path, *options: str, answer: str = "") -> Result:
    return CliRunner().invoke(kava, ["clean", "--data", str(data), *options], input=answer)


def test_what_is_removed_is_listed_with_its_size(data: Path) -> None:
    said = run(data, "--yes").output
    first, *rest = said.splitlines()
    assert "3.0 MB  generate of smoke/teacher_kv, 3 d 2 h old" in first
    assert any("teacher of smoke/teacher, 3 d 2 h old" in line for line in rest)
    assert "removed 4, 3.0 MB" in said
    assert list((data / WORK).iterdir()) == []
    assert (data / "smoke" / "teacher" / "model").read_text() == "whole"


def test_nothing_goes_without_a_yes(data: Path) -> None:
    before = sorted((data / WORK).iterdir())
    result = run(data, answer="n\n")
    assert "Remove 4 of them, 3.0 MB? [y/N]" in result.output
    assert result.exit_code == 1 and sorted((data / WORK).iterdir()) == before
    assert run(data, answer="y\n").exit_code == 0
    assert list((data / WORK).iterdir()) == []


def test_what_a_process_works_on_stays(data: Path) -> None:
    process = holder(data / WORK / "generate-1.lock", data / "ready")
    try:
        said = run(data, "--yes").output
    finally:
        kill(process)
    assert f"generate of smoke/teacher_kv, in use by process {process.pid} on this machine" in said
    left = sorted(path.name.partition("-")[0] for path in (data / WORK).iterdir())
    # What does not say whose it is may be anybody's.
    assert left == ["generate", "notes", "teacher_kv"]


def test_what_a_process_takes_up_while_a_person_thinks_stays(data: Path) -> None:
    lock, ready = data / WORK / "generate-0.lock", data / "ready"
    clean = subprocess.Popen(
        [sys.executable, "-m", "stages", "clean", "--data", str(data)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert clean.stdin is not None and clean.stdout is not None
    asked = ""
    while "[y/N]" not in asked:
        asked += clean.stdout.read(1)
    assert "Remove 4 of them, 3.0 MB?" in asked
    process = holder(lock, ready)
    try:
        said, _ = clean.communicate("y\n")
    finally:
        kill(process)
    assert f"stays: it is in use by process {process.pid} on this machine now" in said
    assert "removed 1, " in said
    left = sorted(path.name.partition("-")[0] for path in (data / WORK).iterdir())
    assert left == ["generate", "notes", "teacher_kv"] and lock.exists()


def test_beside_a_process_that_writes_it_sees_what_is_there(data: Path) -> None:
    (work,) = (data / WORK).glob("teacher_kv-*")
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            for number in range(200):
                (work / str(number)).touch()
            for number in range(200):
                (work / str(number)).unlink()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(50):
            assert any(left.path == work for left in find_leftovers(data))
    finally:
        over.set()
        thread.join()


def test_what_is_gone_since_it_was_listed_is_no_error(data: Path) -> None:
    found = find_leftovers(data)
    for left in found:
        clear(left.path)
        assert remove(left, data) is None
    assert len(found) == 4 and find_leftovers(data) == []


def dead_process() -> int:
    """The number of a process that has been."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_command_has_half_written_goes(data: Path) -> None:
    """Beside artefacts, where no later run looks; what a living process writes stays."""
    dead, smoke = dead_process(), data / "smoke"
    (smoke / f".exported.{dead}.tmp").mkdir()
    (smoke / f".exported.{dead}.tmp" / "shard").write_bytes(b"x" * 5_000_000)
    (smoke / f".eviction.json.{dead}.tmp").touch()
    (smoke / f".imported.json.{os.getppid()}.tmp").touch()
    make_old(data)
    (smoke / ".gitignore.tmp").touch()
    said = run(data, "--yes").output
    assert "5.0 MB  half written in smoke, " in said
    assert f"half written in smoke, in use by process {os.getppid()} on this machine" in said
    assert sorted(path.name for path in smoke.iterdir()) == [
        ".gitignore.tmp", f".imported.json.{os.getppid()}.tmp", "teacher",
    ]  # fmt: skip


def test_what_another_machine_may_be_writing_stays(data: Path) -> None:
    """The disk may be shared, and the name has no host: its lock says so, or how new it is."""
    dead, smoke = dead_process(), data / "smoke"
    (smoke / f".eviction.json.{dead}.tmp").touch()
    (data / "other").mkdir()
    (data / "other" / f".eviction.json.{dead}.tmp").touch()
    elsewhere = {"host": "elsewhere", "pid": 7, "work": "evict", "folder": "smoke"}
    (data / WORK / "evict-0.lock").write_text(json.dumps(elsewhere))
    make_old(data)
    (data / "other" / f".metrics.json.{dead}.tmp").touch()
    said = run(data, "--yes").output
    assert "half written in smoke, in use by process 7 on elsewhere" in said
    assert f"half written in other, in use by process {dead} on another machine, perhaps" in said
    assert "half written in other, 3 d 2 h old" in said
    assert (smoke / f".eviction.json.{dead}.tmp").exists()
    left = [path.name for path in (data / "other").iterdir()]
    assert left == [f".metrics.json.{dead}.tmp"]


def test_no_work_is_nothing_to_remove(tmp_path: Path) -> None:
    assert run(tmp_path / "data").output == "nothing to remove\n"
