"""`kava prepare` over every source, in a folder of its own."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from kava_core.distill.teacher_job import train_teacher
from kava_core.errors import KavaError
from kava_core.models.loading import load_tokenizer, tokenizer_fingerprint
from kava_core.problems.folder import open_problems, open_test_sets
from kava_core.problems.sources import SOURCES
from kava_core.problems.tokenizer import train_tokenizer
from kava_core.settings import Cadence, Resources, Teacher, load_pipeline
from stages.prepare import prepare

REST: dict[str, Any] = {
    "teacher": {"training": {"steps": 1, "learning_rate": 1e-3}},
    "generate": {},
    "evict": {"budget": 4},
    "students": {"no-cot": {"reads": "problems", "training": {"steps": 1, "learning_rate": 1e-3}}},
    "evaluate": {},
    "report": {"title": "A test"},
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [
        {"question": f"{n} and 1?", "answer": f"Add. {n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
        for n in range(9)
    ],
    "gsm8k-aug": [
        {"question": f"{n} and 1?", "steps": [f"<<{n}+1={n + 1}>>"], "answer": str(n + 1)}
        for n in range(9)
    ],
    "gsm8k-aug-nl": [
        {"question": f"{n} and 1?", "cot": f"Add one. It is {n + 1}.", "answer": str(n + 1)}
        for n in range(9)
    ],
    "multiarith": [
        {
            "sQuestion": f"{n} and 1 ? ",
            "lEquations": [f"X=({n}.0+1.0)"],
            "lSolutions": [n + 1.0],
        }
        for n in range(9)
    ],
    "svamp": [
        {
            "Body": f"Ann has {n}.",
            "Question": "And one more?",
            "Equation": f"( {n}.0 + 1.0 )",
            "Answer": n + 1.0,
            "Type": "Addition",
        }
        for n in range(9)
    ],
    "metamath": [
        {"query": f"{n} and 1?", "response": f"Add.\nSo it is {n + 1}.\nThe answer is: {n + 1}"}
        for n in range(9)
    ],
    "math": [
        {"problem": f"{n} and 1?", "solution": f"Add. So it is $\\boxed{{{n + 1}}}$."}
        for n in range(9)
    ],
    "table": [{"q": f"{n} and 1?", "s": "Add. | Ready.", "a": n + 1} for n in range(9)],
}
HARD = [{"input": f"{n}000 and 1?", "code": "", "target": n * 1000 + 1.0} for n in range(4)]
TABLE = {"name": "table", "question": "q", "steps": "s", "answer": "a", "separator": "|"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(folder: Path, **settings: Any) -> Path:
    """The pipeline's folder that these settings of `prepare` give."""
    teacher = REST["teacher"] | ({"model": "x/y"} if "tokenizer" in settings else {})
    document = {"pipelines": {"one": {"prepare": settings, **REST, "teacher": teacher}}}
    (folder / "pipelines.yaml").write_text(yaml.safe_dump(document))
    arguments = ["--pipeline", "one", "--pipelines", str(folder / "pipelines.yaml")]
    arguments += ["--data", str(folder / "data")]
    CliRunner(catch_exceptions=False).invoke(prepare, arguments)
    return folder / "data/one"


def metrics(data: Path, folder: str) -> Any:
    return json.loads((data / folder / "metrics.json").read_text())


@pytest.mark.parametrize("source", ROWS)
def test_every_source_becomes_problems_and_a_test_set_beside_them(
    tmp_path: Path, source: str
) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS[source])
    natural = source in ("gsm8k-aug-nl", "metamath", "math", "table")
    data = run(
        tmp_path,
        source=TABLE if source == "table" else source,
        path=path,
        traces="sentences" if natural else "equations",
        validation=2,
        test=2,
        test_sets={"hard": {"source": "gsm-hard", "path": write(tmp_path / "hard.jsonl", HARD)}},
    )
    problems, asked = open_problems(data / "problems"), open_test_sets(data / "test_sets")
    assert [len(problems.load(name)) for name in ("train", "validation")] == [5, 2]
    sets = asked.load_all()
    assert {name: len(found) for name, found in sets.items()} == {source: 2, "hard": 4}
    assert [problem.answer for problem in sets["hard"]] == ["1", "1001", "2001", "3001"]
    assert all(len(p.steps) == (2 if natural else 1) for p in problems.load("train"))
    assert metrics(data, "test_sets")["leaked"] == {"test": 0, "hard": 0}
    assert metrics(data, "test_sets")["test_sets"]["hard"]["problems"] == 4
    assert metrics(data, "problems")["train"]["by_source"] == {source: 5}


