"""`kava clean` lists unfinished work with sizes, asks, and removes what nobody works on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kava_core.artefacts import WORK, work_folder
from stages.cli import kava
from tests.holder import holder, kill


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
    (smoke / ".gitignore.tmp").touch()
    said = run(data, "--yes").output
    assert "5.0 MB  half written in smoke, " in said
    assert f"half written in smoke, in use by process {os.getppid()} on this machine" in said
    assert sorted(path.name for path in smoke.iterdir()) == [
        ".gitignore.tmp", f".imported.json.{os.getppid()}.tmp", "teacher",
    ]  # fmt: skip


def test_no_work_is_nothing_to_remove(tmp_path: Path) -> None:
    assert run(tmp_path / "data").output == "nothing to remove\n"
