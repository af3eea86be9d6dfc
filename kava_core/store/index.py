"""index.arrow: one row per record, memory-mapped, one record batch per shard."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kava_core.artefacts import atomic_path
from kava_core.distinct import Distinct
from kava_core.errors import KavaError
from kava_core.record import Record
from kava_core.store.layout import INDEX_FILE
from kava_core.store.manifest import REMAKE, Manifest
from kava_core.store.place import Place

TOKENS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in (
            ("id", pa.string()),
            ("shard", pa.int32()),
            ("row", pa.int32()),
            ("n_question", pa.int32()),
            ("n_cot", pa.int32()),
            ("n_answer", pa.int32()),
            ("cot_start", pa.int32()),
            ("question_ids", TOKENS),
            ("cot_ids", TOKENS),
            ("answer_prompt_ids", TOKENS),
            ("answer_ids", TOKENS),
            ("source", pa.string()),
            ("topic", pa.string()),
            ("n_steps", pa.int32()),
            ("step_ends", TOKENS),
            ("results", TOKENS),
        )
    ]
)
TOKEN_COLUMNS = ("question_ids", "cot_ids", "answer_prompt_ids", "answer_ids")
LENGTH_OF = {"n_question": "question_ids", "n_cot": "cot_ids", "n_answer": "answer_ids"}


def index_columns(shard: int, records: Sequence[Record]) -> dict[str, list[Any]]:
    """The index rows of a shard, column by column; KavaError names a record that has no tokens."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for row, record in enumerate(records):
        for name in TOKEN_COLUMNS:
            tokens = [int(token) for token in getattr(record, name)]
            if not tokens:
                raise KavaError(
                    f"record {record.id!r} has no tokens in {name}. Leave it out or mend it: a "
                    "record needs a question, a trace, an answer prompt and an answer."
                )
            columns[name].append(tokens)
        for name in ("id", "source", "topic"):
            columns[name].append(_text(record, name))
        for name, tokens_of in LENGTH_OF.items():
            columns[name].append(len(columns[tokens_of][-1]))
        columns["cot_start"].append(columns["n_question"][-1])
        columns["shard"].append(shard)
        columns["row"].append(row)
        columns["n_steps"].append(int(record.n_steps))
        columns["step_ends"].append(list(record.step_ends))
        columns["results"].append(list(record.results))
    return columns


def _text(record: Record, name: str) -> str:
    text = str(getattr(record, name))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise KavaError(
            f"record {record.id!r} has a {name} that is not valid Unicode. Mend it where the "
            "problems come from."
        ) from None
    return text


def write_index(path: Path, shards: Iterator[dict[str, list[Any]]]) -> None:
    """Write index.arrow from the columns of each shard, in order, one record batch per shard."""
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        for columns in shards:
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=SCHEMA))


