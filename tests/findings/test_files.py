"""Findings as files: what is written is read, in its order; what is wrong is named."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kava_core.errors import KavaError
from kava_core.findings.base import Finding, read_finding, write_finding
from kava_core.findings.evaluation import Difference
from kava_core.findings.scores import GroupScore
from kava_core.findings.tables import read_table, write_table

Scores = dict[str, dict[int, GroupScore]]


class Row(Finding):
    name: str
    count: int | None


def test_what_is_written_is_read_in_its_own_order(tmp_path: Path) -> None:
    scores = {"b": {2: GroupScore(exact_match=1.0, n=2), 16: GroupScore(exact_match=9.5, n=1)},
              "a": {4: GroupScore(exact_match=0.0, n=3)}}  # fmt: skip
    path = tmp_path / "made/scores.json"
    write_finding(path, scores)
    found = read_finding(Scores, path, "evaluate")
    assert found == scores
    assert list(found) == ["b", "a"] and list(found["b"]) == [2, 16]
    spaced = path.read_text()
    write_finding(path, scores, spaced=False)
    assert read_finding(Scores, path, "evaluate") == scores
    assert path.read_text() == re.sub(r"\s", "", spaced) + "\n"
    assert [p.name for p in path.parent.iterdir()] == ["scores.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"is missing\. Run `kava evaluate` first"),
        ("[1]", r"top level: .*found \[1\]\. Run `kava evaluate` again"),
        ('{"a": {"2": {"n": 1}}}', "a → 2 → exact_match: Field required"),
        ('{"a": {"2": {"n": 1, "exact_match": 101}}}', "less than or equal to 100, found 101"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_wrong_file_is_named_with_the_place_and_the_stage(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "scores.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(KavaError, match=f"{re.escape(str(path))}.*{message}"):
        read_finding(Scores, path, "evaluate")


def test_keys_of_later_versions_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "row.json").write_text('{"name": "a", "count": null, "new": [1]}')
    assert read_finding(Row, tmp_path / "row.json", "any") == Row(name="a", count=None)


def test_rows_go_into_a_table_and_come_back(tmp_path: Path) -> None:
    rows = [Row(name="a", count=1), Row(name="b", count=None)]
    write_table(tmp_path / "rows.parquet", rows)
    assert read_table(Row, tmp_path / "rows.parquet", "any") == rows


def test_a_wrong_table_is_named_with_the_stage(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    with pytest.raises(KavaError, match=r"is missing\. Run `kava fidelity` first"):
        read_table(Row, path, "fidelity")
    path.write_bytes(b"no table")
    with pytest.raises(KavaError, match="not a readable Parquet file"):
        read_table(Row, path, "fidelity")
    pq.write_table(pa.table({"name": ["a"]}), path)
    with pytest.raises(KavaError, match=r"no column 'count'\. Run `kava fidelity` again"):
        read_table(Row, path, "fidelity")
    pq.write_table(pa.table({"name": [1], "count": [1]}), path)
    with pytest.raises(KavaError, match=r"0 → name: .*found 1\. Run"):
        read_table(Row, path, "fidelity")


def test_a_difference_turned_round_is_the_other_systems() -> None:
    one = Difference(difference=3.0, ci95=(1.0, 5.0), p_value=0.01)
    assert -one == Difference(difference=-3.0, ci95=(-5.0, -1.0), p_value=0.01)
    assert one.clear and (-one).clear
    assert not Difference(difference=0.5, ci95=(-1.0, 2.0), p_value=0.6).clear
