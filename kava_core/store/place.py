"""The files of a store, wherever they lie: whole, checked, and here when they are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from kava_core.artefacts import read_regular
from kava_core.errors import KavaError
from kava_core.store.layout import MANIFEST_FILE
from kava_core.store.manifest import (
    REMAKE,
    Manifest,
    check_content,
    check_file,
    largest_manifest,
    load_manifest,
    read_manifest,
    unless_made_anew,
)
from kava_core.store.url import StorePath

Opened = TypeVar("Opened")
Glance = TypeVar("Glance")


class Place(ABC):
    """Where a store lies.

    path: as messages name it; `path / name` is a file.
    """

    path: StorePath

    @abstractmethod
    def read_manifest(self, kind: str | None = None) -> Manifest:
        """The manifest, checked without a look at the other files."""

    @abstractmethod
    def load_manifest(self, kind: str | None = None) -> Manifest:
        """The manifest; KavaError too if a file that it names is not there, or of another length
        than it says, as far as that can be seen without reading them."""

    @abstractmethod
    def manifest_content(self, manifest: Manifest) -> bytes:
        """The file that the manifest was read from, as it is written there."""

    @abstractmethod
    def opened(
        self,
        manifest: Manifest,
        name: str,
        opener: Callable[[Path], Opened],
        glance: Callable[[Path], Glance],
        *,
        checksums: bool,
    ) -> tuple[Opened, Glance]:
        """What `opener` makes of a whole file with the right content, after a glance at it.

        checksums: whether its content is looked at, once, also for processes this is sent to.
        """

    @abstractmethod
    def check_content(self, manifest: Manifest, name: str, *, checksums: bool) -> None:
        """KavaError unless the file is there, whole, and has the content it should."""

    @abstractmethod
    def header(self, manifest: Manifest, name: str) -> BinaryIO:
        """The beginning of a file, with all of its header."""

    @abstractmethod
    def other_files(self, manifest: Manifest) -> Iterator[str]:
        """Names of what lies in the folder and does not belong to the store."""

    @abstractmethod
    def has_opened(self, manifest: Manifest, name: str) -> bool:
        """Whether what was opened of a file should be kept open."""

    @abstractmethod
    def fetch_ahead(self, manifest: Manifest, now: Sequence[str], then: Sequence[str]) -> None:
        """Begin to fetch shards, those of `now` first; returns at once.

        KavaError if there is no room for those of `now` together.
        """


class Folder(Place):
    """A folder of this machine: files are read where they lie."""

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self._checked: dict[str, tuple[int, ...]] = {}  # file → what it was when it was checked

    def read_manifest(self, kind: str | None = None) -> Manifest:
        return read_manifest(self.path, kind)

    def load_manifest(self, kind: str | None = None) -> Manifest:
        return load_manifest(self.path, kind)

    def manifest_content(self, manifest: Manifest) -> bytes:
        return read_regular(self.path / MANIFEST_FILE, largest_manifest(1 + len(manifest.files)))

    def check_content(self, manifest: Manifest, name: str, *, checksums: bool) -> None:
        """Once more if it is another file by now: a store may be made anew while it is read."""
        with unless_made_anew(self.path, manifest):
            check_file(self.path, name, manifest.files[name].bytes)
            now = identity(self.path / name)
            before = self._checked.get(name)
            if now == before:
                return
            if checksums or before is not None:
                check_content(self.path / name, manifest)
            self._checked[name] = now

    def opened(
        self,
        manifest: Manifest,
        name: str,
        opener: Callable[[Path], Opened],
        glance: Callable[[Path], Glance],
        *,
        checksums: bool,
    ) -> tuple[Opened, Glance]:
        file = self.path / name
        with unless_made_anew(self.path, manifest):
            check_file(self.path, name, manifest.files[name].bytes)
            seen = glance(file)  # first: a file of many empty gigabytes is not read through
            self.check_content(manifest, name, checksums=checksums)
            opened = opener(file)
            if identity(file) != self._checked[name]:  # it may not be what was checked
                raise KavaError(f"{file} was changed while it was read. {REMAKE}")
        return opened, seen

    def header(self, manifest: Manifest, name: str) -> BinaryIO:
        try:
            return (self.path / name).open("rb")
        except OSError as error:
            raise KavaError(
                f"{self.path / name} cannot be read ({error.strerror}). {REMAKE}"
            ) from None

    def other_files(self, manifest: Manifest) -> Iterator[str]:
        for file in sorted(self.path.iterdir()):
            if file.name not in manifest.files and file.name != MANIFEST_FILE:
                yield file.name

    def has_opened(self, manifest: Manifest, name: str) -> bool:
        return True

    def fetch_ahead(self, manifest: Manifest, now: Sequence[str], then: Sequence[str]) -> None:
        """They are here."""


def identity(file: Path) -> tuple[int, ...]:
    """Another one if another file stands under the name, none does, or it was written to."""
    try:
        status = file.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