def test_longer_chains_than_are_taught_can_be_drawn_as_a_test_set(tmp_path: Path) -> None:
    longer = {"source": {"name": "last-digit", "steps": [8, 9]}, "size": 6}
    settings: dict[str, Any] = {
        "source": {"name": "last-digit", "steps": [2, 4]},
        "traces": "checked",
        "train": 8,
        "validation": 2,
        "test": 3,
    }
    taught = contents(run(tmp_path, **settings) / "problems")
    data = run(tmp_path, **settings, test_sets={"longer": longer})
    assert contents(data / "problems") == taught
    asked = open_test_sets(data / "test_sets").load_all()
    assert {name: len(found) for name, found in asked.items()} == {"last-digit": 3, "longer": 6}
    assert {len(p.steps) for p in asked["longer"]} == {8, 9}
    assert [p.id for p in asked["longer"]][:2] == ["longer-000000", "longer-000001"]
    assert all("= " in step for p in asked["longer"] for step in p.steps)  # as they are taught
    again = run(tmp_path, **{**settings, "seed": 1}, test_sets={"longer": longer})
    assert open_test_sets(again / "test_sets").load("longer") != asked["longer"]
    few = {"name": "last-digit", "steps": [1, 1]}
    with pytest.raises(KavaError, match=r"also stand in train or validation: \d of again"):
        run(
            tmp_path,
            **{**settings, "source": few},
            test_sets={"again": {"source": few, "size": 90}},
        )


def test_what_was_left_out_is_counted_in_the_metrics(tmp_path: Path) -> None:
    rows = [*ROWS["metamath"], {"query": "Hm?", "response": "I do not know."}]
    hard = [*HARD, {"input": "x?", "target": None}, {"input": "y" * 50, "target": 1}]
    data = run(
        tmp_path,
        source="metamath",
        path=write(tmp_path / "rows.jsonl", rows),
        traces="sentences",
        train=4,
        validation=2,
        test=2,
        max_question_characters=40,
        test_sets={"hard": {"source": "gsm-hard", "path": write(tmp_path / "hard.jsonl", hard)}},
    )
    assert metrics(data, "problems")["rows"] == {
        "train": {
            "in": 6,
            "kept": 4,
            "dropped": {"beyond the number asked for": 1, "no answer": 1},
        },
        "validation": {"in": 2, "kept": 2, "dropped": {}},
    }
    assert metrics(data, "test_sets")["rows"] == {
        "test": {"in": 2, "kept": 2, "dropped": {}},
        "hard": {
            "in": 6,
            "kept": 4,
            "dropped": {"no answer": 1, "question longer than 40 characters": 1},
        },
    }


def test_a_leaked_question_is_an_error_unless_allowed_or_taken_out(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS["gsm8k"])
    aug = {"source": "gsm8k-aug", "path": write(tmp_path / "aug.jsonl", ROWS["gsm8k-aug"][:1])}
    settings = {"source": "gsm8k", "path": path, "validation": 1, "test": 1, "seed": 1}
    with pytest.raises(KavaError, match=r"1 of aug; the first is aug-000000.*`deduplicate`"):
        run(tmp_path, **settings, test_sets={"aug": aug})
    assert not (tmp_path / "data/one").exists()
    data = run(tmp_path, **settings, test_sets={"aug": aug}, allow_leakage=True)
    assert metrics(data, "test_sets")["leaked"] == {"test": 0, "aug": 1}
    assert metrics(data, "problems")["rows"]["train"]["dropped"] == {}
    data = run(tmp_path, **settings, test_sets={"aug": aug}, deduplicate=True)
    assert metrics(data, "test_sets")["leaked"] == {"test": 0, "aug": 0}
    assert metrics(data, "problems")["rows"]["train"]["dropped"] == {"question of a test set": 1}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("deduplicate", [False, True])
