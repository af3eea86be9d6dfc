"""Traces of many problems in a file that is mapped: memory does not grow with their number.

An Arrow IPC file with a row for each record and a column for each field of `Record`. It is
unfinished work, made anew by whoever needs it, and no artefact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa

from kava_core.artefacts import atomic_path
from kava_core.problems.traces import PART
from kava_core.record import Record

_TOKENS = ("question_ids", "cot_ids", "answer_prompt_ids", "answer_ids", "step_ends", "results")
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "source", "topic", "answer")),
        ("n_steps", pa.int32()),
        *((name, pa.list_(pa.int32())) for name in _TOKENS),
    ]
)


class EncodedTraces(Sequence[Record]):
    """The traces in a file that `write_traces` wrote; any number of processes may map it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        self._parts = [file.get_batch(k) for k in range(file.num_record_batches)]
        self._length = sum(part.num_rows for part in self._parts)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        number, row = divmod(index % len(self), PART)
        return Record(**self._parts[number].slice(row, 1).to_pylist()[0])

    def counts(self, name: str) -> np.ndarray:
        """[N]: how many tokens the field has in each record."""
        offsets = [part.column(name).offsets.to_numpy() for part in self._parts]
        return np.concatenate([np.diff(each) for each in offsets] or [np.zeros(0, np.int32)])

    def __reduce__(self) -> tuple[type[EncodedTraces], tuple[Path]]:
        return EncodedTraces, (self.path,)  # a process that is spawned maps it anew


def write_traces(path: Path, parts: Iterable[Sequence[Record]]) -> EncodedTraces:
    """parts: of PART records each, but for the last, as `TraceEncoder.encode_parts` gives them."""
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_file(file, _SCHEMA) as writer,
    ):
        for part in parts:
            columns = {name: [getattr(record, name) for record in part] for name in _SCHEMA.names}
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
    return EncodedTraces(path)
