"""Rows of a named source: from JSONL files, or from the Hub.

Both give the same thing, rows that know where they stand, so that all that follows is one path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kava_core.errors import KavaError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


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
            found = f"{type(value).__name__} {value!r}" if name in self.fields else "no such field"
            raise KavaError(
                f"{self.place}: expected a text in `{name}`, found {found}. Mend the row."
            )
        return value


def read_jsonl(path: Path) -> Iterator[Row]:
    """The rows of a JSONL file, one object per line; blank lines are passed over.

    KavaError, naming file and line (counted from 1), for a line that is not a JSON object.
    """
    try:
        with path.open("rb") as file:
            number = 0
            for line, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                place = f"{path}:{line}"
                try:
                    fields = json.loads(raw)
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    raise KavaError(
                        f"{place}: expected JSON, found {error}. Mend the line."
                    ) from None
                if not isinstance(fields, dict):
                    raise KavaError(
                        f"{place}: expected a JSON object, found {type(fields).__name__}. "
                        "Mend the line."
                    )
                yield Row(fields, place, number)
                number += 1
    except OSError as error:
        raise KavaError(f"{path} cannot be read: {error.strerror}. Correct the path.") from None


def read_source(location: str, hub_config: str | None = None) -> dict[str, Iterator[Row]]:
    """The rows of each split ("train", "test") that a source has.

    `location` is a JSONL file (then all its rows are "train"), a folder with `train.jsonl` and
    perhaps `test.jsonl`, or the name of a dataset on the Hub ("owner/name"), of which `hub_config`
    names the configuration. KavaError if it is none of these.
    """
    path = Path(location).expanduser()
    if path.is_file():
        return {"train": read_jsonl(path)}
    if path.is_dir():
        if not (path / "train.jsonl").is_file():
            raise KavaError(
                f"Expected train.jsonl (and test.jsonl) in the folder {path}, found none. "
                "Correct the path, or name the file itself."
            )
        names = [name for name in ("train", "test") if (path / f"{name}.jsonl").is_file()]
        return {name: read_jsonl(path / f"{name}.jsonl") for name in names}
    if not _HUB_NAME.fullmatch(location) or location.startswith(".") or path.suffix == ".jsonl":
        raise KavaError(
            f"{location!r} is neither a file, a folder nor a Hub name such as owner/name. "
            "Correct the path."
        )
    return _read_hub(location, hub_config)


def _read_hub(name: str, config: str | None) -> dict[str, Iterator[Row]]:
    from datasets import load_dataset

    try:
        splits = load_dataset(name, config)
    except Exception as error:  # the library raises what its transports raise: no common class
        raise KavaError(
            f"{name!r} is no local path, and loading it from the Hub failed "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'}"
            "). Correct the path, or try again with a network."
        ) from None
    if "train" not in splits:
        raise KavaError(f"Expected a split `train` in {name!r}, found {sorted(splits)}.")

    def rows(split: str) -> Iterator[Row]:
        for number, fields in enumerate(splits[split]):
            yield Row(dict(fields), f"{name} [{split}] row {number}", number)

    return {split: rows(split) for split in ("train", "test") if split in splits}
