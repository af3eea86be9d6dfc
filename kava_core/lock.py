"""One at a time: a lock that lives as long as the process that holds it.

The operating system holds the lock and lets go of it however the process ends. The file it is held
on says whose it is, by host and process: for the messages, and for other machines that share the
disk, where the operating system's word does not reach.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from kava_core.artefacts import disk_errors, make_folders
from kava_core.console import warn
from kava_core.errors import KavaError

LARGEST = 4096  # bytes of a lock's file
# A lock is taken before it is signed.
SIGNED_AFTER, LOOK_EVERY = 2.0, 0.05


@dataclass(frozen=True)
class Holder:
    """Who is at work: pid on host; work: the command; folder: below which its output lies."""

    host: str
    pid: int
    work: str
    folder: str

    def __str__(self) -> str:
        where = "this machine" if self.host == platform.node() else self.host
        return f"process {self.pid} on {where}"


@contextmanager
def alone(path: Path, work: str, folder: str) -> Iterator[None]:
    """Hold the lock at `path` while in this context; the file is gone afterwards.

    work, folder: as in `Holder`. What a process that has died on this machine held is taken over,
    and said so.

    KavaError if another process on this machine holds it, or one on another machine may.
    """
    descriptor = _take(path, Holder(platform.node(), os.getpid(), work, folder))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def holder_of(path: Path) -> Holder | None:
    """Who holds the lock at `path`, or may, being on another machine; None if nobody does."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        signed = _signature(descriptor)
        if _is_held(descriptor, signed):
            return signed or Holder(platform.node(), 0, "?", "")
        return signed if signed is not None and signed.host != platform.node() else None
    finally:
        os.close(descriptor)


def _take(path: Path, mine: Holder) -> int:
    """The descriptor of the locked and signed file."""
    with disk_errors(path):
        make_folders(path.parent)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
            try:
                _check_free(path, descriptor, mine)
                if _is_at(path, descriptor):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps(asdict(mine)).encode(), 0)
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # whoever had it has removed it: once more


def _check_free(path: Path, descriptor: int, mine: Holder) -> None:
    signed = _signature(descriptor)
    if _is_held(descriptor, signed):
        patience = time.monotonic() + SIGNED_AFTER
        while signed is None and time.monotonic() < patience:
            time.sleep(LOOK_EVERY)
            signed = _signature(descriptor)
        who = str(signed) if signed else "another process"
        end = f" (`kill {signed.pid}`)" if signed else ""
        raise KavaError(
            f"`{mine.work}` is at work already in {mine.folder}: {who} holds {path}. Wait for its "
            f"end, or end it{end}, and run this again."
        )
    if signed is None or not _is_at(path, descriptor):
        return
    if signed.host != mine.host:
        raise KavaError(
            f"`{mine.work}` may be at work in {mine.folder}: {signed} left {path}. Wait for its "
            "end; if it has ended, delete that file and run this again."
        )
    warn(f"{mine.work}: {signed} was at work here and has ended; going on in its place")


def _is_held(descriptor: int, signed: Holder | None) -> bool:
    """Whether another process on this machine holds the file; if not, this one does from now on."""
    try:
        # Not flock(2): a child that was forked would hold it on after the death of its parent.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # a filesystem without locks: the file's word is all there is
        return signed is not None and signed.host == platform.node() and is_alive(signed.pid)
    return False


def is_alive(pid: int) -> bool:
    """Whether there is another process of this number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return pid != os.getpid()


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file still is the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _signature(descriptor: int) -> Holder | None:
    try:
        return Holder(**json.loads(os.pread(descriptor, LARGEST, 0)))
    except (ValueError, TypeError, RecursionError):  # empty, torn or none of ours
        return None
