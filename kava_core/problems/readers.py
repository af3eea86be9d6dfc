"""Rows by split: from JSONL, JSON, CSV, Parquet or text files, or from the Hub.

All give the same thing, rows that know where they stand, one at a time, so that all that follows
is one path. Text is UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kava_core.artefacts import file_digest
from kava_core.errors import KavaError
from kava_core.problems.hub import commit_of, read_dataset
from kava_core.problems.rows import BadRow, Row
from kava_core.problems.splits import SPLIT_NAMES

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Location:
    """Where a source is read from.

    `path` is a file (then all its rows are "train"), a folder with `train`, `validation` (or
    `valid`, `dev`) and `test` files, or a dataset on the Hub ("owner/name"). A folder without such
    files is taken for a dataset that was downloaded from the Hub. `hub_config` names a dataset's
    configuration, `revision` the version of one on the Hub (a branch, a tag or a commit).
    """

    path: str
    hub_config: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split, read as they are asked for, and what they are read from.

    What is no row (a line that is not JSON) is given in its place as a `BadRow`, and reading goes
    on. They are read from either `files` (by their names in the location) or the `dataset` on the
    Hub, whose `commit` is None where the Hub did not say.
    """

    rows: Iterator[Row | BadRow]
    files: Mapping[str, Path] = field(default_factory=dict)
    dataset: str | None = None
    commit: str | None = None

    def origin(self) -> dict[str, Any]:
        """What was read, ready for JSON: each file's SHA-256, or dataset and commit."""
        if self.dataset is not None:
            return {"dataset": self.dataset, "commit": self.commit}
        return {"files": {name: file_digest(path) for name, path in self.files.items()}}


def read_jsonl(path: Path) -> Iterator[Row | BadRow]:
    """The rows of a JSONL file, one object per line; blank lines are passed over.

    A line (counted from 1) that is not a JSON object is a `BadRow`.
    """
    number = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if raw.strip():
                place = f"{path}:{line}"
                try:
                    yield _row(_json(raw, place), place, number)
                except BadRow as bad:
                    yield bad
                number += 1


def read_json(path: Path) -> Iterator[Row | BadRow]:
    """The objects of a JSON list, or of a file that is JSONL under another name.

    A list is held in memory while it is read; places name its items, counted from 1. An item that
    is no object is a `BadRow`; KavaError if the list itself cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if start[:1] != b"[":
        yield from read_jsonl(path)
        return
    for number, item in enumerate(_json(path.read_bytes(), str(path))):
        yield _row(item, f"{path}, item {number + 1}", number)


def read_csv(path: Path) -> Iterator[Row | BadRow]:
    """The rows of a CSV file with a header; every field is text.

    A row with other fields than the header says is a `BadRow`. KavaError if the rest cannot be
    read either: it has no header, a quote is never closed, or it is not UTF-8.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = next(reader, None)
            if not names or len(set(names)) != len(names):
                raise KavaError(
                    f"{path}:1: expected a header of different names, found {names!r:.200}."
                )
            number = 0
            for values in reader:
                place = f"{path}:{reader.line_num}"
                if not values:
                    continue
                if len(values) == len(names):
                    yield Row(dict(zip(names, values, strict=True)), place, number)
                else:
                    expected = f"{len(names)} fields ({', '.join(names):.200})"
                    yield BadRow(place, expected, str(len(values)))
                number += 1
        except csv.Error as error:
            raise KavaError(
                f"{path}:{reader.line_num}: expected CSV, found {error}. Mend the row."
            ) from None
        except UnicodeDecodeError as error:
            raise KavaError(f"{path}: expected UTF-8, found {error}. Mend the file.") from None


def read_parquet(path: Path) -> Iterator[Row | BadRow]:
    """The rows of a Parquet file, counted from 0; KavaError if it is damaged."""
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    yield Row(fields, f"{path}, row {number}", number)
                    number += 1
    except pa.ArrowException as error:
        raise KavaError(f"{path}: expected Parquet, found {error}. Get the file again.") from None


