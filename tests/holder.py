"""A process that holds a lock until it is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from kava_core.lock import alone

# A fork of a process whose threads are Ray's may crash.
CONTEXT = multiprocessing.get_context("forkserver")


def holder(lock: Path, ready: Path, forks: bool = False) -> BaseProcess:
    """ready: a file that it makes once it holds the lock. forks: it has a child then, too."""
    process = CONTEXT.Process(target=_hold, args=(lock, ready, forks))
    process.start()
    while not ready.exists():
        assert process.is_alive()
        time.sleep(0.01)
    return process


def kill(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def _hold(lock: Path, ready: Path, forks: bool) -> None:
    with alone(lock, "generate", "smoke"):
        if forks and os.fork() == 0:
            time.sleep(3)
            os._exit(0)
        ready.touch()
        time.sleep(60)
