"""Rows by split: from JSONL, JSON, CSV, Parquet or text files, or from the Hub.

All give the same thing, rows that know where they stand, one at a time, so that all that follows
is one path. Text is UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kava_core.artefacts import file_digest
from kava_core.errors import KavaError
from kava_core.problems.formats import READERS, read_file
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
            split: SplitRows(read_file(file), {file.name: file}) for split, file in files.items()
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
    if not _HUB_NAME.fullmatch(name) or name.startswith(".") or path.suffix in READERS:
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
            if file.stem in names and file.suffix in READERS and file.is_file()
        ]
        if len(found) > 1:
            raise KavaError(
                f"{folder}: expected one file of {split} problems, found "
                f"{', '.join(file.name for file in found)}. Keep one."
            )
        if found:
            files[split] = found[0]
    return files
