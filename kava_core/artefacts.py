"""Content hashes, atomic files, and the working folders that survive a kill.

An artefact is a folder that describes itself. It is built under `data/.work/<fingerprint>/`, where
the fingerprint names the settings and inputs that determine it, and renamed into place once it is
complete: DVC deletes a stage's outputs before it runs the stage, so unfinished work must not live
there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kava_core.errors import KavaError
from kava_core.versions import VERSIONS

WORK = ".work"
KEPT = ".kept"  # parts of artefacts that are complete, for when they are made again
# In a folder of unfinished work: the stage and the output it is for.
PURPOSE = "purpose.json"
LARGEST_TEXT = 1 << 28  # bytes; none of ours comes near it


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spare spaces, so that equal values have equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_fingerprint(folder: Path, names: list[str]) -> str:
    """One hash over the named files of `folder` (name and content of each)."""
    return fingerprint({name: file_digest(folder / name) for name in sorted(names)})


def tree_fingerprint(folder: Path) -> str:
    """One hash over every file below `folder` (name and content of each)."""
    files = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    return folder_fingerprint(folder, files)


def read_regular(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    """The bytes of `path`, if it is a regular file of at most `largest` bytes; KavaError if not.

    What is no file is never opened: a named pipe would be waited for, a device read without end.
    """
    try:
        if stat.S_ISREG(path.stat().st_mode):
            # It may have been swapped since: opened so, a pipe is not waited for.
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                found = os.fstat(file.fileno())
                if stat.S_ISREG(found.st_mode):
                    if found.st_size > largest:
                        raise KavaError(
                            f"{path} cannot be read: expected at most {largest:,} bytes, found "
                            f"{found.st_size:,}. Make it again."
                        )
                    return file.read(largest)
    except FileNotFoundError:
        raise KavaError(f"{path} is missing. Run the stage that makes it.") from None
    except OSError as error:
        raise KavaError(
            f"{path} cannot be read ({error.strerror}). Check the disk and who may read the file."
        ) from None
    raise KavaError(
        f"{path} cannot be read: expected a file, found a folder, a pipe or a device. Move it away "
        "and make the file again."
    )


def read_text(path: Path) -> str:
    """The text in `path`; KavaError if it is no file, missing or no text."""
    try:
        return read_regular(path).decode()
    except UnicodeDecodeError as error:
        raise KavaError(f"{path} is not valid text ({error}). Make it again.") from None


def read_json(path: Path, largest: int = LARGEST_TEXT) -> Any:
    """The JSON in `path`; KavaError if it is no file, missing, too large or not JSON."""
    return parse_json(read_regular(path, largest), str(path))


def parse_json(content: bytes, path: str) -> Any:
    """The JSON that was read from `path`; KavaError if it is none."""
    try:
        return json.loads(content)
    except RecursionError:
        raise KavaError(f"{path} cannot be read: it is nested too deep. Make it again.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise KavaError(f"{path} is not valid JSON ({error}). Make it again.") from None
    except ValueError:
        raise KavaError(
            f"{path} cannot be read: it has a number of thousands of digits. Make it again."
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    return f"{text}\n".encode()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success fsync it and rename it to `path`.

    A reader sees the old file, the new file or none, never a part of one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """A folder beside `destination`, which must not be there or be empty; it takes that name, with
    all it holds on the disk, once it is complete. What the disk refuses is a KavaError."""
    destination = destination.absolute()
    folder = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    try:
        make_folders(folder)
        yield folder
        sync_tree(folder)
        folder.replace(destination)
        sync(destination.parent)
    except OSError as error:
        raise KavaError(
            f"{destination} cannot be written ({error.strerror}). Free some space on that disk, or "
            "choose a folder that may be written to."
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def disk_errors(path: Path, size: int | None = None) -> Iterator[None]:
    """What the disk refuses while `path` is written, as a KavaError. size: bytes that it takes."""
    try:
        yield
    except OSError as error:
        takes = f"; it takes {size:,} bytes" if size else ""
        raise KavaError(
            f"{path} cannot be written ({error.strerror}{takes}). Free some space on that disk, or "
            "check that the folder may be written to; finished work is kept."
        ) from None


def sync(path: Path) -> None:
    """fsync a file, or a directory (so that a rename in it is durable)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, and it: what a library wrote, it did not sync."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def clear(path: Path) -> None:
    """Remove whatever stands at `path`, if anything does."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folders(folder: Path) -> None:
    """Make `folder` and those above it that are not there; their names are on the disk then."""
    if not folder.is_dir():
        make_folders(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:  # what is there is no folder
            raise NotADirectoryError(
                errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)
            ) from None
        sync(folder.parent)


def ensure_folder(folder: Path) -> Path:
    """`folder`, made if it is not there; a file in its place (a damaged disk leaves such) goes."""
    if not folder.is_dir():
        clear(folder)
        make_folders(folder)
    return folder


def fresh_folder(folder: Path) -> Path:
    """`folder`, empty: what a killed run left of it is worth nothing."""
    clear(folder)
    make_folders(folder)
    return folder


def data_folder(output: Path) -> Path:
    """`<data>` of an output `<data>/<pipeline>/<name…>`."""
    return next(
        (p for p in output.absolute().parents if p.name == "data"), output.absolute().parent
    )


def work_folder(output: Path, stage: str, key: Any) -> Path:
    """The folder where `output` is built: `<data>/.work/<name>-<fingerprint>`.

    `output` is `<data>/<pipeline>/<name…>`, and `key` holds all that determines the artefact's
    content; the same output and key find the unfinished work of a killed run. The stage's version
    is part of the fingerprint: what one version left unfinished another does not continue.
    """
    return _keyed_folder(WORK, output, stage, key)


def kept_folder(output: Path, stage: str, key: Any) -> Path:
    """As `work_folder`, below `<data>/.kept`: what is in it stays when `output` is complete."""
    return _keyed_folder(KEPT, output, stage, key)


def _keyed_folder(where: str, output: Path, stage: str, key: Any) -> Path:
    data = data_folder(output)
    place = output.absolute().relative_to(data).as_posix()
    identity = fingerprint([place, key, VERSIONS[stage]])
    folder = data / where / f"{output.name}-{identity[:24]}"
    with disk_errors(folder):
        ensure_folder(folder)
        if not (folder / PURPOSE).is_file():
            clear(folder / PURPOSE)
            write_json(folder / PURPOSE, {"stage": stage, "output": place})
    return folder


def publish(*built: tuple[Path, Path]) -> None:
    """Rename each complete folder to its output, (built, output), replacing what was there.

    An output is never a mixture, and what is under its name is on the disk: everything is synced,
    the old folder is moved aside whole, the new one takes its name, and only then is the old one
    deleted. The built folders lie in one folder of `work_folder`, which goes with all else it holds
    (checkpoints).

    KavaError, with what was built kept, for a file in an output's place and for an output that is
    on another filesystem than the work.
    """
    for folder, output in built:
        if output.exists() and not output.is_dir():
            raise KavaError(
                f"{output} is in the way: expected a folder or nothing, found a file. Move it "
                "away; what was built is kept, and the same command goes on."
            )
        with disk_errors(output):
            make_folders(output.parent)
            sync_tree(folder)
            aside = folder.with_name(f"{folder.name}.old")
            clear(aside)
            try:
                if output.is_dir():
                    output.replace(aside)
                folder.replace(output)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                raise KavaError(
                    f"{output} is on another filesystem than {folder}, and cannot be replaced "
                    "whole. Put all of the data folder on one filesystem; what was built is kept."
                ) from None
            sync(output.parent)
            clear(aside)
    for work in {folder.parent for folder, _ in built}:
        if work.parent.name == WORK:
            shutil.rmtree(work)
