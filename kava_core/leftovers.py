"""What runs that were killed, or had other settings, left in the folder of unfinished work and
half written beside artefacts, and what finished ones keep for the next."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from kava_core.artefacts import KEPT, PURPOSE, WORK, clear, data_folder, read_json
from kava_core.errors import KavaError
from kava_core.lock import Holder, holder_of, is_alive

# The names that `atomic_path` and `atomic_folder` write under, with the process that does.
HALF_WRITTEN = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d{1,9})\.tmp")


@dataclass(frozen=True)
class Leftover:
    """A folder of unfinished or kept work, a lock that nobody holds any more, or what a process
    that was killed has half written.

    what: in words. size: bytes. age: seconds since it was last written to. holder: who is at work
    on it.
    """

    path: Path
    what: str
    size: int
    age: float
    holder: Holder | None


def find_leftovers(data: Path) -> list[Leftover]:
    """All unfinished and kept work of the data folder `data`, and all that is half written there,
    largest first."""
    data = data_folder(data / "pipeline")
    folders = [data / name for name in (WORK, KEPT)]
    entries = sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir())
    locks = {path: holder_of(path) for path in entries if path.suffix == ".lock"}
    held = [holder for holder in locks.values() if holder is not None]
    found = [_look_at(path, "lock", None) for path, holder in locks.items() if holder is None]
    for path in entries:
        if path in locks:
            continue
        stage, output = _purpose(path)
        holder = next((each for each in held if _works_on(each, stage, output)), None)
        what = f"{stage} of {output}" if stage else "unknown"
        kept = ", kept for the next run" if path.parent.name == KEPT else ""
        found.append(_look_at(path, what + kept, holder))
    for path, pid in _half_written(data):
        writer = Holder(platform.node(), pid, "", "") if is_alive(pid) else None
        place = path.parent.relative_to(data).as_posix()
        found.append(_look_at(path, f"half written in {place}", writer))
    return sorted(found, key=lambda left: -left.size)


def remove(left: Leftover) -> None:
    """Remove a leftover, unless somebody took it up in the meantime."""
    if left.path.suffix != ".lock" or holder_of(left.path) is None:
        clear(left.path)


def keep_only(output: Path, stage: str, kept: Collection[Path]) -> None:
    """Of all that `stage` keeps of artefacts below `output`, remove all but the folders `kept`."""
    data = data_folder(output)
    place = output.absolute().relative_to(data).as_posix()
    for path in (data / KEPT).glob("*"):
        made_by, of = _purpose(path)
        if made_by == stage and Path(of).is_relative_to(place) and path not in kept:
            clear(path)


def _purpose(path: Path) -> tuple[str, str]:
    """The stage and the output that a folder of work is for; empty where it does not say."""
    try:
        purpose = read_json(path / PURPOSE)
        return str(purpose["stage"]), str(purpose["output"])
    except (KavaError, KeyError, TypeError):
        return "", ""


def _works_on(holder: Holder, stage: str, output: str) -> bool:
    """Whether the holder of a lock may be at work on it; of unknown work everybody may be."""
    if not stage or not holder.folder:
        return True
    return holder.work.split()[0] == stage and Path(output).is_relative_to(holder.folder)


def _half_written(data: Path) -> Iterator[tuple[Path, int]]:
    """What stands beside artefacts under a name for the time of writing, and whose it is."""
    for root, folders, files in os.walk(data):
        for name in [*folders, *files]:
            if found := HALF_WRITTEN.fullmatch(name):
                yield Path(root, name), int(found["pid"])
        at_the_top = Path(root) == data
        folders[:] = [
            name
            for name in folders
            if not HALF_WRITTEN.fullmatch(name) and not (at_the_top and name in (WORK, KEPT))
        ]


def _look_at(path: Path, what: str, holder: Holder | None) -> Leftover:
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    states = [file.lstat() for file in files]
    age = time.time() - max(state.st_mtime for state in states)
    return Leftover(path, what, sum(state.st_size for state in states), max(0.0, age), holder)
