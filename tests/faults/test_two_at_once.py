"""Two runs of one stage: one is at work, the other says who is. A reader sees one store, whole."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kava_core.artefacts import publish, work_folder
from kava_core.errors import KavaError
from kava_core.store import TargetsStore
from kava_core.store.read import OPEN_FILES
from tests.faults.conftest import Tell
from tests.faults.stage import STAGES, Stage
from tests.store.make import make_targets_store

MakeStage = Callable[[str], Stage]


def wait_for_lock(stage: Stage) -> None:
    deadline = time.monotonic() + 60
    while not any(lock.stat().st_size for lock in stage.work.glob("*.lock")):
        assert time.monotonic() < deadline, stage.said
        time.sleep(0.002)


@pytest.mark.parametrize("name", STAGES)
def test_the_second_run_names_the_first(make_stage: MakeStage, name: str, tell: Tell) -> None:
    stage = make_stage(name)
    first = stage.start()
    assert first.pid is not None
    wait_for_lock(stage)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        code, _ = stage.run()
        assert code == 1
        assert f"`{' '.join(STAGES[name][0])}` is at work already" in stage.said
        assert f"process {first.pid} on this machine" in stage.said
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert first.exitcode == 0 and "Traceback" not in stage.said
    assert all(stage.digests()) and list(stage.work.iterdir()) == []
    tell(f"two runs of {name}", "the second while the first is stopped", "a sentence with the pid")


def test_another_student_is_another_run(make_stage: MakeStage) -> None:
    stage = make_stage("distill")
    first = stage.start()
    assert first.pid is not None
    wait_for_lock(stage)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    code, _ = stage.run()
    assert code == 0
    assert f"distill kava: process {first.pid} on this machine was at work here" in stage.said


def test_shards_that_are_opened_again_are_of_the_same_store(tmp_path: Path) -> None:
    """Of a store with many shards few are open; another store of its shapes took its place."""
    output = tmp_path / "data" / "p" / "kv_targets"
    sizes = (1,) * (OPEN_FILES + 1)
    for seed in (1, 2):
        make_targets_store(tmp_path / str(seed), sizes, seed=seed)
    shutil.copytree(tmp_path / "1", output)
    for checksums in (True, False):
        store = TargetsStore.open(output, checksums=checksums)
        store.batch(range(len(store)))
        built = work_folder(output, "evict", {}) / "output"
        shutil.copytree(tmp_path / ("2" if checksums else "1"), built)
        publish((built, output))
        with pytest.raises(KavaError, match=r"was made anew while it was read\. Run this"):
            store.batch(range(len(store)))


def test_a_reader_sees_one_store_whole(tmp_path: Path, tell: Tell) -> None:
    """Two stores of the same shapes and other numbers take turns under one name."""
    output = tmp_path / "data" / "p" / "kv_targets"
    for seed in (1, 2):
        make_targets_store(tmp_path / str(seed), seed=seed)
    whole = [TargetsStore.open(tmp_path / str(seed)).batch(range(7)).keys.codes for seed in (1, 2)]
    over = threading.Event()

    def renew() -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            built = work_folder(output, "evict", turn) / "output"
            shutil.copytree(tmp_path / str(1 + turn % 2), built)
            publish((built, output))

    thread = threading.Thread(target=renew)
    thread.start()
    while not output.exists():  # before the first there is nothing to read
        time.sleep(0.001)
    seen = refused = 0
    try:
        deadline = time.monotonic() + 60
        while seen < 40 and time.monotonic() < deadline:
            try:
                keys = TargetsStore.open(output).batch(range(7)).keys.codes
            except KavaError as error:
                assert any(
                    words in str(error)
                    for words in (
                        "was made anew while it was read",
                        "is not a folder",
                        "missing",
                        "cannot be read",
                    )
                ), error
                refused += 1
                continue
            assert any(keys.equal(one) for one in whole)
            seen += 1
    finally:
        over.set()
        thread.join()
    assert seen == 40
    for _ in range(seen):
        tell("a store published while it is read", "two stores in turn", "the old or the new")
    for _ in range(refused):
        tell("a store published while it is read", "two stores in turn", "a sentence")