class Index:
    """The index of a store, opened (and its checksum checked) when it is first needed.

    Nothing is copied out of the memory map but the rows that are asked for.
    """

    def __init__(self, place: Place, manifest: Manifest) -> None:
        self.path = place.path / INDEX_FILE
        self._place = place
        self._manifest = manifest
        self._starts = [0, *accumulate(manifest.shards)]
        self._reader: pa.ipc.RecordBatchFileReader | None = None
        self._batches: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return self._manifest.records

    def locate(self, i: int) -> tuple[int, int]:
        """Shard and row of record i."""
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of a store of {len(self)}")
        shard = bisect_right(self._starts, i) - 1
        return shard, i - self._starts[shard]

    def record(self, i: int) -> Record:
        """Record i, in the order of the store."""
        shard, row = self.locate(i)
        return self._record(self.shard(shard), row)

    def records(self, shard: int) -> list[Record]:
        """All records of a shard."""
        columns = self.shard(shard)
        return [self._record(columns, row) for row in range(self._manifest.shards[shard])]

    def tokens(self, i: int, column: str) -> np.ndarray:
        """Token ids of record i in `column`, int32, read-only, straight from the memory map."""
        shard, row = self.locate(i)
        offsets, values = self.shard(shard)[column]
        return values[offsets[row] : offsets[row + 1]]

    def column(self, name: str) -> np.ndarray:
        """A whole column of integers (`n_cot`, `n_steps`, …), int32 [records]."""
        return np.concatenate([self.shard(k)[name] for k in range(len(self._manifest.shards))])

    def check(self) -> None:
        """KavaError if any part of the index is damaged, contradicts itself or the manifest, or
        repeats an id."""
        ids, tokens, shards = Distinct(), 0, range(len(self._manifest.shards))
        for shard in shards:
            tokens += int(self.shard(shard)["n_cot"].sum(dtype=np.int64))
            ids.add(self.shard(shard)["id"].to_pylist())
        again = ids.repeated(x for shard in shards for x in self.shard(shard)["id"].to_pylist())
        if again is not None:
            raise KavaError(f"{self.path} has two records {again!r:.100}. {REMAKE}")
        if tokens != self._manifest.trace_tokens:
            raise KavaError(
                f"{self.path} has traces of {tokens} tokens in all, the manifest says "
                f"{self._manifest.trace_tokens}. {REMAKE}"
            )

    def strings(self, name: str) -> list[str]:
        """A whole column of text (`id`, `source`, `topic`)."""
        shards = range(len(self._manifest.shards))
        return [text for k in shards for text in self.shard(k)[name].to_pylist()]

    def shard(self, shard: int) -> dict[str, Any]:
        """Columns of a shard: numbers as arrays, tokens as (offsets, values), text as Arrow."""
        if shard not in self._batches:
            try:
                batch = self._open().get_batch(shard)
                batch.validate(full=True)  # lengths, places and text that a crafted file may fake
                columns = {name: _native(batch.column(name)) for name in SCHEMA.names}
            except (pa.ArrowException, OSError) as error:
                raise KavaError(f"{self.path} cannot be read ({error}). {REMAKE}") from None
            if any(column.null_count for column in batch.columns):
                raise KavaError(f"{self.path} has empty cells in shard {shard}. {REMAKE}")
            self._check(shard, batch.num_rows, columns)
            self._batches[shard] = columns
        return self._batches[shard]

    def _open(self) -> pa.ipc.RecordBatchFileReader:
        if self._reader is None:
            manifest = self._manifest
            # Its end is looked at first: a file of many empty gigabytes is not read through.
            reader, _ = self._place.opened(
                manifest, INDEX_FILE, self._reading, self._reading, checksums=True
            )
            if not reader.schema.equals(SCHEMA):
                raise KavaError(f"{self.path} has other columns than the format says. {REMAKE}")
            if reader.num_record_batches != len(manifest.shards):
                raise KavaError(
                    f"{self.path} has {reader.num_record_batches} batches, the manifest has "
                    f"{len(manifest.shards)} shards. {REMAKE}"
                )
            self._reader = reader
        return self._reader

    def _reading(self, file: Path) -> pa.ipc.RecordBatchFileReader:
        try:
            return pa.ipc.open_file(pa.memory_map(str(file)))
        except (pa.ArrowException, OSError) as error:
            raise KavaError(f"{self.path} cannot be read ({error}). {REMAKE}") from None

    def _check(self, shard: int, found: int, columns: dict[str, Any]) -> None:
        """The rows of a shard agree with the manifest and with themselves."""
        expected = self._manifest.shards[shard]
        if found != expected:
            raise KavaError(
                f"{self.path} has {found} rows for shard {shard}, the manifest says {expected}. "
                f"{REMAKE}"
            )
        right = (columns["shard"] == shard).all() and (columns["row"] == np.arange(found)).all()
        for name, tokens in LENGTH_OF.items():
            right &= (np.diff(columns[tokens][0]) == columns[name]).all()
        right &= (columns["cot_start"] == columns["n_question"]).all()
        right &= all((np.diff(columns[name][0]) > 0).all() for name in TOKEN_COLUMNS)
        right &= _ascend(columns["step_ends"], 1, columns["n_cot"], to_the_end=True)
        right &= _ascend(columns["results"], 0, columns["n_cot"] - 1, to_the_end=False)
        if not right:
            raise KavaError(f"{self.path} contradicts itself in shard {shard}. {REMAKE}")

    @staticmethod
    def _record(columns: dict[str, Any], row: int) -> Record:
        def tokens(name: str) -> list[int]:
            offsets, values = columns[name]
            return values[offsets[row] : offsets[row + 1]].tolist()

        return Record(
            id=columns["id"][row].as_py(),
            question_ids=tokens("question_ids"),
            cot_ids=tokens("cot_ids"),
            answer_prompt_ids=tokens("answer_prompt_ids"),
            answer_ids=tokens("answer_ids"),
            source=columns["source"][row].as_py(),
            topic=columns["topic"][row].as_py(),
            n_steps=int(columns["n_steps"][row]),
            step_ends=tokens("step_ends"),
            results=tokens("results"),
        )


def _ascend(
    column: tuple[np.ndarray, np.ndarray], least: int, most: np.ndarray, *, to_the_end: bool
) -> bool:
    """Whether the places of each row ascend from `least` to at most `most` (or just there).

    column: offsets [N + 1] and values; most [N]. A row without places is right.
    """
    offsets, values = column
    values = values[offsets[0] : offsets[-1]]
    starts, ends = offsets[:-1] - offsets[0], offsets[1:] - offsets[0]
    some = ends > starts
    inner = np.ones(len(values), dtype=bool)
    inner[starts[some]] = False  # the first of a row follows no other
    rising = (np.diff(values, prepend=0) > 0)[inner].all()
    first, last = values[starts[some]], values[ends[some] - 1]
    bounded = (last == most[some]) if to_the_end else (last <= most[some])
    return bool(rising and (first >= least).all() and bounded.all())


def _native(column: pa.Array) -> Any:
    if pa.types.is_list(column.type):
        return (
            column.offsets.to_numpy(zero_copy_only=True),
            column.values.to_numpy(zero_copy_only=True),
        )
    if pa.types.is_integer(column.type):
        return column.to_numpy(zero_copy_only=True)
    return column
