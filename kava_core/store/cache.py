"""A folder of copies of files that lie on object storage: what was used last stays.

A file is named by its checksum, so that stores and processes share it. It appears whole and
checked, or not at all. Nothing is removed but what a cache has put there itself (its names bear the
cache's own mark), and that only once its object has been seen to be where it came from: a copy that
has become the only one is kept.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from kava_core.artefacts import disk_errors, read_json
from kava_core.console import readable_size
from kava_core.errors import KavaError
from kava_core.store.manifest import FileInfo
from kava_core.store.url import Url

FOLDER, SIZE = "KAVA_CACHE", "KAVA_CACHE_SIZE"
DEFAULT_SIZE = 50 * 10**9
MARK = "kava-cache.json"
UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Mismatch(Exception):
    """What came is not what the manifest tells of."""


@dataclass(frozen=True)
class _Copy:
    """A file of the cache, or a part of one: whose, when last used (a part never), its bytes."""

    place: Path
    digest: str
    used: int
    size: int


@dataclass(frozen=True)
class Cache:
    """Copies in `folder`, of `limit` bytes together; may be pickled and used by many processes."""

    folder: Path
    limit: int = DEFAULT_SIZE

    @classmethod
    def default(cls) -> Cache:
        """That of the environment: $KAVA_CACHE, $KAVA_CACHE_SIZE (as `50GB`)."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = os.environ.get(FOLDER)
        return cls(Path(folder) if folder else home / "kava" / "stores", _limit())

    def path(self, info: FileInfo) -> Path:
        """Where the copy of a file is, or would be."""
        return self.folder.absolute() / f"{info.blake3}.{self._mark()}"

    def get(
        self,
        info: FileInfo,
        url: Url,
        pieces: Callable[[], Iterable[bytes]],
        is_there: Callable[[Url], bool],
        keep: Collection[str] = (),
    ) -> Path:
        """The copy of a file; fetched by `pieces` unless it is here, by one process at a time.

        url: where it comes from. is_there: whether a URL still has an object. keep: checksums of
        files that are needed now, and do not make room for others. Mismatch if what came has
        another length or checksum. KavaError where there is no room.
        """
        place = self.path(info)
        if self._has(place, info) and _is_noted(place):
            return place
        with self._disk_errors(place, info, url), self._alone(place, wait=True) as origin:
            whole = self._has(place, info)
            # First: of a copy without its origin nobody could say that it is not the only one.
            if origin is not None and not (whole and os.fstat(origin).st_size):
                os.ftruncate(origin, 0)
                _write(origin, str(url).encode())
            if not whole:
                self._fetch(place, info, pieces, is_there, {*keep, info.blake3})
        return place

    def drop(self, info: FileInfo) -> None:
        """Remove a copy that is damaged."""
        self.path(info).unlink(missing_ok=True)

    def _has(self, place: Path, info: FileInfo) -> bool:
        try:
            found = place.lstat()
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(found.st_mode) or found.st_size != info.bytes:
            return False
        with suppress(OSError):  # it was used now; its content is as old as it was
            os.utime(place, ns=(time.time_ns(), found.st_mtime_ns))
        return True

    def _fetch(
        self,
        place: Path,
        info: FileInfo,
        pieces: Callable[[], Iterable[bytes]],
        is_there: Callable[[Url], bool],
        keep: Collection[str],
    ) -> None:
        part = place.with_name(f".{place.name}.{secrets.token_hex(4)}.part")
        with part.open("wb", buffering=0) as file:
            try:
                self._reserve(part, info, is_there, keep)
                digest, length = blake3(), 0
                for piece in pieces():
                    digest.update(piece)
                    length += len(piece)
                    if length > info.bytes:
                        raise Mismatch
                    _write(file.fileno(), piece)
                if length != info.bytes or digest.hexdigest() != info.blake3:
                    raise Mismatch
                part.replace(place)
            finally:
                part.unlink(missing_ok=True)

    @contextmanager
    def _disk_errors(self, place: Path, info: FileInfo, url: Url) -> Iterator[None]:
        """What the disk refuses while a copy is made, as a KavaError."""
        with disk_errors(place):
            try:
                yield
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise KavaError(
                    f"{self.folder} has no room for {url} ({readable_size(info.bytes)}): its disk "
                    f"is full. Free some space there, set {FOLDER} to a folder on another disk, or "
                    f"lower {SIZE}."
                ) from None

    def _reserve(
        self,
        part: Path,
        info: FileInfo,
        is_there: Callable[[Url], bool],
        keep: Collection[str],
    ) -> None:
        """Make room for a file and take it: a part counts as whole from the beginning."""
        with self._alone(self.folder / f"room.{self._mark()}", wait=True):
            copies = sorted(self._copies(), key=lambda copy: copy.used)
            room = self.limit - sum(copy.size for copy in copies)
            for copy in copies:
                if room >= info.bytes:
                    break
                if copy.digest not in keep and self._remove(copy, is_there):
                    room += copy.size
            if room < info.bytes:
                raise KavaError(
                    f"{self.folder} has no room for {readable_size(info.bytes)} more: it may hold "
                    f"{readable_size(self.limit)}, and what is there is needed now, or is the only "
                    f"copy there is. Set {SIZE} to more, or look through that folder."
                )
            os.truncate(part, info.bytes)

    def _copies(self) -> Iterator[_Copy]:
        """What this cache has put there."""
        mark = self._mark()
        whole = re.compile(rf"([0-9a-f]{{64}})\.{mark}")
        part = re.compile(rf"\.([0-9a-f]{{64}})\.{mark}\.[0-9a-f]{{8}}\.part")
        with os.scandir(self.folder) as entries:
            for entry in entries:
                match = whole.fullmatch(entry.name) or part.fullmatch(entry.name)
                if match is None:
                    continue
                with suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(found.st_mode):
                        place = self.folder.absolute() / entry.name
                        used = 0 if entry.name.startswith(".") else found.st_atime_ns
                        yield _Copy(place, match[1], used, found.st_size)

    def _remove(self, copy: _Copy, is_there: Callable[[Url], bool]) -> bool:
        """Remove a copy that has its object still, or what a killed process left of a file."""
        whole = self.folder.absolute() / f"{copy.digest}.{self._mark()}"
        with self._alone(whole, wait=False) as origin:
            if origin is None:  # it is being fetched
                return False
            if copy.place == whole:
                url = os.pread(origin, 1 << 16, 0).decode()
                if not url or not is_there(Url(url)):
                    return False
                _origin_of(whole).unlink(missing_ok=True)
            copy.place.unlink(missing_ok=True)
            return True

    @contextmanager
    def _alone(self, place: Path, *, wait: bool) -> Iterator[int | None]:
        """Hold the lock of a copy: the open file that says where it came from.

        wait: for whoever holds it; otherwise None is given where somebody does.
        """
        descriptor = os.open(_origin_of(place), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            held = _lock(descriptor, wait=wait)
            try:
                yield descriptor if held else None
            finally:
                if held:  # a forked child may have the file open still
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)

    def _mark(self) -> str:
        """What the names of this cache's files end with; made with the folder.

        KavaError for a folder that has other things in it.
        """
        mark = self.folder / MARK
        if not mark.is_file():
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                others = [p for p in self.folder.iterdir() if not p.name.startswith(f".{MARK}.")]
                if others and not mark.is_file():  # another process may make the mark now
                    raise KavaError(
                        f"{self.folder} cannot be a cache of stores: expected an empty folder or a "
                        f"cache, found other files. Set {FOLDER} to a new folder."
                    )
                _make_mark(mark)
        found = read_json(mark)
        name = found.get("mark") if isinstance(found, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"[0-9a-f]{8}", name):
            raise KavaError(f"{mark} is damaged. Set {FOLDER} to a new folder.")
        return name


def _limit() -> int:
    asked = os.environ.get(SIZE)
    if asked is None:
        return DEFAULT_SIZE
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(kB|MB|GB|TB|)", asked.strip())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise KavaError(
            f"{SIZE} must be a size such as 50GB (bytes, kB, MB, GB or TB), found {asked!r:.60}."
        )
    return size


def _make_mark(mark: Path) -> None:
    """Another process may make it at the same time: the first one's is kept."""
    draft = mark.with_name(f".{mark.name}.{os.getpid()}.{secrets.token_hex(4)}")
    draft.write_text(json.dumps({"mark": secrets.token_hex(4)}) + "\n", encoding="utf-8")
    try:
        os.link(draft, mark)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _origin_of(place: Path) -> Path:
    return place.with_name(f".{place.name}.from")


def _is_noted(place: Path) -> bool:
    """Whether it is known where a copy came from."""
    try:
        return _origin_of(place).stat().st_size > 0
    except FileNotFoundError:
        return False


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Whether this process has the lock now. A filesystem without locks lets everybody in: a file
    that two fetch is fetched twice, and is whole all the same."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
    return True


def _write(descriptor: int, piece: bytes) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
