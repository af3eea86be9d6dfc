"""Content hashes, atomic files, and the working folders that survive a kill.

An artefact is a folder that describes itself. It is built under `data/.work/<fingerprint>/`, where
the fingerprint names the settings and inputs that determine it, and renamed into place once it is
complete: DVC deletes a stage's outputs before it runs the stage, so unfinished work must not live
there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kava_core.errors import KavaError
from kava_core.versions import VERSIONS

WORK = ".work"


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


def read_text(path: Path) -> str:
    """The text in `path`; KavaError if the file is missing or is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise KavaError(f"{path} is missing. Run the stage that makes it.") from None
    except UnicodeDecodeError as error:
        raise KavaError(f"{path} is not valid text ({error}). Make it again.") from None


def read_json(path: Path) -> Any:
    """The JSON in `path`; KavaError if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise KavaError(f"{path} is missing. Run the stage that makes it.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise KavaError(f"{path} is not valid JSON ({error}). Make it again.") from None


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(
            json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
        )


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


def sync(path: Path) -> None:
    """fsync a file, or a directory (so that a rename in it is durable)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def work_folder(output: Path, stage: str, key: Any) -> Path:
    """The folder where `output` is built: `<data>/.work/<stage>-<fingerprint of key>`.

    `output` is `<data>/<pipeline>/<name…>`, and `key` holds all that determines the artefact's
    content; the same key finds the unfinished work of a killed run. The stage's version is part of
    it: what one version left unfinished another does not continue.
    """
    key = [key, VERSIONS[stage]]
    data = next(
        (p for p in output.absolute().parents if p.name == "data"), output.absolute().parent
    )
    folder = data / WORK / f"{output.name}-{fingerprint(key)[:24]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def publish(*built: tuple[Path, Path]) -> None:
    """Rename each complete folder to its output, (built, output), replacing what was there.

    An output is never a mixture: the old folder is moved aside whole before the new one takes its
    name. The built folders lie in one folder of `work_folder`, which goes with all else it holds
    (checkpoints).
    """
    for folder, output in built:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = folder.with_name(f"{folder.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        if output.exists():
            output.replace(aside)
        sync(folder)
        folder.replace(output)
        sync(output.parent)
        shutil.rmtree(aside, ignore_errors=True)
    for work in {folder.parent for folder, _ in built}:
        if work.parent.name == WORK:
            shutil.rmtree(work)
