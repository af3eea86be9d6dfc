"""manifest.json: what a store is, what it was made from, and a checksum for each of its files."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import StringConstraints, ValidationError

import kava_core
from kava_core.artefacts import canonical_json, read_json
from kava_core.errors import KavaError
from kava_core.rotary import Rotary
from kava_core.store.checksum import checksum, file_checksum
from kava_core.store.layout import (
    MANIFEST_FILE,
    Codec,
    Count,
    Geometry,
    Kind,
    RotaryPhase,
    StrictModel,
    shard_name,
)
from kava_core.store.manifest_checks import REMAKE, check_counts, check_numbers, check_rotary
from kava_core.store.url import StorePath

# The one version that is written and read. Version 1, never published, had SHA-256 checksums.
FORMAT_VERSION = 3
KIND_NAMES = {"teacher_kv": "a teacher's cache", "kv_targets": "KV targets"}
SOFTWARE = ("torch", "transformers", "safetensors", "pyarrow", "numpy")

# Bytes that a manifest may have, and for each file of the folder: it is read whole, and reading it
# must cost a hostile one neither time nor memory.
LARGEST, LARGEST_PER_FILE = 1 << 20, 1 << 10

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class RotaryInfo(StrictModel):
    """Which keys are stored, and how the model would turn them (see `kava_core.rotary`).

    phase: `pre_rope`, keys as they are before the rotary embedding; `post_rope`, after it.
    inv_freq: [L][R/2], scaling: [L]; empty lists for a model without rotary embedding.
    """

    phase: RotaryPhase
    inv_freq: tuple[tuple[float, ...], ...] = ()
    scaling: tuple[float, ...] = ()

    @classmethod
    def of(cls, phase: RotaryPhase, rotary: Rotary | None) -> Self:
        if rotary is None:
            return cls(phase=phase)
        turn = rotary.to_json()
        inv_freq = tuple(tuple(row) for row in turn["inv_freq"])
        return cls(phase=phase, inv_freq=inv_freq, scaling=tuple(turn["scaling"]))

    @property
    def rotation(self) -> Rotary | None:
        """The rotation of all L layers; None for a model without rotary embedding."""
        if not self.scaling:
            return None
        return Rotary.from_json(self.model_dump(include={"inv_freq", "scaling"}))


class Statistics(StrictModel):
    """Standard deviations over the whole store, of the numbers a reader gets.

    keys_std, values_std: [L'], over valid slots (or tokens), heads and dimensions.
    endpoint_std: [L+1], over records and the hidden size.
    """

    keys_std: tuple[float, ...]
    values_std: tuple[float, ...]
    endpoint_std: tuple[float, ...]


class Drift(StrictModel):
    """What quantisation changed, per cache row: [L'] each.

    *_relative_l2: ‖x − x̂‖ / ‖x‖ over the store.
    *_neighbour_changed: the share of slots (or tokens) whose nearest other one in the same record,
        row and head is another one after quantisation.
    """

    keys_relative_l2: tuple[float, ...]
    values_relative_l2: tuple[float, ...]
    keys_neighbour_changed: tuple[float, ...]
    values_neighbour_changed: tuple[float, ...]


class FileInfo(StrictModel):
    """Checksum and length of one file."""

    blake3: Digest
    bytes: Count


class Manifest(StrictModel):
    """The whole of manifest.json; nothing in it tells two identical runs apart."""

    format_version: Literal[3]
    kind: Kind
    geometry: Geometry
    codec: Codec
    rotary: RotaryInfo
    settings: dict[str, Any]
    fingerprints: dict[str, str]
    software: dict[str, str]
    statistics: Statistics
    drift: Drift | None
    records: Count
    trace_tokens: Count
    shards: tuple[Count, ...]
    files: dict[str, FileInfo]
    digest: Digest

    @classmethod
    def build(cls, **fields: Any) -> Self:
        """A manifest from all its fields but the version, the software and the digest."""
        body = {"format_version": FORMAT_VERSION, "software": software_versions(), **fields}
        draft = cls.model_validate({**body, "digest": "0" * 64})
        plain = draft.model_dump(mode="json")
        return draft.model_copy(update={"digest": manifest_digest(plain)})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.model_dump(mode="json")

    def shard_files(self) -> list[str]:
        """File names of the shards, in order."""
        return [shard_name(shard) for shard in range(len(self.shards))]


def manifest_digest(plain: dict[str, Any]) -> str:
    """Checksum of the canonical JSON of a manifest without its `digest`."""
    body = {key: value for key, value in plain.items() if key != "digest"}
    return checksum([canonical_json(body).encode()])


def software_versions() -> dict[str, str]:
    """Versions of what shapes the numbers, without importing it."""
    found = {"kava": kava_core.__version__}
    for name in SOFTWARE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Expectation:
    """What a run needs a store to be made with: fingerprints of its own teacher and tokenizer."""

    teacher: str
    tokenizer: str

    def check(self, manifest: Manifest, path: StorePath) -> None:
        """KavaError naming both values where the store at `path` is not what is expected."""
        for name, expected in vars(self).items():
            found = manifest.fingerprints.get(name)
            if expected != found:
                raise KavaError(
                    f"{path} was made with the {name} {found or '(not recorded)'}, this run has "
                    f"{expected}. Make the store again from this run's {name}, or point to the "
                    "store that belongs to it."
                )


def load_manifest(path: Path, kind: str | None = None) -> Manifest:
    """The manifest of the store in folder `path`.

    Checks the manifest itself, that its digest is right, and that every file it names is there,
    inside the folder and as long as it says. KavaError names the file and what to do.
    """
    manifest = read_manifest(path, kind)
    with unless_made_anew(path, manifest):
        lengths = _lengths(path)
        for name, info in manifest.files.items():
            if lengths.get(name) != info.bytes:
                check_file(path, name, info.bytes)
    return manifest


def _lengths(path: Path) -> dict[str, int]:
    """Of the regular files in a folder: one call for each, there may be thousands."""
    try:
        with os.scandir(path) as entries:
            return {e.name: e.stat().st_size for e in entries if e.is_file(follow_symlinks=False)}
    except OSError as error:
        raise KavaError(f"{path} cannot be read ({error.strerror}). {REMAKE}") from None


def read_manifest(path: Path, kind: str | None = None) -> Manifest:
    """The manifest of the store in folder `path`, checked without a look at the other files."""
    file = path / MANIFEST_FILE
    if not path.is_dir():
        raise KavaError(
            f"{path} is not a folder. A store is a folder with a {MANIFEST_FILE}: name one, or run "
            "the stage that makes it."
        )
    check_inside(path, MANIFEST_FILE)
    plain = read_json(file, largest_manifest(len(_lengths(path))))
    return check_manifest(path, plain, kind)


def largest_manifest(files: int) -> int:
    """Bytes that the manifest of a store of so many files may have."""
    return LARGEST + LARGEST_PER_FILE * files


def check_manifest(path: StorePath, plain: Any, kind: str | None = None) -> Manifest:
    """The manifest that is written as the JSON `plain` in the store at `path`."""
    file = path / MANIFEST_FILE
    try:
        digest = manifest_digest(plain) if isinstance(plain, dict) else None
    except (ValueError, RecursionError) as error:  # half a character
        raise KavaError(f"{file} cannot be read ({error}). {REMAKE}") from None
    if not isinstance(plain, dict):
        raise KavaError(f"{file} must hold a JSON object, found {type(plain).__name__}. {REMAKE}")
    _check_version(file, plain.get("format_version"))
    found = plain.get("kind")
    if kind is not None and found != kind:
        raise KavaError(
            f"{path} holds {KIND_NAMES.get(str(found), 'another kind')} ({found!s:.60}), but "
            f"{KIND_NAMES[kind]} ({kind}) is needed here. Point to a store of that kind."
        )
    if plain.get("records") == 0:
        raise KavaError(f"{file} says that the store has zero records. {REMAKE}")
    if isinstance(plain.get("files"), dict):
        for name in plain["files"]:
            _check_name(file, name)
    if plain.get("digest") != digest:
        raise KavaError(
            f"{file} does not match its own digest: it was changed after it was written. {REMAKE}"
        )
    try:
        manifest = Manifest.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "(top level)"
        raise KavaError(f"{file}: {where:.200}: {first['msg']:.200}. {REMAKE}") from None
    check_counts(file, manifest)
    check_rotary(file, manifest)
    check_numbers(file, manifest)
    return manifest


def check_file(path: Path, name: str, expected: int) -> None:
    """KavaError unless the folder has the file, not through a link out of it, of that length."""
    check_inside(path, name)
    try:
        status = (path / name).stat()
    except FileNotFoundError:
        raise KavaError(f"{path / name} is missing, but the manifest lists it. {REMAKE}") from None
    except OSError as error:
        raise KavaError(f"{path / name} cannot be read ({error.strerror}). {REMAKE}") from None
    if not stat.S_ISREG(status.st_mode):
        raise KavaError(
            f"{path / name} cannot be read: expected a file, found a folder, a pipe or a device. "
            f"{REMAKE}"
        )
    if (found := status.st_size) != expected:
        raise KavaError(
            f"{path / name} has {found} bytes, the manifest says {expected}: it is truncated or "
            f"was changed. {REMAKE}"
        )


def check_content(file: Path, manifest: Manifest) -> None:
    """KavaError unless the content of a store's file is the one that its manifest tells of."""
    if file_checksum(file) != manifest.files[file.name].blake3:
        raise KavaError(f"{file} does not match its checksum: its content is damaged. {REMAKE}")


@contextmanager
def unless_made_anew(path: Path, manifest: Manifest) -> Iterator[None]:
    """What is found wrong inside is no damage if another store has taken its place by now."""
    before = _folder_identity(path)
    try:
        yield
    except KavaError:
        if _folder_identity(path) == before and _is_of(path, manifest):
            raise
        raise KavaError(
            f"{path} was made anew while it was read. Run this again: it reads the new one."
        ) from None


def _folder_identity(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _is_of(path: Path, manifest: Manifest) -> bool:
    """Whether the manifest in `path` still is this one, or cannot be read: then it is damaged."""
    try:
        return read_manifest(path).digest == manifest.digest
    except KavaError:
        return True


def check_inside(path: Path, name: str) -> None:
    """KavaError if the file is a symbolic link that leads out of the folder."""
    file = path / name
    if file.is_symlink() and Path(os.path.realpath(file)).parent != path.resolve():
        raise KavaError(
            f"{file} is a symbolic link out of the store's folder. Put a copy or a hard link in "
            "its place (with DVC: set cache.type to reflink,hardlink,copy and run "
            "`dvc checkout --relink`)."
        )


def _check_version(file: StorePath, found: Any) -> None:
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise KavaError(f"{file} has no valid format_version (found {found!r:.60}). {REMAKE}")
    if found > FORMAT_VERSION:
        raise KavaError(
            f"{file} is of format version {found!s:.40}, this program reads version "
            f"{FORMAT_VERSION}. "
            "Update the program, or make the store with this version of it."
        )
    if found < FORMAT_VERSION:
        raise KavaError(
            f"{file} is of format version {found!s:.40}, this program reads version "
            f"{FORMAT_VERSION}. "
            "Run the stage that makes the store again."
        )


def _check_name(file: StorePath, name: str) -> None:
    if not PLAIN_NAME.fullmatch(name):
        raise KavaError(
            f"{file} names the file {name!r:.100}; only plain names inside the store's folder are "
            f"allowed. Do not trust this store. {REMAKE}"
        )
