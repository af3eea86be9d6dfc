"""What runs that were killed, or had other settings, left in the folder of unfinished work and
half written beside artefacts, and what finished ones keep for the next."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kava_core.artefacts import KEPT, PURPOSE, WORK, clear, data_folder, read_json
from kava_core.errors import KavaError
from kava_core.lock import Holder, holder_of, is_alive

# The names that `atomic_path` and `atomic_folder` write under, with the process that does.
HALF_WRITTEN = re.compile(r"\..+\.\d{1,9}\.tmp")
LOCK = ".lock"
LATELY = 3600.0  # seconds: what was written to since may be another machine's work


@dataclass(frozen=True)
class Leftover:
    """A folder of unfinished or kept work, a lock that nobody holds any more, or what a process
    that was killed has half written.

    what: in words. size: bytes. age: seconds since it was last written to. holder: who is at work
    on it, in words.
    """

    path: Path
    what: str
    size: int
    age: float
    holder: str | None


def find_leftovers(data: Path) -> list[Leftover]:
    """All unfinished and kept work of the data folder `data`, and all that is half written there,
    largest first."""
    data = data_folder(data / "pipeline")
    held, found = _held(data), []
    for path in [*_work(data), *_half_written(data)]:
        if (measured := _measured(path)) is not None:
            size, age = measured
            what, holder = _purpose_and_holder(path, data, age, held)
            if path.suffix != LOCK or holder is None:
                found.append(Leftover(path, what, size, age, holder))
    return sorted(found, key=lambda left: -left.size)


def remove(left: Leftover, data: Path) -> str | None:
    """Remove a leftover of the data folder `data`, unless somebody has taken it up in the meantime:
    who that is."""
    data = data_folder(data / "pipeline")
    if (measured := _measured(left.path)) is None:
        return None
    _, holder = _purpose_and_holder(left.path, data, measured[1], _held(data))
    if holder is None:
        with suppress(FileNotFoundError):  # somebody else removes it at the same time
            clear(left.path)
    return holder


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


def _work(data: Path) -> list[Path]:
    """What stands in the folders of unfinished and of kept work."""
    folders = [data / name for name in (WORK, KEPT)]
    return sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir())


def _held(data: Path) -> list[Holder]:
    """Who is at work in the data folder."""
    locks = (path for path in _work(data) if path.suffix == LOCK)
    return [holder for path in locks if (holder := holder_of(path)) is not None]


def _half_written(data: Path) -> Iterator[Path]:
    """What stands beside artefacts under a name for the time of writing."""
    for root, folders, files in os.walk(data):
        yield from (Path(root, name) for name in [*folders, *files] if HALF_WRITTEN.fullmatch(name))
        at_the_top = Path(root) == data
        folders[:] = [
            name
            for name in folders
            if not HALF_WRITTEN.fullmatch(name) and not (at_the_top and name in (WORK, KEPT))
        ]


def _measured(path: Path) -> tuple[int, float] | None:
    """Bytes, and seconds since it was last written to; None if it is gone."""
    paths, states = [path], []
    for root, folders, files in os.walk(path):
        paths += (Path(root, name) for name in [*folders, *files])
    for each in paths:
        with suppress(FileNotFoundError):  # whoever is at work there removes files, too
            states.append(each.lstat())
    if not states:
        return None
    age = time.time() - max(state.st_mtime for state in states)
    return sum(state.st_size for state in states), max(0.0, age)


def _purpose_and_holder(
    path: Path, data: Path, age: float, held: list[Holder]
) -> tuple[str, str | None]:
    """What it is, and who is at work on it, in words; held: who holds the locks of `data`."""
    if path.parent not in (data / WORK, data / KEPT):
        place = path.parent.relative_to(data)
        return f"half written in {place.as_posix()}", _writer(path, place, age, held)
    if path.suffix == LOCK:
        holder, what = holder_of(path), "lock"
    else:
        stage, output = _purpose(path)
        holder = next((each for each in held if _works_on(each, stage, output)), None)
        kept = ", kept for the next run" if path.parent.name == KEPT else ""
        what = (f"{stage} of {output}" if stage else "unknown") + kept
    return what, None if holder is None else str(holder)


def _writer(path: Path, place: Path, age: float, held: list[Holder]) -> str | None:
    """Who may still write it. Its name has a process but no host, and the disk may be shared: so
    it may be whoever holds a lock elsewhere, and while it is new anybody."""
    pid = int(path.name.split(".")[-2])
    if is_alive(pid):
        return str(Holder(platform.node(), pid, "", ""))
    for each in held:
        if each.host != platform.node() and place.is_relative_to(each.folder):
            return str(each)
    return f"process {pid} on another machine, perhaps" if age < LATELY else None
