"""The problem record: what every source produces, and its Parquet file.

A file of problems has one row per problem with the columns `id`, `question`, `steps` (a list of
strings), `answer`, `source` and `topic`. Everything read from a file is checked here, so that the
code behind it may trust what it gets.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from kava_core.artefacts import atomic_path
from kava_core.errors import KavaError

TraceForm = Literal["equations", "sentences"]

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


@dataclass(frozen=True, slots=True)
class Problem:
    """One word problem with its reasoning.

    `steps` are the sentences or equations of the trace exactly as they are taught, none where a
    test problem has no trace; `answer` is the bare final answer ("42"); `topic` groups problems
    within a `source`.
    """

    id: str
    question: str
    steps: tuple[str, ...]
    answer: str
    source: str
    topic: str


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


def normalise_question(question: str) -> str:
    """The question without what does not make it another one: case, punctuation and spacing."""
    text = unicodedata.normalize("NFKC", question).casefold()
    return " ".join(re.findall(r"\w+", text))


def describe(problems: Iterable[Problem]) -> dict[str, Any]:
    """Counts and length histograms, ready for JSON (all keys are strings).

    `by_steps`, `by_topic` and `by_source` count problems; `question_words` and `trace_words` map a
    number of whitespace-separated words to the number of problems that have it;
    `question_characters` and `trace_characters` are the lengths that limits are set in.
    """
    kept = list(problems)
    characters = {
        "question_characters": [len(problem.question) for problem in kept],
        "trace_characters": [trace_characters(problem.steps) for problem in kept],
    }
    numbers = {
        "by_steps": [len(problem.steps) for problem in kept],
        "question_words": [len(problem.question.split()) for problem in kept],
        "trace_words": [len(" ".join(problem.steps).split()) for problem in kept],
    }
    names = {
        "by_topic": [problem.topic for problem in kept],
        "by_source": [problem.source for problem in kept],
    }
    histograms = {key: Counter(values) for key, values in (numbers | names).items()}
    return {
        "problems": len(kept),
        **{
            key: {str(value): histogram[value] for value in sorted(histogram)}  # type: ignore[type-var]
            for key, histogram in histograms.items()
        },
        **{key: _quantiles(lengths) for key, lengths in characters.items()},
    }


def trace_characters(steps: Sequence[str]) -> int:
    """The length of a trace: the characters of all its steps."""
    return sum(map(len, steps))


def _quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """The least number that so many per cent of `lengths` do not exceed."""
    ordered = sorted(lengths)
    return {
        name: ordered[max(0, math.ceil(share * len(ordered)) - 1)]
        for name, share in (("min", 0.0), ("median", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1))
        if ordered
    }