def test_a_new_test_set_changes_not_one_byte_of_what_is_taught(
    tmp_path: Path, deduplicate: bool
) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS["gsm8k"])
    settings = {"source": "gsm8k", "path": path, "validation": 2, "test": 2, "seed": 1}
    settings["deduplicate"] = deduplicate
    data = run(tmp_path, **settings)
    taught, asked = contents(data / "problems"), contents(data / "test_sets")
    hard = {"source": "gsm-hard", "path": write(tmp_path / "hard.jsonl", HARD)}
    run(tmp_path, **settings, test_sets={"hard": hard})
    assert contents(data / "problems") == taught
    assert contents(data / "test_sets") != asked
    assert (data / "test_sets/test.parquet").read_bytes() == asked["test.parquet"]


def test_more_test_problems_of_a_source_that_has_some_change_nothing_that_is_taught(
    tmp_path: Path,
) -> None:
    write(tmp_path / "raw/train.jsonl", ROWS["gsm8k"][:6])
    write(tmp_path / "raw/test.jsonl", ROWS["gsm8k"][6:])
    settings = {"source": "gsm8k", "path": str(tmp_path / "raw"), "validation": 2}
    taught = contents(run(tmp_path, **settings, test=1) / "problems")
    assert contents(run(tmp_path, **settings, test=3) / "problems") == taught


def test_an_input_that_was_cut_short_is_another_artefact(tmp_path: Path) -> None:
    """Even where what is taken of it stays what it was."""
    write(tmp_path / "raw/train.jsonl", ROWS["gsm8k"][:6])
    test = Path(write(tmp_path / "raw/test.jsonl", ROWS["gsm8k"][6:]))
    settings = {"source": "gsm8k", "path": str(tmp_path / "raw"), "validation": 2, "test": 2}
    data = run(tmp_path, **settings)
    taught, asked = contents(data / "problems"), contents(data / "test_sets")
    read = json.loads(taught["problems.json"])["read"]
    assert {name: list(found["files"]) for name, found in read.items()} == {
        "train": ["train.jsonl"],
        "validation": ["train.jsonl"],
    }
    assert list(json.loads(asked["test_sets.json"])["read"]) == ["test"]
    write(test, ROWS["gsm8k"][6:8])
    run(tmp_path, **settings)
    assert contents(data / "problems") == taught
    assert (data / "test_sets/test.parquet").read_bytes() == asked["test.parquet"]
    assert (data / "test_sets/test_sets.json").read_bytes() != asked["test_sets.json"]


def uneven(n: int) -> dict[str, str]:
    """A row of GSM8K's; one in three has a longer question, every second a longer trace."""
    question = f"{n} and 1?" if n % 3 else f"{n} and 1? Say why."
    steps = [f"Add. {n}+1=<<{n}+1={n + 1}>>{n + 1}", *["So it is."] * (n % 2)]
    return {"question": question, "answer": "\n".join([*steps, f"#### {n + 1}"])}


def own_tokenizer(folder: Path) -> str:
    texts = [row["question"] for row in map(uneven, range(40))]
    train_tokenizer(texts, 280).save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_measures_limits_and_refuses_before_a_teacher_is_there(tmp_path: Path) -> None:
    rows = [uneven(n) for n in range(12)] + [uneven(12) | {"question": "What is <|eos|>?"}]
    settings = {
        "source": "gsm8k",
        "path": write(tmp_path / "rows.jsonl", rows),
        "traces": "sentences",
        "validation": 2,
        "test": 2,
        "tokenizer": own_tokenizer(tmp_path / "tokenizer"),
    }
    with pytest.raises(KavaError, match=r"rows.jsonl:13: expected a text that the tokenizer can"):
        run(tmp_path, **settings)
    assert not (tmp_path / "data/one").exists()
    data = run(tmp_path, **settings, on_bad_record="drop", max_question_tokens=7)
    counts = metrics(data, "problems")["rows"]["train"]
    assert counts["dropped"]["bad: expected a text that the tokenizer can write"] == 1
    assert counts["dropped"]["question longer than 7 tokens"] > 0
    found = metrics(data, "problems")["train"]
    assert 0 < found["question_tokens"]["max"] <= 7
    assert found["trace_tokens"]["min"] > 5
    assert metrics(data, "test_sets")["test_sets"]["test"]["question_tokens"]["max"] <= 7
    folder = open_problems(data / "problems")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    folder.check_tokenizer(tokenizer_fingerprint(tokenizer))
    with pytest.raises(KavaError, match=r"another tokenizer: .*Set `prepare.tokenizer`"):
        folder.check_tokenizer("f" * 64)
    teacher = Teacher.model_validate({"training": {"steps": 1, "learning_rate": 1e-3}})
    with pytest.raises(KavaError, match=r"problems was measured in the tokens of another"):
        train_teacher(teacher, folder, data / "teacher", Cadence(), Resources())


