"""Problem files: what goes in comes out, and nothing broken gets in."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kava_core.errors import KavaError
from kava_core.problems import parquet
from kava_core.problems.parquet import ProblemFile, load_problems, open_problem_file, save_problems
from kava_core.problems.records import Problem

ONE = Problem("a-1", "How many?", ("<<1+1=2>>", "<<2*2=4>>"), "4", "hand", "none")

texts = st.text(min_size=1, max_size=20).filter(lambda text: text.strip())
problems = st.builds(
    Problem,
    id=texts,
    question=texts,
    steps=st.lists(texts, min_size=1, max_size=4).map(tuple),
    answer=texts,
    source=st.text(max_size=5),
    topic=st.text(max_size=5),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(problems, max_size=5, unique_by=lambda problem: problem.id))
def test_saved_problems_are_loaded_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, records: list[Problem]
) -> None:
    path = tmp_path_factory.mktemp("records") / "problems.parquet"
    save_problems(path, records)
    assert load_problems(path) == records


def test_equal_problems_give_equal_bytes(tmp_path: Path) -> None:
    save_problems(tmp_path / "a.parquet", [ONE])
    save_problems(tmp_path / "b.parquet", [ONE])
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (Problem("a-1", "Other?", ("1",), "1", "", ""), "row 1.*'a-1' is that of row 0"),
        (Problem("a-2", " ", ("1",), "1", "", ""), "row 1.*`question` is empty"),
        (Problem("a-2", "Q?", (), "1", "", ""), "row 1.*at least one step"),
        (Problem("a-2", "Q?", ("1", ""), "1", "", ""), "row 1.*no empty"),
        (Problem("a-2", "Q?", ("1",), "", "", ""), "row 1.*`answer` is empty"),
    ],
)
def test_a_broken_problem_is_refused_with_file_and_row(
    tmp_path: Path, problem: Problem, words: str
) -> None:
    path = tmp_path / "problems.parquet"
    with pytest.raises(KavaError, match=f"problems.parquet, {words}"):
        save_problems(path, [ONE, problem])
    assert not path.exists()
    rows = [
        {name: getattr(p, name) for name in ("id", "question", "answer", "source", "topic")}
        | {"steps": list(p.steps)}
        for p in (ONE, problem)
    ]
    types = pa.schema([("steps", pa.list_(pa.string()))])
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "steps"}
    steps = pa.array([row["steps"] for row in rows], types.field("steps").type)
    pq.write_table(pa.table(columns | {"steps": steps}), path)
    with pytest.raises(KavaError, match=f"problems.parquet, {words}"):
        load_problems(path)


def test_only_a_problem_that_is_taught_needs_steps(tmp_path: Path) -> None:
    path, asked = tmp_path / "test.parquet", Problem("a", "Q?", (), "1", "", "")
    save_problems(path, [asked], steps=False)
    assert load_problems(path, steps=False) == [asked]
    with pytest.raises(KavaError, match="at least one step"):
        load_problems(path)
    with pytest.raises(KavaError, match="expected no empty steps"):
        save_problems(path, [Problem("a", "Q?", (" ",), "1", "", "")], steps=False)


def test_a_null_is_refused_with_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "problems.parquet"
    save_problems(path, [ONE])
    table = pq.read_table(path)
    column = table.column_names.index("answer")
    pq.write_table(table.set_column(column, "answer", pa.array([None], pa.string())), path)
    with pytest.raises(KavaError, match="row 0: `answer` is null"):
        load_problems(path)


def test_files_that_are_no_problem_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KavaError, match="is missing"):
        load_problems(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(KavaError, match="not a readable Parquet"):
        load_problems(tmp_path / "text.parquet")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "columns.parquet")
    with pytest.raises(KavaError, match="column `question` of type string, found no such column"):
        load_problems(tmp_path / "columns.parquet")
    save_problems(tmp_path / "types.parquet", [ONE])
    table = pq.read_table(tmp_path / "types.parquet").drop_columns(["answer"])
    pq.write_table(table.append_column("answer", pa.array([4])), tmp_path / "types.parquet")
    with pytest.raises(KavaError, match="`answer` of type string, found int64"):
        load_problems(tmp_path / "types.parquet")


def many(count: int) -> list[Problem]:
    return [
        Problem(f"p-{i}", f"How many are {i}?", (f"{i}",) * (1 + i % 3), "4", "", "")
        for i in range(count)
    ]


def test_a_file_of_several_row_groups_is_the_list_of_its_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_GROUP", 10)
    monkeypatch.setattr(parquet, "_PART", 4)
    path, problems = tmp_path / "problems.parquet", many(37)
    save_problems(path, problems)
    file = open_problem_file(path)
    assert pq.ParquetFile(path).num_row_groups == 4 and len(file) == 37
    assert list(file) == load_problems(path) == problems
    for index in (slice(0, 0), slice(3, 25), slice(28, 99), slice(-5, None), slice(None, None, 7),
                  slice(None, None, -3)):  # fmt: skip
        assert file[index] == problems[index]
    assert [file[i] for i in (0, 9, 10, 36, -1, -37)] == [
        problems[i] for i in (0, 9, 10, 36, -1, -37)
    ]
    for outside in (37, -38):
        with pytest.raises(IndexError):
            file[outside]


def test_looking_through_a_file_holds_little_of_it(tmp_path: Path) -> None:
    path = tmp_path / "problems.parquet"
    save_problems(path, many(20_000))
    tracemalloc.start()
    try:
        held = list(ProblemFile(path))
        all_of_them, _ = tracemalloc.get_traced_memory()
        del held
        tracemalloc.reset_peak()
        assert len(open_problem_file(path)[::1000]) == 20
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < all_of_them / 4


def test_a_row_group_is_not_decoded_at_once(tmp_path: Path) -> None:
    path = tmp_path / "problems.parquet"
    problems = [replace(problem, question=problem.question * 40) for problem in many(60_000)]
    save_problems(path, problems)
    whole = pq.read_table(path).nbytes
    before = pa.total_allocated_bytes()
    file = ProblemFile(path)
    for row in (0, 59_999, 30_000, 30_001, 100):
        assert file[row] == problems[row]
        assert pa.total_allocated_bytes() - before < whole / 4


def test_what_is_wrong_in_a_later_row_group_is_named_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "problems.parquet"
    save_problems(path, many(30))
    rows = pq.read_table(path).to_pylist()
    rows[25]["steps"] = None
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path, row_group_size=10)
    assert ProblemFile(path)[:25] == many(25)
    for read in (load_problems, open_problem_file):
        with pytest.raises(KavaError, match="row 25: `steps` is null"):
            read(path)
