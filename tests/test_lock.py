"""A lock lives as long as its holder, says who that is, and is taken over from the dead."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from kava_core.errors import KavaError
from kava_core.lock import alone, holder_of, is_alive
from tests.holder import CONTEXT, holder, kill


def compete(lock: Path, taken: Path, start: Event) -> None:
    start.wait()
    try:
        with alone(lock, "evict", "smoke"):
            with taken.open("a") as file:
                file.write("x")
            time.sleep(1)
    except KavaError:
        os._exit(1)
    os._exit(0)


@pytest.fixture
def held(tmp_path: Path) -> BaseProcess:
    """It holds `lock`."""
    return holder(tmp_path / "lock", tmp_path / "ready")


def test_the_holder_is_named_and_taken_over_from_once_it_is_dead(
    tmp_path: Path, held: BaseProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "lock"
    words = rf"`evict` is at work already in smoke: process {held.pid} on this machine holds .*lock"
    with (
        pytest.raises(KavaError, match=words + rf".*`kill {held.pid}`"),
        alone(lock, "evict", "smoke"),
    ):
        pass
    holder = holder_of(lock)
    assert holder is not None and (holder.pid, holder.work) == (held.pid, "generate")
    kill(held)
    assert lock.exists() and holder_of(lock) is None
    with alone(lock, "evict", "smoke"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    said = " ".join(capsys.readouterr().err.split())
    assert f"evict: process {held.pid} on this machine was at work here and has ended" in said
    assert not lock.exists()


def test_a_forked_child_of_a_dead_holder_holds_nothing(tmp_path: Path) -> None:
    """As the processes that read batches ahead of a trainer, which outlive it for seconds."""
    kill(holder(tmp_path / "lock", tmp_path / "ready", forks=True))
    with alone(tmp_path / "lock", "distill", "smoke"):
        pass


def test_another_machines_lock_is_left_to_a_person(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    signed = {"host": "elsewhere", "pid": 7, "work": "teacher", "folder": "smoke"}
    lock.write_text(json.dumps(signed))
    with (
        pytest.raises(
            KavaError, match=r"`teacher` may be at work .*process 7 on elsewhere.*delete that file"
        ),
        alone(lock, "teacher", "smoke"),
    ):
        pass
    assert json.loads(lock.read_text()) == signed
    assert str(holder_of(lock)) == "process 7 on elsewhere"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "[" * 9000])
def test_a_torn_lock_that_nobody_holds_is_taken(tmp_path: Path, content: str) -> None:
    lock = tmp_path / "lock"
    lock.write_text(content)
    with alone(lock, "teacher", "smoke"):
        assert json.loads(lock.read_text())["host"] == platform.node()
    assert not lock.exists()


def test_a_lock_is_gone_whatever_ended_the_work(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), alone(tmp_path / "lock", "teacher", "smoke"):
        raise ZeroDivisionError
    assert not (tmp_path / "lock").exists()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lock = tmp_path / "file" / "lock"
    with (
        pytest.raises(KavaError, match=re.escape(f"{lock} cannot be written")),
        alone(lock, "teacher", "smoke"),
    ):
        pass


def test_one_of_many_that_start_together_gets_it(tmp_path: Path) -> None:
    lock, taken = tmp_path / "lock", tmp_path / "taken"
    start = CONTEXT.Event()
    processes = [CONTEXT.Process(target=compete, args=(lock, taken, start)) for _ in range(8)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join()
    assert sum(process.exitcode == 0 for process in processes) == len(taken.read_text()) >= 1
    assert not lock.exists()


def test_a_process_is_alive_until_it_is_not() -> None:
    assert is_alive(os.getppid())
    assert not is_alive(os.getpid())  # this one, which asks, is no other
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert not is_alive(process.pid)
