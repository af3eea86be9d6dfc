"""Publishing, killed before each of its system calls, and with the power cut before each rename."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from kava_core.artefacts import publish, work_folder
from kava_core.errors import KavaError
from tests.faults.conftest import Tell
from tests.stages.project import digest

CALLS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "open"}


def make(folder: Path, content: str) -> dict[str, str]:
    (folder / "plots").mkdir(parents=True)
    for name in ("a", "b", "plots/c"):
        (folder / name).write_text(f"{content} {name}")
    return digest(folder)


def build(output: Path) -> Path:
    built = work_folder(output, "teacher", {}) / "output"
    if not built.is_dir():
        make(built, "new")
    (built.parent / "checkpoints").mkdir(exist_ok=True)
    return built


def publish_and_die(output: Path, at: int) -> int:
    """Publish in a child that kills itself before its `at`-th system call; its exit status."""
    pid = os.fork()
    if pid == 0:
        built, left = build(output), at

        def count(event: str, _: Any) -> None:
            nonlocal left
            if event in CALLS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        publish((built, output))
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_at_every_moment_the_output_is_old_or_new_or_not_there(tmp_path: Path, tell: Tell) -> None:
    seen = set()
    for at in range(200):
        output = tmp_path / str(at) / "data" / "p" / "teacher"
        old, new = make(output, "old"), make(tmp_path / str(at) / "new", "new")
        done = publish_and_die(output, at) == 0
        found = digest(output) if output.exists() else {}
        assert found in (old, new, {}), f"a mixture after {at} calls"
        seen.add(("old", "new", "none")[[old, new, {}].index(found)])
        publish((build(output), output))
        assert digest(output) == new
        assert list((output.parents[1] / ".work").iterdir()) == []
        if done:
            break
        tell("publishing killed", "before each of its system calls", "old, new or none; never half")
    assert done and seen == {"old", "new", "none"}


def test_what_has_taken_its_name_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tell: Tell
) -> None:
    """As if the power were cut at the rename, and all that was not synced were lost."""
    output = tmp_path / "data" / "p" / "teacher"
    make(output, "old")
    built = build(output)
    calls: list[tuple[str, str]] = []
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def note_fsync(descriptor: int) -> None:
        calls.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        calls.append(("replace", str(target)))
        replace(source, target)

    def note_unlink(path: Any, **more: Any) -> None:
        calls.append(("unlink", str(path)))
        unlink(path, **more)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(os, "unlink", note_unlink)
    publish((built, output))
    renamed = calls.index(("replace", str(output)))
    synced = {path for call, path in calls[:renamed] if call == "fsync"}
    parts = ["", "/a", "/b", "/plots", "/plots/c"]
    assert {f"{built}{part}" for part in parts} <= synced
    durable = calls.index(("fsync", str(output.parent)), renamed)
    deleted = [i for i, (call, path) in enumerate(calls) if (call, path) == ("unlink", "a")]
    assert len(deleted) == 1 and deleted[0] > durable  # the old one goes once the new one is safe
    tell("power cut while publishing", "what was not synced is lost", "nothing under the name is")


def test_a_file_in_the_outputs_place_is_not_deleted(tmp_path: Path, tell: Tell) -> None:
    output = tmp_path / "data" / "p" / "teacher"
    built = build(output)
    output.parent.mkdir(parents=True)
    output.write_text("a person's own")
    with pytest.raises(KavaError, match=r"teacher is in the way: .* Move it away"):
        publish((built, output))
    assert output.read_text() == "a person's own" and built.is_dir()
    output.unlink()
    publish((built, output))
    assert (output / "a").is_file()
    tell("a file in an output's place", "a text file", "a sentence; moved away, the same goes on")


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="there is no other filesystem")
def test_an_output_on_another_filesystem_is_named(tmp_path: Path, tell: Tell) -> None:
    elsewhere = Path("/dev/shm") / f"kava-{os.getpid()}"
    elsewhere.mkdir()
    try:
        output = tmp_path / "data" / "p" / "teacher"
        (tmp_path / "data").mkdir()
        output.parent.symlink_to(elsewhere)
        built = build(output)
        with pytest.raises(KavaError, match=r"is on another filesystem than .* is kept\."):
            publish((built, output))
        assert built.is_dir()
    finally:
        shutil.rmtree(elsewhere)
    tell("an output on another filesystem", "a link to /dev/shm", "a sentence; nothing lost")
