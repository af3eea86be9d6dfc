"""The Parquet file of problem records.

It has one row per problem with the columns `id`, `question`, `steps` (a list of strings), `answer`,
`source` and `topic`. Everything read from a file is checked here, so that the code behind it may
trust what it gets.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.parquet as pq

from kava_core.artefacts import atomic_path, make_folders
from kava_core.distinct import Distinct
from kava_core.errors import KavaError
from kava_core.problems.records import Problem

_GROUP = 65_536  # rows that are compressed together
_PART = 1_024  # of them, that are decoded at once
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


def save_problems(path: Path, problems: Iterable[Problem], *, steps: bool = True) -> None:
    """Write problems to a Parquet file, atomically; equal problems give equal bytes.

    problems: gone through twice, and a row group of them is held.
    KavaError if a problem is not one that `load_problems` would accept.
    """
    _check(problems, path, steps)
    make_folders(path.parent)
    rest = iter(problems)
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, _SCHEMA, compression="zstd") as writer,
    ):
        group = list(islice(rest, _GROUP))
        while True:  # none: the columns
            writer.write_table(_table(group), row_group_size=_GROUP)
            if not (group := list(islice(rest, _GROUP))):
                return


def _table(problems: Sequence[Problem]) -> pa.Table:
    columns = {
        name: [getattr(problem, name) for problem in problems]
        for name in ("id", "question", "answer", "source", "topic")
    }
    columns["steps"] = [list(problem.steps) for problem in problems]
    return pa.table(columns, schema=_SCHEMA)


class ProblemFile(Sequence[Problem]):
    """The problems of a file written by `save_problems`, decoded as they are asked for.

    No more than a small part of a row group is held, however many there are; a group is decoded
    from its beginning, so that rows in their order cost least.

    KavaError, naming the file and the row (counted from 0), if it is missing or damaged, lacks a
    column, or has nothing where something must be.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise KavaError(f"{path} is missing. Run the stage `prepare`, or correct the path.")
        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from None
        schema = self._file.schema_arrow
        for field in _SCHEMA:
            found = schema.field(field.name).type if field.name in schema.names else None
            if found != field.type:
                raise KavaError(
                    f"{path}: expected a column `{field.name}` of type {field.type}, "
                    f"found {found or 'no such column'}. Make the file again with `prepare`."
                )
        groups = range(self._file.num_row_groups)
        rows = [self._file.metadata.row_group(k).num_rows for k in groups]
        self._starts = [0, *accumulate(rows)]
        self._parts: Iterator[tuple[int, pa.RecordBatch]] = iter(())  # from `_held` on
        self._held: tuple[int, pa.RecordBatch] | None = None  # with its first row

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            first, last, step = index.indices(len(self))
            if step == 1:
                return list(self._rows(first, last))
            return [self[row] for row in range(first, last, step)]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return next(self._rows(index, index + 1))

    def __iter__(self) -> Iterator[Problem]:
        return self._rows(0, len(self))

    def _rows(self, first: int, last: int) -> Iterator[Problem]:
        while first < last:
            begin, part = self._part(first)
            end = min(begin + part.num_rows, last)
            for row, values in enumerate(part.slice(first - begin, end - first).to_pylist(), first):
                yield self._problem(row, values)
            first = end

    def _part(self, row: int) -> tuple[int, pa.RecordBatch]:
        """What is decoded together with a row, and its first row."""
        group = bisect_right(self._starts, row) - 1
        if self._held is None or not self._starts[group] <= self._held[0] <= row:
            self._held = None  # let go of it first
            self._parts = self._decoded(group)
        try:
            while self._held is None or row >= self._held[0] + self._held[1].num_rows:
                self._held = next(self._parts)
        except (pa.ArrowException, OSError) as error:
            self._held = None
            raise _unreadable(self.path, error) from None
        return self._held

    def _decoded(self, group: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        begin = self._starts[group]
        columns = [field.name for field in _SCHEMA]
        for part in self._file.iter_batches(_PART, row_groups=[group], columns=columns):
            yield begin, part
            begin += part.num_rows

    def _problem(self, row: int, values: dict[str, Any]) -> Problem:
        missing = [name for name, value in values.items() if value is None]
        if missing:
            raise KavaError(f"{self.path}, row {row}: `{missing[0]}` is null. Make the file again.")
        if None in values["steps"]:
            raise KavaError(f"{self.path}, row {row}: a step is null. Make the file again.")
        return Problem(**{**values, "steps": tuple(values["steps"])})


def open_problem_file(path: Path) -> ProblemFile:
    """A file of problems that are taught, read through once; KavaErrors are those of
    `load_problems`."""
    problems = ProblemFile(path)
    _check(problems, path, steps=True)
    return problems


def load_problems(path: Path, *, steps: bool = True) -> list[Problem]:
    """Read and check a file written by `save_problems`.

    steps: whether every problem must have some, as those must that are taught. KavaError, naming
    the file and the row (counted from 0), if it is missing or damaged, lacks a column, repeats an
    id, or holds a problem without id, question, steps or answer.
    """
    problems = list(ProblemFile(path))
    _check(problems, path, steps)
    return problems


def _unreadable(path: Path, error: Exception) -> KavaError:
    return KavaError(f"{path} is not a readable Parquet file ({error}). Make it again.")


def _check(problems: Iterable[Problem], path: Path, steps: bool) -> None:
    ids = Distinct()
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
        ids.add((problem.id,))
    again = ids.repeated(problem.id for problem in problems)
    if again is not None:
        first, row = [row for row, problem in enumerate(problems) if problem.id == again][:2]
        raise KavaError(f"{path}, row {row}: the id {again!r} is that of row {first} too.")
