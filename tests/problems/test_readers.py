"""Rows from any file, and from a dataset as the Hub has it."""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kava_core.errors import KavaError
from kava_core.problems.readers import Location, read_source
from kava_core.problems.rows import BadRow, Row


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


def read(path: Path, split: str = "train") -> Iterator[Row]:
    """The rows of a file that is to have no bad ones."""
    for row in read_source(Location(str(path)))[split].rows:
        if isinstance(row, BadRow):
            raise row
        yield row


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
    found = list(read(path))
    assert [row.fields for row in found] == written
    assert [row.number for row in found] == list(range(len(written)))


def test_a_folder_has_its_splits_by_name(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"a": "1"}])
    table(tmp_path / "dev.parquet", [{"a": "2"}])
    (tmp_path / "test.txt").write_text("one\n\ntwo\n")
    (tmp_path / "README.md").write_text("not a split")
    found = {split: list(r.rows) for split, r in read_source(Location(str(tmp_path))).items()}
    assert [row.fields for row in found["test"]] == [{"text": "one"}, {"text": "two"}]
    assert found["test"][1].place.endswith("test.txt:3")
    assert [len(rows) for rows in found.values()] == [1, 1, 2]
    jsonl(tmp_path / "valid.jsonl", [{"a": "3"}])
    with pytest.raises(KavaError, match=r"one file of validation.*dev.parquet, valid.jsonl"):
        read_source(Location(str(tmp_path)))


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"a": "1"}\nbroken\n')
    found = read(tmp_path)
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
    found = {split: list(r.rows) for split, r in read_source(Location(str(tmp_path))).items()}
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
        list(read(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "bad"),
    [
        ("train.jsonl", b'{"a": 1}\n{"a": \n[1]\n\n{"a": 2}\n', ["JSON", "a JSON object"]),
        (
            "train.jsonl",
            b'{"a": 1}\n{"a": 1' + b"0" * 5000 + b"}\n" + b"[" * 100_000 + b'\n{"a": 2}\n',
            ["JSON"] * 2,
        ),
        ("train.json", b'[{"a": 1}, 7, "x", {"a": 2}]', ["a JSON object"] * 2),
        ("train.csv", b"a,b\n1,2\n3\n4,5,6\n7,8\n", ["2 fields (a, b)"] * 2),
        ("train.txt", b"one\n\xff\n\xfe\ntwo\n", ["UTF-8"] * 2),
    ],
)
def test_reading_goes_on_behind_a_line_that_is_no_row(
    tmp_path: Path, name: str, content: bytes, bad: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    found = list(read_source(Location(str(tmp_path / name)))["train"].rows)
    assert [row.expected for row in found if isinstance(row, BadRow)] == bad
    rows = [row for row in found if isinstance(row, Row)]
    assert [row.number for row in rows] == [0, 3]  # as if the others were mended


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.jsonl", b'{"text": "one"}\n{"text": "two"}\n'),
        ("train.json", b' [{"text": "one"}, {"text": "two"}]'),
        ("train.csv", b'"text"\none\ntwo\n'),
        ("train.txt", b"one\ntwo\n"),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, content: bytes) -> None:
    """Excel's "CSV UTF-8" begins with one."""
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert [row.fields for row in read(tmp_path / name)] == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize("header", ["{}", "{},a0"], ids=["a wrong row", "a name twice"])
def test_a_header_of_many_names_is_not_echoed_whole(tmp_path: Path, header: str) -> None:
    names = ",".join(f"a{i}" for i in range(100_001))
    (tmp_path / "train.csv").write_text(f"{header.format(names)}\n1,2\n")
    with pytest.raises(KavaError, match=r"train\.csv:[12]: expected") as raised:
        list(read(tmp_path / "train.csv"))
    assert len(str(raised.value)) < len(str(tmp_path)) + 400


def test_what_is_no_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for location, words in (
        (str(tmp_path / "none.jsonl"), "neither a file, a folder nor a Hub name"),
        ("../none", "neither a file, a folder nor a Hub name"),
        ("none/train.parquet", "neither a file, a folder nor a Hub name"),
        (str(tmp_path), "Expected train.jsonl"),
    ):
        with pytest.raises(KavaError, match=words):
            read_source(Location(location))


def test_what_was_read_is_named_by_its_content(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"a": "1"}, {"a": "2"}])
    (tmp_path / "test.txt").write_text("one\n")
    found = read_source(Location(str(tmp_path)))
    before = {split: rows.origin() for split, rows in found.items()}
    digest = hashlib.sha256(b"one\n").hexdigest()
    assert before["test"] == {"files": {"test.txt": digest}}
    assert read_source(Location(str(tmp_path / "test.txt")))["train"].origin() == before["test"]
    jsonl(tmp_path / "train.jsonl", [{"a": "1"}])  # cut short
    after = {split: rows.origin() for split, rows in read_source(Location(str(tmp_path))).items()}
    assert after["train"] != before["train"]
    assert after["test"] == before["test"]


def test_a_downloaded_dataset_is_named_by_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/download.json").write_text("{}")
    table(tmp_path / "data/train-00000-of-00001.parquet", [{"question": "a"}])
    origin = read_source(Location(str(tmp_path)))["train"].origin()
    assert list(origin["files"]) == ["data/train-00000-of-00001.parquet"]


@pytest.mark.parametrize("place", ["file", "folder", "dataset"])
def test_a_revision_of_what_is_not_on_the_hub_is_refused(tmp_path: Path, place: str) -> None:
    jsonl(tmp_path / ("rows.jsonl" if place == "dataset" else "train.jsonl"), [{"a": "1"}])
    path = str(tmp_path / "train.jsonl" if place == "file" else tmp_path)
    with pytest.raises(KavaError, match=r"found 'main' beside the local path .* Remove `revision`"):
        read_source(Location(path, revision="main"))


def test_a_configuration_of_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"a": "1"}])
    for path in (tmp_path, tmp_path / "train.jsonl"):
        with pytest.raises(KavaError, match=r"found 'main' beside the files .*`hub_config`"):
            read_source(Location(str(path), hub_config="main"))
        # A source's own configuration is for the Hub, and of no concern to files.
        assert len(list(read_source(Location(str(path)), "main")["train"].rows)) == 1
