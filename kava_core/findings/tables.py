"""Findings that are many alike: a Parquet file, a row for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from kava_core.errors import KavaError
from kava_core.findings.base import Finding, check_finding

Row = TypeVar("Row", bound=Finding)


def write_table(path: Path, rows: Sequence[Finding]) -> None:
    """Write at least one row; a column for each field."""
    pq.write_table(pa.Table.from_pylist([row.model_dump() for row in rows]), path)


def read_table(kind: type[Row], path: Path, stage: str) -> list[Row]:
    """The rows of `path`; KavaError names path, place and the stage to run again."""
    if not path.is_file():
        raise KavaError(f"{path} is missing. Run `kava {stage}` first.")
    try:
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise KavaError(
            f"{path} is not a readable Parquet file ({error}). Run `kava {stage}` again."
        ) from None
    missing = [name for name in kind.model_fields if name not in table.column_names]
    if missing:
        raise KavaError(f"{path} has no column {missing[0]!r}. Run `kava {stage}` again.")
    rows = table.select(list(kind.model_fields)).to_pylist()
    return check_finding(list[kind], rows, path, stage)  # type: ignore[valid-type]