def read_text(path: Path) -> Iterator[Row | BadRow]:
    """The lines of a text file, rows with the one field `text`; blank ones are passed over.

    A line that is not UTF-8 is a `BadRow`.
    """
    number = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            place = f"{path}:{line}"
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                yield BadRow(place, "UTF-8", str(error), "Mend the line.")
                number += 1
                continue
            if text:
                yield Row({"text": text}, place, number)
                number += 1


_READERS: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
}


def read_source(location: Location, hub_config: str | None = None) -> dict[str, SplitRows]:
    """The rows of each split ("train", "validation", "test") that a location has.

    `hub_config` is the source's own configuration, for a location that names none. KavaError if
    nothing is there, or if it is files and names a configuration or a revision of a dataset.
    """
    path = Path(location.path).expanduser()
    local = path.is_file() or path.is_dir()
    if local and location.revision is not None:
        raise KavaError(
            f"Expected `revision` beside a dataset on the Hub, found {location.revision!r} beside "
            f"the local path {location.path}. Remove `revision`, or correct `path`."
        )
    files = {"train": path} if path.is_file() else _split_files(path) if path.is_dir() else {}
    if files:
        if location.hub_config is not None:
            raise KavaError(
                f"Expected `hub_config` beside a dataset, found {location.hub_config!r} beside "
                f"the files of {location.path}. Remove `hub_config`, or correct `path`."
            )
        return {
            split: SplitRows(_read_file(file), {file.name: file}) for split, file in files.items()
        }
    config = location.hub_config or hub_config
    if local:
        inside = {
            str(file.relative_to(path)): file
            for file in sorted(path.rglob("*"))
            if file.is_file() and not any(part[0] == "." for part in file.relative_to(path).parts)
        }
        found = read_dataset(str(path), config)
        return {split: SplitRows(rows, inside) for split, rows in found.items()}
    name = location.path
    if not _HUB_NAME.fullmatch(name) or name.startswith(".") or path.suffix in _READERS:
        raise KavaError(
            f"{name!r} is neither a file, a folder nor a Hub name such as owner/name. "
            "Correct the path."
        )
    commit = commit_of(name, location.revision)
    # By its commit where that is known: what is recorded is then what was read.
    found = read_dataset(name, config, commit or location.revision)
    return {split: SplitRows(rows, dataset=name, commit=commit) for split, rows in found.items()}


def _split_files(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for split, names in SPLIT_NAMES.items():
        found = [
            file
            for file in sorted(folder.iterdir())
            if file.stem in names and file.suffix in _READERS and file.is_file()
        ]
        if len(found) > 1:
            raise KavaError(
                f"{folder}: expected one file of {split} problems, found "
                f"{', '.join(file.name for file in found)}. Keep one."
            )
        if found:
            files[split] = found[0]
    return files


def _read_file(path: Path) -> Iterator[Row | BadRow]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise KavaError(
            f"{path}: expected a file ending in {', '.join(_READERS)}, found "
            f"{path.suffix or 'no ending'}. Convert it, or rename it."
        )
    return readable(path, reader(path))


def readable(path: Path, rows: Iterator[Row | BadRow]) -> Iterator[Row | BadRow]:
    """The rows of a file; KavaError where it cannot be read."""
    try:
        yield from rows
    except OSError as error:
        raise KavaError(f"{path} cannot be read: {error.strerror}. Correct the path.") from None


def _json(raw: bytes, place: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        # Of a number with thousands of digits it goes on with what a programmer could do.
        found = str(error).partition(";")[0]
        raise BadRow(place, "JSON", found, "Mend the line.") from None


def _row(value: Any, place: str, number: int) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(value, place, number)
    return BadRow(place, "a JSON object", type(value).__name__, "Mend the line.")
