"""The Parquet file of problem records.

It has one row per problem with the columns `id`, `question`, `steps` (a list of strings), `answer`,
`source` and `topic`. Everything read from a file is checked here, so that the code behind it may
trust what it gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kava_core.artefacts import atomic_path
from kava_core.errors import KavaError
from kava_core.problems.records import Problem

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("question", pa.string()),
        ("steps", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("source", pa.string()),
        ("topic", pa.string()),
    ]
)


def save_problems(path: Path, problems: Sequence[Problem], *, steps: bool = True) -> None:
    """Write problems to a Parquet file, atomically; equal problems give equal bytes.

    KavaError if a problem is not one that `load_problems` would accept.
    """
    _check(problems, path, steps)
    columns = {
        name: [getattr(problem, name) for problem in problems]
        for name in ("id", "question", "answer", "source", "topic")
    }
    columns["steps"] = [list(problem.steps) for problem in problems]
    table = pa.table(columns, schema=_SCHEMA)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def load_problems(path: Path, *, steps: bool = True) -> list[Problem]:
    """Read and check a file written by `save_problems`.

    steps: whether every problem must have some, as those must that are taught. KavaError, naming
    the file and the row (counted from 0), if it is missing or damaged, lacks a column, repeats an
    id, or holds a problem without id, question, steps or answer.
    """
    if not path.is_file():
        raise KavaError(f"{path} is missing. Run the stage `prepare`, or correct the path.")
    try:
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise KavaError(
            f"{path} is not a readable Parquet file ({error}). Make it again."
        ) from None
    for field in _SCHEMA:
        found = table.schema.field(field.name).type if field.name in table.column_names else None
        if found != field.type:
            raise KavaError(
                f"{path}: expected a column `{field.name}` of type {field.type}, "
                f"found {found or 'no such column'}. Make the file again with `prepare`."
            )
    columns = {field.name: table.column(field.name).to_pylist() for field in _SCHEMA}
    problems = []
    for row in range(table.num_rows):
        values: dict[str, Any] = {name: column[row] for name, column in columns.items()}
        missing = [name for name, value in values.items() if value is None]
        if missing:
            raise KavaError(f"{path}, row {row}: `{missing[0]}` is null. Make the file again.")
        if None in values["steps"]:
            raise KavaError(f"{path}, row {row}: a step is null. Make the file again.")
        problems.append(Problem(**{**values, "steps": tuple(values["steps"])}))
    _check(problems, path, steps)
    return problems


def _check(problems: Sequence[Problem], path: Path, steps: bool) -> None:
    rows: dict[str, int] = {}
    for row, problem in enumerate(problems):
        for name in ("id", "question", "answer"):
            if not getattr(problem, name).strip():
                raise KavaError(f"{path}, row {row} (id {problem.id!r}): `{name}` is empty.")
        if (steps and not problem.steps) or not all(step.strip() for step in problem.steps):
            least = "at least one step and no empty ones" if steps else "no empty steps"
            raise KavaError(
                f"{path}, row {row} (id {problem.id!r}): expected {least}, found "
                f"{list(problem.steps)}."
            )
        first = rows.setdefault(problem.id, row)
        if first != row:
            raise KavaError(f"{path}, row {row}: the id {problem.id!r} is that of row {first} too.")