# Each setting of a source that is read, with a value that must make a difference.
DIFFERENCES: dict[str, Any] = {
    "traces": "equations",
    "train": 4,
    "validation": 3,
    "test": 3,
    "seed": 5,
    "drop_last_step": True,
    "max_steps": 1,
    "max_question_characters": 10,
    "max_trace_characters": 15,
    "max_question_tokens": 7,
    "max_trace_tokens": 15,
    "on_bad_record": "drop",
    "test_sets": {"hard": {"source": "gsm-hard", "path": "hard.jsonl"}},
}


@pytest.mark.parametrize("setting", DIFFERENCES)
def test_every_setting_changes_something(
    tmp_path: Path, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "hard.jsonl", HARD)
    rows: list[dict[str, Any]] = [uneven(n) for n in range(12)]
    path = write(tmp_path / "rows.jsonl", rows)
    settings = {"source": "gsm8k", "path": path, "traces": "sentences", "validation": 2, "test": 2}
    if setting.endswith("_tokens"):
        settings["tokenizer"] = own_tokenizer(tmp_path / "tokenizer")
    if setting == "on_bad_record":
        write(tmp_path / "rows.jsonl", [*rows, {"question": "None?"}])
        with pytest.raises(KavaError, match=r"on_bad_record: drop"):
            run(tmp_path, **settings)
        run(tmp_path, **settings, on_bad_record="drop")
        return
    plain = parquet(run(tmp_path, **settings))
    assert parquet(run(tmp_path, **(settings | {setting: DIFFERENCES[setting]}))) != plain


# The same of every setting of a source's own.
OF_SOURCES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"name": "synthetic"}, {"steps": [3, 5]}),
    ({"name": "synthetic"}, {"operations": ["add", "subtract"]}),
    ({"name": "synthetic"}, {"max_value": 50}),
    ({"name": "synthetic"}, {"max_operand": 9}),
    ({"name": "synthetic"}, {"factors": [2]}),
    ({"name": "synthetic"}, {"style": "prose"}),
    ({"name": "synthetic"}, {"distractors": 0.5}),
    ({"name": "last-digit"}, {"steps": [3, 4]}),
    (TABLE, {"question": "q2"}),
    (TABLE, {"answer": "b"}),
    (TABLE, {"steps": "s2"}),
    (TABLE, {"topic": "t"}),
    (TABLE, {"separator": " "}),
]


def test_every_setting_of_every_source_is_tried() -> None:
    tried = {(of["name"], name) for of, change in OF_SOURCES for name in change}
    assert tried == {(k.name, field.name) for k in SOURCES.values() for field in fields(k)}


@pytest.mark.parametrize(("source", "change"), OF_SOURCES)
def test_every_setting_of_a_source_changes_something(
    tmp_path: Path, source: dict[str, Any], change: dict[str, Any]
) -> None:
    rows = [row | {"q2": f"{row['q']} Hm?", "b": 3, "s2": "Think. | Go.", "t": "sums"}
            for row in ROWS["table"]]  # fmt: skip
    settings: dict[str, Any] = {"validation": 2, "test": 2}
    if source["name"] == "table":
        settings |= {"path": write(tmp_path / "rows.jsonl", rows), "traces": "sentences"}
    else:
        settings["train"] = 20
    plain = parquet(run(tmp_path, source=source, **settings))
    assert parquet(run(tmp_path, source=source | change, **settings)) != plain


def parquet(data: Path) -> dict[str, bytes]:
    return {str(file.relative_to(data)): file.read_bytes() for file in data.rglob("*.parquet")}


def test_a_dataset_whose_answers_are_mere_text_is_refused(tmp_path: Path) -> None:
    rows = [{"q": f"{n}?", "s": "Think.", "a": "a banana"} for n in range(9)]
    with pytest.raises(KavaError, match=r"train: expected numbers .*found none in 5 problems"):
        run(
            tmp_path,
            source=TABLE,
            path=write(tmp_path / "rows.jsonl", rows),
            validation=2,
            test=2,
        )


