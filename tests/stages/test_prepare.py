"""`kava prepare` over every source, in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from kava_core.errors import KavaError
from kava_core.problems.folder import open_problems
from stages.prepare import prepare

REST: dict[str, Any] = {
    "teacher": {"training": {"steps": 1, "learning_rate": 1e-3}},
    "generate": {},
    "evict": {"budget": 4},
    "students": {},
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
COLUMNS = {"columns": {"question": "q", "steps": "s", "answer": "a"}, "separator": "|"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(folder: Path, **settings: Any) -> Path:
    """The problems folder that these settings of `prepare` give."""
    document = {"pipelines": {"one": {"prepare": settings, **REST}}}
    (folder / "pipelines.yaml").write_text(yaml.safe_dump(document))
    arguments = ["--pipeline", "one", "--pipelines", str(folder / "pipelines.yaml")]
    arguments += ["--data", str(folder / "data")]
    CliRunner(catch_exceptions=False).invoke(prepare, arguments)
    return folder / "data/one/problems"


@pytest.mark.parametrize("source", ROWS)
def test_every_source_becomes_problems_and_a_test_set_beside_them(
    tmp_path: Path, source: str
) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS[source])
    own = COLUMNS if source == "table" else {}
    natural = source in ("gsm8k-aug-nl", "metamath", "math", "table")
    folder = run(
        tmp_path,
        source=source,
        path=path,
        traces="sentences" if natural else "equations",
        validation=2,
        test=2,
        test_sets={"hard": {"source": "gsm-hard", "path": write(tmp_path / "hard.jsonl", HARD)}},
        **own,
    )
    problems = open_problems(folder)
    assert [len(problems.load(name)) for name in ("train", "validation", "test")] == [5, 2, 2]
    sets = problems.test_sets()
    assert {name: len(found) for name, found in sets.items()} == {source: 2, "hard": 4}
    assert [problem.answer for problem in sets["hard"]] == ["1", "1001", "2001", "3001"]
    assert all(len(p.steps) == (2 if natural else 1) for p in problems.load("train"))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["leaked"] == {"test": 0, "hard": 0}
    assert metrics["train"]["by_source"] == {source: 5}


def test_what_was_left_out_is_counted_in_the_metrics(tmp_path: Path) -> None:
    rows = [*ROWS["metamath"], {"query": "Hm?", "response": "I do not know."}]
    hard = [*HARD, {"input": "x?", "target": None}, {"input": "y" * 50, "target": 1}]
    folder = run(
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
    assert json.loads((folder / "metrics.json").read_text())["dropped"] == {
        "train": {"beyond the number asked for": 1, "no answer": 1},
        "hard": {"no answer": 1, "question longer than 40 characters": 1},
    }


def test_a_leaked_question_is_an_error_unless_allowed_or_taken_out(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS["gsm8k"])
    aug = {"source": "gsm8k-aug", "path": write(tmp_path / "aug.jsonl", ROWS["gsm8k-aug"][:1])}
    settings = {"source": "gsm8k", "path": path, "validation": 1, "test": 1, "seed": 1}
    with pytest.raises(KavaError, match=r"1 of aug; the first is aug-000000.*`deduplicate`"):
        run(tmp_path, **settings, test_sets={"aug": aug})
    assert not (tmp_path / "data/one").exists()
    folder = run(tmp_path, **settings, test_sets={"aug": aug}, allow_leakage=True)
    assert json.loads((folder / "metrics.json").read_text())["leaked"] == {"test": 0, "aug": 1}
    folder = run(tmp_path, **settings, test_sets={"aug": aug}, deduplicate=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["leaked"] == {"test": 0, "aug": 0}
    assert metrics["dropped"] == {"train": {"question of a test set": 1}}


def test_a_dataset_whose_answers_are_mere_text_is_refused(tmp_path: Path) -> None:
    rows = [{"q": f"{n}?", "s": "Think.", "a": "a banana"} for n in range(9)]
    with pytest.raises(KavaError, match=r"train: expected numbers .*found none in 5 problems"):
        run(
            tmp_path,
            source="table",
            path=write(tmp_path / "rows.jsonl", rows),
            **COLUMNS,
            validation=2,
            test=2,
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": "gsm8k"}, "prepare: source gsm8k needs a `path`"),
        ({"source": "gsm8k", "path": "x", **COLUMNS}, "prepare: `columns` belongs to"),
        ({"source": "table", "path": "x"}, "prepare: `columns` belongs to"),
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
            "prepare: test_sets must not be named test or svamp",
        ),
        (
            {"source": "svamp", "path": "x", "test_sets": {"a/b": {"source": "math", "path": "x"}}},
            "prepare.test_sets.a/b",
        ),
        (
            {"source": "svamp", "path": "x", "test_sets": {"s": {"source": "synthetic"}}},
            "prepare.test_sets.s.source",
        ),
    ],
)
def test_a_wrong_setting_is_named_by_its_path(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(KavaError, match=words):
        run(tmp_path, **settings, validation=1)
