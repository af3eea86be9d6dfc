"""Rows out of files, by their format."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kava_core.errors import KavaError
from kava_core.problems.rows import BadRow, Row


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


READERS: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
}


def read_file(path: Path) -> Iterator[Row | BadRow]:
    reader = READERS.get(path.suffix)
    if reader is None:
        raise KavaError(
            f"{path}: expected a file ending in {', '.join(READERS)}, found "
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
