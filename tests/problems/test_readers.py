"""Rows from any file, and from a dataset as the Hub has it."""

import csv
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kava_core.problems.files import plain_number, read_source

from kava_core.errors import KavaError


def jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")


def json_list(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def table(path: Path, rows: list[dict[str, str]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


def comma_separated(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


WRITERS: dict[str, Callable[[Path, list[dict[str, str]]], None]] = {
    ".jsonl": jsonl,
    ".json": json_list,
    ".parquet": table,
    ".csv": comma_separated,
}
# A Unicode line end within a text is no line end of a file, and a lone surrogate is no text.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=12)
rows = st.lists(st.fixed_dictionaries({"question": texts, "answer, n": texts}), min_size=1)


@settings(max_examples=40, deadline=None)
@given(rows, st.sampled_from(sorted(WRITERS)))
def test_every_kind_of_file_gives_the_rows_that_were_written(
    tmp_path_factory: pytest.TempPathFactory, written: list[dict[str, str]], ending: str
) -> None:
    path = tmp_path_factory.mktemp("files") / f"train{ending}"
    WRITERS[ending](path, written)
    found = list(read_source(str(path))["train"])
    assert [row.fields for row in found] == written
    assert [row.number for row in found] == list(range(len(written)))


def test_a_folder_has_its_splits_by_name(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"a": "1"}])
    table(tmp_path / "dev.parquet", [{"a": "2"}])
    (tmp_path / "test.txt").write_text("one\n\ntwo\n")
    (tmp_path / "README.md").write_text("not a split")
    found = {split: list(rows) for split, rows in read_source(str(tmp_path)).items()}
    assert [row.fields for row in found["test"]] == [{"text": "one"}, {"text": "two"}]
    assert found["test"][1].place.endswith("test.txt:3")
    assert [len(rows) for rows in found.values()] == [1, 1, 2]
    jsonl(tmp_path / "valid.jsonl", [{"a": "3"}])
    with pytest.raises(KavaError, match=r"one file of validation.*dev.parquet, valid.jsonl"):
        read_source(str(tmp_path))


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"a": "1"}\nbroken\n')
    found = read_source(str(tmp_path))["train"]
    assert next(found).fields == {"a": "1"}
    with pytest.raises(KavaError, match=r"train.jsonl:2: expected JSON"):
        next(found)


def test_a_dataset_as_the_hub_has_it_is_streamed_through_the_same_library(tmp_path: Path) -> None:
    """A downloaded dataset takes the way of a Hub name; only the network is not tried."""
    (tmp_path / "data").mkdir()
    for split, questions in (("train", ["a", "b"]), ("test", ["c"])):
        table(
            tmp_path / f"data/{split}-00000-of-00001.parquet", [{"question": q} for q in questions]
        )
    found = {split: list(rows) for split, rows in read_source(str(tmp_path)).items()}
    assert [row.fields for row in found["train"]] == [{"question": "a"}, {"question": "b"}]
    assert found["train"][1].place == f"{tmp_path} [train] row 1"
    assert [row.fields for row in found["test"]] == [{"question": "c"}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.jsonl", b'{"question": "\xff"}\n', r"train.jsonl:1: expected JSON"),
        ("train.json", b'[{"a": 1}, 2]', r"train.json, item 2: expected a JSON object, found int"),
        ("train.json", b"[1", r"train.json: expected JSON"),
        ("train.csv", b"a,b\n1,2\n3\n", r"train.csv:3: expected 2 fields \(a, b\), found 1"),
        ("train.csv", b'a,b\n1,"2\n', r"train.csv:2: expected CSV"),
        ("train.csv", b"a,b\n1,\xff\n", r"train.csv: expected UTF-8"),
        ("train.csv", b"", r"train.csv:1: expected a header"),
        ("train.parquet", b"not parquet", r"train.parquet: expected Parquet"),
        ("train.txt", b"one\n\xff\n", r"train.txt:2: expected UTF-8"),
        ("train.tsv", b"a\tb\n", r"ending in .jsonl.*found .tsv"),
        ("none", b"", r"found no ending"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(KavaError, match=words):
        list(read_source(str(tmp_path / name))["train"])


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    for location, words in (
        (str(tmp_path / "none.jsonl"), "neither a file, a folder nor a Hub name"),
        ("../none", "neither a file, a folder nor a Hub name"),
        ("none/train.parquet", "neither a file, a folder nor a Hub name"),
        (str(tmp_path), "Expected train.jsonl"),
    ):
        with pytest.raises(KavaError, match=words):
            read_source(location)


@given(st.one_of(st.integers(-(10**18), 10**18), st.floats(allow_nan=False, allow_infinity=False)))
def test_a_number_is_written_in_digits_and_keeps_its_value(number: Any) -> None:
    text = plain_number(number)
    assert set(text) <= set("-0123456789.")
    whole = number == int(number)  # then exactly the float, otherwise its shortest name
    assert Fraction(text) == Fraction(number if whole else str(number))


def test_numbers_of_rows_are_texts(tmp_path: Path) -> None:
    def read(value: Any) -> str:
        (tmp_path / "train.jsonl").write_text(json.dumps({"answer": value}))
        return next(read_source(str(tmp_path))["train"]).number_text("answer")

    cases = [(12.0, "12"), (-3, "-3"), (0.5, "0.5"), (1e21, "1" + "0" * 21), (None, ""), (" ", "")]
    assert [read(value) for value, _ in cases] == [text for _, text in cases]
    for value in (True, float("nan"), float("inf"), [1], {}):
        with pytest.raises(KavaError, match=r"train.jsonl:1: expected a text or a number"):
            read(value)