def test_a_tokenizer_beside_a_teacher_that_learns_its_own_is_refused(
    tmp_path: Path,
) -> None:
    document = {
        "pipelines": {
            "one": {
                "prepare": {"source": "gsm8k", "path": "x", "validation": 1, "tokenizer": "x/y"},
                **REST,
            }
        }
    }
    (tmp_path / "pipelines.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(KavaError, match=r"prepare.tokenizer: a teacher from scratch learns"):
        load_pipeline(tmp_path / "pipelines.yaml", "one")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": "gsm8k"}, "prepare: source gsm8k needs a `path`"),
        (
            {"source": {"name": "gsm8k", "question": "q"}, "path": "x"},
            "prepare.source.question: no such setting",
        ),
        ({"source": "table", "path": "x"}, "prepare.source.question: Field required"),
        (
            {"source": {**TABLE, "separator": ""}, "path": "x"},
            "prepare.source: source table: Expected a text as `separator`",
        ),
        (
            {"source": {"name": "synthetic", "steps": [2]}, "train": 1, "test": 1},
            "prepare.source.steps.1: Field required",
        ),
        (
            {"source": {"name": "synthetic", "steps": [2, 0]}, "train": 1, "test": 1},
            "prepare.source: source synthetic: Expected `steps`",
        ),
        ({"source": "synthetic", "train": 1}, "source synthetic needs the numbers `train` and"),
        (
            {"source": "synthetic", "train": 1, "test": 1, "revision": "v2"},
            "synthetic has no revision",
        ),
        ({"source": "synthetic", "train": 1, "test": 1, "path": "x"}, "synthetic has no path"),
        (
            {"source": "gsm8k", "path": "x", "deduplicate": True, "allow_leakage": True},
            "prepare: deduplicate leaves nothing",
        ),
        (
            {"source": "svamp", "path": "x", "test_sets": {"svamp": {"source": "svamp"}}},
            "prepare.test_sets.svamp: source svamp needs a `path`",
        ),
        (
            {
                "source": "svamp",
                "path": "x",
                "test_sets": {"svamp": {"source": "math", "path": "x"}},
            },
            "prepare: test_sets must not be named train, validation, test or svamp",
        ),
        (
            {"source": "gsm8k", "path": "x", "max_trace_tokens": 9},
            "prepare: max_trace_tokens: which tokens. Set `tokenizer` to the teacher's model",
        ),
        (
            {"source": "gsm8k", "path": "x", "tokenizer_revision": "v1"},
            "prepare: tokenizer_revision: which tokens. Set `tokenizer`",
        ),
        (
            {"source": "gsm8k", "path": "x", "on_bad_record": "ignore"},
            "prepare.on_bad_record: Input should be 'fail' or 'drop', found 'ignore'",
        ),
        (
            {"source": "synthetic", "train": 1, "test": 1, "on_bad_record": "drop"},
            "synthetic has no on_bad_record",
        ),
        (
            {"source": "synthetic", "train": 1, "test": 1, "tokenizer": "x", "max_trace_tokens": 5},
            "synthetic has no tokenizer, max_trace_tokens",
        ),
        (
            {"source": "svamp", "path": "x", "test_sets": {"a/b": {"source": "math", "path": "x"}}},
            "prepare.test_sets.a/b",
        ),
        (
            {"source": "svamp", "path": "x", "test_sets": {"s": {"source": "synthetic"}}},
            "prepare.test_sets.s: source synthetic needs the number `size`",
        ),
        (
            {
                "source": "svamp",
                "path": "x",
                "test_sets": {"s": {"source": "synthetic", "size": 4, "split": "test"}},
            },
            "prepare.test_sets.s: source synthetic has no split",
        ),
        (
            {
                "source": "svamp",
                "path": "x",
                "test_sets": {"s": {"source": "math", "path": "x", "size": 4}},
            },
            "prepare.test_sets.s: size: source math draws no problems",
        ),
    ],
)
def test_a_wrong_setting_is_named_by_its_path(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(KavaError, match=words):
        run(tmp_path, **settings, validation=1)
