"""A store on object storage: files come whole into a cache of this machine, and are read there."""

from __future__ import annotations

import io
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from kava_core.artefacts import parse_json
from kava_core.console import readable_size
from kava_core.errors import KavaError
from kava_core.store.cache import FOLDER, SIZE, Cache, Mismatch
from kava_core.store.checksum import file_checksum
from kava_core.store.layout import MANIFEST_FILE
from kava_core.store.manifest import REMAKE, Manifest, check_manifest, largest_manifest
from kava_core.store.objects import Missing, Objects
from kava_core.store.place import Glance, Opened, Place, identity
from kava_core.store.tensor_file import MAX_HEADER
from kava_core.store.url import Url

READERS = 4  # threads that fetch ahead: one waits for an answer while another one's bytes come
TRIES = 3  # to get a file with the right content
MOST_FILES = 100_000  # where a service does not list them
HEADER_BYTES = 1 << 16


class Remote(Place):
    """The folder at a URL; may be pickled. digest: of the manifest that is expected there.
    checked: checksum → which copy its content was looked at of; not looked at again where it is
    sent to.
    """

    def __init__(
        self,
        url: Url,
        cache: Cache,
        digest: str | None = None,
        checked: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.path: Url = url
        self.cache = cache
        self.digest = digest
        self._objects = Objects(url)
        self._checked = dict(checked or {})
        self._needed: frozenset[str] = frozenset()  # checksums
        self._ahead = _Ahead()

    def __reduce__(self) -> tuple[Any, ...]:
        return Remote, (self.path, self.cache, self.digest, self._checked)

    def read_manifest(self, kind: str | None = None) -> Manifest:
        return self._manifest(MOST_FILES, kind)

    def load_manifest(self, kind: str | None = None) -> Manifest:
        lengths = self._objects.lengths()
        manifest = self._manifest(MOST_FILES if lengths is None else len(lengths), kind)
        if lengths is not None:
            for name, info in manifest.files.items():
                self._check_length(name, lengths.get(name), info.bytes)
        return manifest

    def manifest_content(self, manifest: Manifest) -> bytes:
        most = largest_manifest(1 + len(manifest.files))
        return self._objects.read(self.path / MANIFEST_FILE, most)

    def _manifest(self, files: int, kind: str | None) -> Manifest:
        file = self.path / MANIFEST_FILE
        try:
            content = self._objects.read(file, largest_manifest(files))
        except Missing:
            raise KavaError(
                f"{self.path} holds no store: there is no {MANIFEST_FILE}, which is written last. "
                "Check the address; if it is being written, wait for its end."
            ) from None
        manifest = check_manifest(self.path, parse_json(content, str(file)), kind)
        if self.digest not in (None, manifest.digest):
            raise KavaError(
                f"{self.path} holds another store (digest {manifest.digest}) than when it was "
                f"linked ({self.digest}). Link it again with `kava store link`, or have the old "
                "one put back."
            )
        return manifest

    def _check_length(self, name: str, found: int | None, expected: int) -> None:
        if found is None:
            raise KavaError(f"{self.path / name} is missing, but the manifest lists it. {REMAKE}")
        if found != expected:
            raise KavaError(
                f"{self.path / name} has {found} bytes, the manifest says {expected}: it is "
                f"truncated or was changed. {REMAKE}"
            )

    def opened(
        self,
        manifest: Manifest,
        name: str,
        opener: Callable[[Path], Opened],
        glance: Callable[[Path], Glance],
        *,
        checksums: bool,
    ) -> tuple[Opened, Glance]:
        info = manifest.files[name]
        while True:  # another process may make room by removing the copy at any moment
            copy = self._copy(manifest, name, checksums=checksums)
            before = identity(copy)
            try:
                seen, opened = glance(copy), opener(copy)
            except KavaError:
                if before and identity(copy) == before:
                    raise
                continue
            if before and identity(copy) == before == self._checked[info.blake3]:
                return opened, seen

    def check_content(self, manifest: Manifest, name: str, *, checksums: bool) -> None:
        self._copy(manifest, name, checksums=checksums)

    def _copy(self, manifest: Manifest, name: str, *, checksums: bool) -> Path:
        """Where the copy of a file lies, whole and checked."""
        info, damaged = manifest.files[name], 0
        while damaged < TRIES:
            copy = self._fetched(manifest, name)
            now = identity(copy)
            if not now:
                continue
            if now == self._checked.get(info.blake3):
                return copy
            # It was checked as it came, but maybe long ago: a disk may have changed it since.
            if not checksums or self._is_right(copy, info.blake3):
                self._checked[info.blake3] = now
                return copy
            damaged += 1
            self.cache.drop(info)
        raise KavaError(
            f"{self.cache.folder} does not give back what is written there ({self.path / name}). "
            f"Check its disk, or set {FOLDER} to a folder on another one."
        )

    @staticmethod
    def _is_right(copy: Path, expected: str) -> bool:
        try:
            return file_checksum(copy) == expected
        except KavaError:
            return False

    def _fetched(self, manifest: Manifest, name: str) -> Path:
        info, url = manifest.files[name], self.path / name
        fetch = partial(self._objects.pieces, url, info.bytes)
        keep = {*self._needed, *(manifest.files[each].blake3 for each in _pinned(manifest))}
        for _ in range(TRIES):
            try:
                return self.cache.get(info, url, fetch, self._is_there, keep)
            except Mismatch:
                continue
            except Missing:
                self._check_same(manifest)
                raise KavaError(f"{url} is missing, but the manifest lists it. {REMAKE}") from None
        self._check_same(manifest)
        self._check_length(name, self._objects.size(url) or info.bytes, info.bytes)
        raise KavaError(
            f"{url} does not match its checksum, fetched {TRIES} times: its content is damaged. "
            f"{REMAKE}"
        )

    def _check_same(self, manifest: Manifest) -> None:
        """KavaError if another store has taken this one's place by now."""
        try:
            same = self.read_manifest().digest == manifest.digest
        except KavaError:
            return  # what is found wrong inside says more
        if not same:
            raise KavaError(
                f"{self.path} was made anew while it was read. Run this again: it reads the new "
                "one."
            )

    def _is_there(self, url: Url) -> bool:
        """Whether there is such an object; one of another place is asked for there."""
        shown, ours = str(url), f"{str(self.path).rstrip('/')}/"
        try:
            if shown.startswith(ours):
                self._objects.size(self.path / shown.removeprefix(ours))
            else:
                Objects(url).size(url)
        except KavaError:
            return False
        return True

    def header(self, manifest: Manifest, name: str) -> BinaryIO:
        file, size = self.path / name, manifest.files[name].bytes
        try:
            self._check_length(name, self._objects.size(file) or size, size)
        except Missing:
            self._check_length(name, None, size)
        content = self._objects.head(file, min(HEADER_BYTES, size))
        needed = 8 + int.from_bytes(content[:8], "little")
        if len(content) < needed <= min(size, 8 + MAX_HEADER):
            content = self._objects.head(file, needed)
        return io.BytesIO(content)

    def other_files(self, manifest: Manifest) -> Iterator[str]:
        for name in sorted(self._objects.lengths() or ()):
            if name not in manifest.files and name != MANIFEST_FILE:
                yield name

    def has_opened(self, manifest: Manifest, name: str) -> bool:
        """Not what the cache has given up: open, it would take up the disk as before."""
        info = manifest.files[name]
        return identity(self.cache.path(info)) == self._checked.get(info.blake3)

    def fetch_ahead(self, manifest: Manifest, now: Sequence[str], then: Sequence[str]) -> None:
        pinned = _pinned(manifest)
        sizes = {name: manifest.files[name].bytes for name in (*pinned, *now, *then)}
        room = self.cache.limit - sum(sizes[name] for name in {*pinned, *now})
        if room < 0:
            raise KavaError(
                f"{self.cache.folder} is too small: the index and {len(now)} shards of {self.path} "
                f"that are read at the same time are {readable_size(self.cache.limit - room)}, and "
                f"it may hold {readable_size(self.cache.limit)}. Set {SIZE} to at least that; in "
                "training a lower shard_window takes less."
            )
        names = list(now)
        for name in then:
            room -= sizes[name]
            if room < 0:
                break
            names.append(name)
        self._needed = frozenset(manifest.files[name].blake3 for name in names)
        self._ahead.ask([partial(self._fetched, manifest, name) for name in names])


def _pinned(manifest: Manifest) -> list[str]:
    """The files that a store is never read without: all but its shards."""
    return sorted(manifest.files.keys() - set(manifest.shard_files()))


class _Ahead:
    """Threads that work through what was asked for last, while the program goes on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], object]] = deque()
        self._threads = 0
        self._process = os.getpid()

    def ask(self, calls: Iterable[Callable[[], object]]) -> None:
        """What was asked for before and is not begun is forgotten."""
        if self._process != os.getpid():  # threads do not survive a fork
            self.__init__()  # type: ignore[misc]
        with self._lock:
            self._waiting = deque(calls)
            missing = min(READERS, len(self._waiting)) - self._threads
            for _ in range(missing):
                self._threads += 1
                threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                call = self._waiting.popleft()
            try:
                call()
            except KavaError:  # whoever needs the file meets it again, and says so
                continue
