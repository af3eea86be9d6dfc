"""Rows of a named source: from JSONL, JSON, CSV, Parquet or text files, or from the Hub.

All give the same thing, rows that know where they stand, one at a time, so that all that follows
is one path.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from kava_core.errors import KavaError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# A split by the names that files and datasets give it.
_SPLITS = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Row:
    """One row: its fields, its place for error messages ("train.jsonl:12"), its number from 0."""

    fields: dict[str, Any]
    place: str
    number: int

    def text(self, name: str) -> str:
        """The field `name`; KavaError if it is missing, not a text, or blank."""
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong("a text", name)
        return value

    def number_text(self, name: str) -> str:
        """The field `name` as text, "" if it is blank or null; 12.0 is "12", 1e20 all its digits.

        KavaError if it is missing, or neither a text nor a finite number.
        """
        value = self.fields.get(name)
        if isinstance(value, bool) or name not in self.fields:
            raise self.wrong("a text or a number", name)
        if value is None or isinstance(value, str):
            return " ".join((value or "").split())
        if not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise self.wrong("a text or a number", name)
        return plain_number(value)

    def texts(self, name: str) -> list[str] | str:
        """The field `name`, a text or a list of texts; KavaError if it is anything else."""
        value = self.fields.get(name)
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong("a text or a list of texts", name)
        return value

    def wrong(self, expected: str, name: str) -> KavaError:
        """The error of a field that is not what it should be."""
        value = self.fields.get(name)
        found = f"{type(value).__name__} {value!r:.80}" if name in self.fields else "no such field"
        return KavaError(
            f"{self.place}: expected {expected} in `{name}`, found {found}. Mend the row."
        )


def plain_number(value: float) -> str:
    """A number in digits, without ".0" if it is whole: 12.0 is "12", 1e-7 is "0.0000001"."""
    if value == int(value):
        return str(int(value))
    return f"{Decimal(repr(value)):f}"


def read_jsonl(path: Path) -> Iterator[Row]:
    """The rows of a JSONL file, one object per line; blank lines are passed over.

    KavaError, naming file and line (counted from 1), for a line that is not a JSON object.
    """
    number = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if raw.strip():
                place = f"{path}:{line}"
                yield Row(_object(_json(raw, place), place), place, number)
                number += 1


def read_json(path: Path) -> Iterator[Row]:
    """The objects of a JSON list, or of a file that is JSONL under another name.

    A list is held in memory while it is read; places name its items, counted from 1.
    """
    with path.open("rb") as file:
        start = file.read(4096).lstrip()
    if start[:1] != b"[":
        yield from read_jsonl(path)
        return
    for number, item in enumerate(_json(path.read_bytes(), str(path))):
        place = f"{path}, item {number + 1}"
        yield Row(_object(item, place), place, number)


def read_csv(path: Path) -> Iterator[Row]:
    """The rows of a CSV file with a header; every field is text.

    KavaError, naming file and line, for a row with other fields than the header says.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = next(reader, None)
            if not names or len(set(names)) != len(names):
                raise KavaError(f"{path}:1: expected a header of different names, found {names}.")
            number = 0
            for values in reader:
                place = f"{path}:{reader.line_num}"
                if not values:
                    continue
                if len(values) != len(names):
                    raise KavaError(
                        f"{place}: expected {len(names)} fields ({', '.join(names)}), found "
                        f"{len(values)}. Mend the row."
                    )
                yield Row(dict(zip(names, values, strict=True)), place, number)
                number += 1
        except csv.Error as error:
            raise KavaError(
                f"{path}:{reader.line_num}: expected CSV, found {error}. Mend the row."
            ) from None
        except UnicodeDecodeError as error:
            raise KavaError(f"{path}: expected UTF-8, found {error}. Mend the file.") from None


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file, counted from 0; KavaError if it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    yield Row(fields, f"{path}, row {number}", number)
                    number += 1
    except pa.ArrowException as error:
        raise KavaError(f"{path}: expected Parquet, found {error}. Get the file again.") from None


def read_text(path: Path) -> Iterator[Row]:
    """The lines of a text file, rows with the one field `text`; blank ones are passed over."""
    number = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise KavaError(
                    f"{path}:{line}: expected UTF-8, found {error}. Mend the line."
                ) from None
            if text:
                yield Row({"text": text}, f"{path}:{line}", number)
                number += 1


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
}


def read_source(location: str, hub_config: str | None = None) -> dict[str, Iterator[Row]]:
    """The rows of each split ("train", "validation", "test") that a source has.

    `location` is a file (then all its rows are "train"), a folder with `train`, `validation` (or
    `valid`, `dev`) and `test` files, or a dataset on the Hub ("owner/name"), of which `hub_config`
    names the configuration. A folder without such files is taken for a dataset that was downloaded
    from the Hub. Rows are read as they are asked for. KavaError if it is none of these.
    """
    path = Path(location).expanduser()
    if path.is_file():
        return {"train": _read_file(path)}
    if path.is_dir():
        files = _split_files(path)
        if files:
            return {split: _read_file(file) for split, file in files.items()}
        return _read_dataset(str(path), hub_config)
    if not _HUB_NAME.fullmatch(location) or location.startswith(".") or path.suffix in _READERS:
        raise KavaError(
            f"{location!r} is neither a file, a folder nor a Hub name such as owner/name. "
            "Correct the path."
        )
    return _read_dataset(location, hub_config)


def _split_files(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for split, names in _SPLITS.items():
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


def _read_file(path: Path) -> Iterator[Row]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise KavaError(
            f"{path}: expected a file ending in {', '.join(_READERS)}, found "
            f"{path.suffix or 'no ending'}. Convert it, or rename it."
        )
    return _readable(path, reader(path))


def _readable(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    try:
        yield from rows
    except OSError as error:
        raise KavaError(f"{path} cannot be read: {error.strerror}. Correct the path.") from None


def _read_dataset(name: str, config: str | None) -> dict[str, Iterator[Row]]:
    """What `datasets` reads, streamed: a Hub name, or the folder of a downloaded dataset."""
    from datasets import load_dataset

    def failed(error: Exception) -> KavaError:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        expected = (
            f"Expected train.jsonl (or .json, .csv, .parquet, .txt; and test.…) or a dataset in "
            f"{name}"
            if Path(name).is_dir()
            else f"{name!r} is no local path, and it was looked for on the Hub"
        )
        return KavaError(
            f"{expected}: {type(error).__name__}: {reason}. Correct the path, or try again with a "
            "network."
        )

    def rows(split: str) -> Iterator[Row]:
        number = 0
        try:
            for fields in found[split]:
                yield Row(dict(fields), f"{name} [{split}] row {number}", number)
                number += 1
        except KavaError:
            raise
        except Exception as error:  # transports and file formats fail each in their own way
            raise KavaError(
                f"{name} [{split}] row {number} cannot be read: {type(error).__name__}: {error}. "
                "Try again, or get the dataset again."
            ) from None

    try:
        found = load_dataset(name, config, streaming=True)
    except Exception as error:  # the library raises what its transports raise: no common class
        raise failed(error) from None
    given = {split: [n for n in found if n in names] for split, names in _SPLITS.items()}
    splits = {split: rows(names[0]) for split, names in given.items() if names}
    if not splits:
        raise KavaError(f"{name}: expected splits such as train or test, found {sorted(found)}.")
    return splits


def _json(raw: bytes, place: str) -> Any:
    try:
        return json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise KavaError(f"{place}: expected JSON, found {error}. Mend the line.") from None


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise KavaError(
            f"{place}: expected a JSON object, found {type(value).__name__}. Mend the line."
        )
    return value
