"""Text that means more than it says: to a terminal, a page, a table, a tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from kava_core import console
from kava_core.errors import KavaError
from kava_core.models.loading import load_tokenizer
from kava_core.problems.folder import open_problems, open_test_sets
from kava_core.problems.records import Problem, normalise_question
from kava_core.problems.traces import TraceEncoder
from stages.cli import kava
from tests.faults.conftest import Tell
from tests.faults.stage import Stage
from tests.golden.inputs import NAME, with_settings

MakeStage = Callable[[str], Stage]
ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m"
HOSTILE = {
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)> has 3",
    "control characters": f"clear {ESCAPES} \x00 \x08\x08 has 4",
    "marks of direction": "\u202e3 evah \u2066 I\u200f has 5",
    "a formula": "=HYPERLINK(\"http://x\") has 6",
    "another formula": "@SUM(1+1)*cmd|' /C calc'!A0 has 7",
    "a template": "{{ 7 * 7 }} {% raw %} ${x} %s {0} has 8",
    "only signs": "\U0001f600\u0301\u0301\u0301 has 9",
}  # fmt: skip
LONGEST = 10_000_000  # characters of one question


def prepare(
    home: Path, rows: Sequence[dict[str, object] | str], lost: int = 0, **settings: object
) -> str:
    """Run `prepare` on the rows of a table of which some are left out; what it says."""
    file = home / "rows" / "hostile.jsonl"
    lines = [each if isinstance(each, str) else json.dumps(each) for each in rows]
    file.write_text("\n".join(lines), encoding="utf-8")
    source = {"name": "table", "question": "q", "answer": "a", "steps": "s"}
    sizes = {"train": len(rows) - lost - 3, "validation": 1, "test": 2}
    with_settings(
        home, "prepare", source=source, path=str(file), traces="equations", deduplicate=True,
        **sizes, **settings,
    )  # fmt: skip
    options = ["--pipelines", str(home / "pipelines.yaml"), "--data", str(home / "data")]
    result = CliRunner().invoke(kava, ["prepare", *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def questions(home: Path) -> list[Problem]:
    """All problems that are taught and asked."""
    data = home / "data" / NAME
    problems, asked = open_problems(data / "problems"), open_test_sets(data / "test_sets")
    taught = [problem for split in ("train", "validation") for problem in problems.load(split)]
    return taught + [problem for each in asked.load_all().values() for problem in each]


def row(question: str, number: int) -> dict[str, object]:
    return {"q": question, "a": str(number), "s": [f"<<{number}+0={number}>>"]}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_question_is_kept_to_the_letter(make_stage: MakeStage, kind: str, tell: Tell) -> None:
    """Or as the one form of Unicode that all texts are kept in."""
    home = make_stage("prepare").home
    ordinary = [row(f"Ann has {n} pens . How many ?", n) for n in range(8)]
    said = prepare(home, [row(HOSTILE[kind], 3), *ordinary])
    assert not console.STEERING.search(said)
    kept = [problem.question for problem in questions(home)]
    assert len(kept) == 9
    (found,) = set(kept) - {str(each["q"]) for each in ordinary}
    assert "".join(found.split()) == "".join(HOSTILE[kind].split())
    tell("hostile text", f"{kind} in a question", "kept as it is, and shown as text")


def test_ten_megabytes_in_one_field(make_stage: MakeStage, tell: Tell) -> None:
    home = make_stage("prepare").home
    rows = [row(f"Ann has {n} pens . How many ?", n) for n in range(8)]
    said = prepare(home, [row("x" * LONGEST, 3), *rows])
    assert len(said) < 2000
    assert max(len(problem.question) for problem in questions(home)) == LONGEST
    with_settings(home, "prepare", max_question_characters=1000)
    said = prepare(home, [row("x" * LONGEST, 3), *rows], lost=1)
    assert re.search(r"left out of \S+: .*question.* 1", said), said
    tell("hostile text", "10 MB in one field", "read; left out by a limit, and counted")


BROKEN = {
    "a number of 5,000 digits": '{"q": "?", "a": 1' + "0" * 5000 + "}",
    "100,000 brackets": "[" * 100_000,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_line_that_no_reader_takes_is_left_out(
    make_stage: MakeStage, kind: str, tell: Tell
) -> None:
    home = make_stage("prepare").home
    rows = [json.dumps(row(f"Ann has {n} pens . How many ?", n)) for n in range(8)]
    said = prepare(home, [*rows, BROKEN[kind]], lost=1, on_bad_record="drop")
    assert len(questions(home)) == 8
    assert re.search(r"1 expected JSON \(\S+hostile\.jsonl:9\)", said), said
    assert len(said) < 2000
    tell("hostile text", f"{kind} in a line of JSON", "left out by `drop`, and counted")


def test_what_a_terminal_is_shown_steers_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console.say(f"an answer: {ESCAPES} \u202e\r gone\ttab\nline")
    console.complain(f"error: {ESCAPES}")
    said = capsys.readouterr().err
    assert not console.STEERING.search(said)
    assert "\\x1b[2J\\x1b]0;title\\x07\\x9b31m \\u202e\\r gone tab\nline" in said


def test_special_tokens_in_a_question_are_named_before_the_teacher_reads(
    make_stage: MakeStage, tell: Tell
) -> None:
    stage = make_stage("generate")
    home = stage.home
    teacher = home / "data" / NAME / "teacher"
    eos = load_tokenizer(str(teacher)).eos_token
    rows = [row(f"Ann has {n} pens . How many ?", n) for n in range(8)]
    prepare(home, [row(f"Ann has {eos} pens", 3), *rows])
    encoder = TraceEncoder(load_tokenizer(str(teacher)), "equations")
    with pytest.raises(KavaError, match=r"table-train-000000 .*special tokens"):
        encoder.encode_all(questions(home))
    tell("hostile text", "a special token of the tokenizer in a question", "a sentence")


def test_questions_that_are_one_when_read_are_not_taught_and_asked(
    make_stage: MakeStage, tell: Tell
) -> None:
    """Full-width letters, case, accents in two parts, spaces: one question."""
    home = make_stage("prepare").home
    forms = ["Ann has 3 caf\u00e9s", "ANN  has 3 cafe\u0301s?", "\uff21nn has \uff13 caf\u00e9s!"]
    rows = [row(form, 3) for form in forms] + [row(f"Bob has {n}", n) for n in range(6)]
    prepare(home, rows, lost=2)
    assert sum("3" in normalise_question(problem.question) for problem in questions(home)) == 2
    tell("hostile text", "questions that differ in signs alone", "one question")
