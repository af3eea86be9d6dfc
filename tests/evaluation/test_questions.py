"""`kava ask --file`: which questions a file holds, and that no answer to them is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kava_core.errors import KavaError
from kava_core.evaluation.questions import Question, read_questions
from stages import ask as command
from stages.ask import ask
from tests.serving.conftest import QUESTIONS, folders
from tests.stages.project import ROOT

__all__ = ["folders"]  # a fixture
# A shell has what stands before its `&` ignore SIGINT.
ASK = (
    "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from stages.cli import main\nmain()"
)
SHORT = ["--max-new-tokens", "3", "--batch-size", "1"]


def texts(questions: list[Question]) -> list[str]:
    return [question.text for question in questions]


def invoke(student: Path, *arguments: Any) -> Any:
    return CliRunner().invoke(ask, [str(student), *map(str, arguments)], catch_exceptions=False)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("ending", ["jsonl", "txt"])
def test_questions_are_a_line_each(tmp_path: Path, ending: str, mark: str) -> None:
    """Other signs that end a line in some programs are part of it, as they are of JSON."""
    file = tmp_path / f"questions.{ending}"
    asked = ["one\u2028or\x85two\u2029?", "how\x0cmany ?", "a third ?"]
    lines = asked
    if ending == "jsonl":
        objects = [{"question": text, "id": i} for i, text in enumerate(asked)]
        lines = [json.dumps(each, ensure_ascii=False) for each in objects]
    content = mark + "\r\n\n".join(lines)
    file.write_text(content, encoding="utf-8", newline="")
    found = read_questions(file)
    assert texts(found) == asked
    assert [question.place for question in found] == [f"{file}:{n}" for n in (1, 3, 5)]
    if ending == "jsonl":
        assert [question.given for question in found] == [{"id": i} for i in range(3)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"question": 1' + b"0" * 5000 + b"}", "expected JSON, found .*digits"),
        (b"[" * 100_000, "expected JSON, found .*recursion"),
        (b'{"question": "how many', "expected JSON, found"),
        (b"7", "expected a JSON object, found int"),
        (b'{"question": "half \\ud800 ?"}', "expected Unicode text, found half of a character"),
        (b'{"question": "?", "id": "\\udfff"}', "expected Unicode text, found half of a char"),
        (b'{"question": [1]}', r"expected a text in `question`, found list \[1\]"),
        (b'{"question": "\xff"}', "expected JSON, found .*utf-8"),
        (b'{"question": "?", "id": [1e400]}', "expected numbers of JSON, found NaN, Infinity or"),
    ],
    ids=[
        "number",
        "depth",
        "half a line",
        "no object",
        "surrogate",
        "given",
        "no text",
        "bytes",
        "infinite",
    ],
)
def test_a_line_without_a_question_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_bytes(b'{"question": "how many ?"}\n' + line + b"\n")
    with pytest.raises(KavaError, match=rf"questions\.jsonl:2: {words}") as raised:
        read_questions(file)
    assert len(str(raised.value)) < len(str(file)) + 300


def test_answers_are_kept_as_they_are_made(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "TOGETHER", 2)
    file, out = tmp_path / "questions.txt", tmp_path / "new/answers.jsonl"
    file.write_text("\n".join(QUESTIONS))
    invoke(folders["student"], "--file", file, "--out", out, *SHORT)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["question"] for row in rows] == QUESTIONS
    printed = invoke(folders["student"], "--file", file, *SHORT).stdout.splitlines()
    for row, other in zip(rows, map(json.loads, printed), strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("place", ["folder", "file/answers.jsonl"])
def test_where_answers_go_is_tried_before_anything_is_loaded(tmp_path: Path, place: str) -> None:
    (tmp_path / "questions.txt").write_text("how many ?")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(KavaError, match=f"{place}: expected a file or nothing|cannot be written"):
        invoke(
            tmp_path / "nowhere",
            *("--file", tmp_path / "questions.txt", "--out", tmp_path / place),
        )


def test_questions_that_are_too_long_are_named_before_any_is_asked(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    file, out = tmp_path / "questions.txt", tmp_path / "answers.jsonl"
    out.write_text("of an earlier run")
    file.write_text("\n".join([QUESTIONS[0], "7 " * 1000, QUESTIONS[1], *["7 " * 1200] * 6]))
    named = ", ".join(f"{file}:{number}" for number in (2, 4, 5, 6, 7))
    with pytest.raises(
        KavaError,
        match=rf"^7 of 9 questions are too long \({named} and 2 more\): the first takes \d+ "
        r"positions with latents and answer prompt, and the model's context is 1024\.",
    ):
        invoke(folders["student"], "--file", file, "--out", out, *SHORT)
    assert out.read_text() == "of an earlier run"
    assert sorted(tmp_path.iterdir()) == [out, file]


def test_bytes_that_are_no_text_are_said(folders: dict[str, Path]) -> None:
    words = r"expected a question in UTF-8, found other bytes behind 4 characters \('how "
    with pytest.raises(KavaError, match=words):
        invoke(folders["student"], "how \udcff many")  # as Python has the bytes of arguments
    done = CliRunner().invoke(
        ask,
        [str(folders["student"]), "--interactive", "--json", *SHORT[:2]],
        input=b"how \xff many\n" + QUESTIONS[0].encode() + b"\n",
        catch_exceptions=False,
    )
    assert re.search(words, " ".join(done.stderr.split()))
    assert json.loads(done.stdout)["question"] == QUESTIONS[0]


def test_a_question_that_is_too_long_does_not_end_the_others(folders: dict[str, Path]) -> None:
    typed = "\n".join([QUESTIONS[0], "7 " * 1200, QUESTIONS[1], ""])
    done = CliRunner().invoke(
        ask,
        [str(folders["student"]), "--interactive", "--json", *SHORT[:2]],
        input=typed,
        catch_exceptions=False,
    )
    assert [json.loads(line)["question"] for line in done.stdout.splitlines()] == QUESTIONS[:2]
    assert "error: " in done.stderr and done.exit_code == 0


def test_a_question_taken_for_the_teachers_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(KavaError, match=r"found none\. --compare took 'how many \?' for the teach"):
        invoke(tmp_path, "--compare", "how many ?")


def test_answers_do_not_replace_their_questions(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "how many ?"}\n')
    (tmp_path / "folder").mkdir()
    with pytest.raises(KavaError, match="expected another file than --file"):
        invoke(tmp_path, "--file", file, "--out", tmp_path / "folder/../questions.jsonl")
    assert "how many" in file.read_text()


@pytest.mark.parametrize(
    ("options", "name"),
    [(["--write-steps"], "settings.w_cot"), (["--compare", "."], "fingerprints.teacher")],
)
@pytest.mark.parametrize("content", ["{}", '{"settings": 1, "fingerprints": []}'])
def test_a_student_that_does_not_say_what_it_was_taught_is_refused(
    folders: dict[str, Path], tmp_path: Path, content: str, options: list[str], name: str
) -> None:
    shutil.copytree(folders["student"], tmp_path / "student")
    (tmp_path / "student/student.json").write_text(content)
    with pytest.raises(KavaError, match=rf"student\.json: expected {name} in it, found none"):
        invoke(tmp_path / "student", "how many ?", *options)


def test_what_was_answered_before_an_interrupt_stays(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    file, out = tmp_path / "questions.txt", tmp_path / "answers.jsonl"
    out.write_text("of an earlier run")
    file.write_text("\n".join(QUESTIONS * 1000))
    options = ["--file", str(file), "--out", str(out), *SHORT]
    process = subprocess.Popen(
        [sys.executable, "-c", ASK, "ask", str(folders["student"]), *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    partial = tmp_path / f"answers.jsonl.{process.pid}.partial"
    while not (partial.is_file() and partial.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    rows = [json.loads(line) for line in partial.read_text().splitlines()]
    assert [row["question"] for row in rows] == (QUESTIONS * 1000)[: len(rows)]
    assert 0 < len(rows) < 6000 and out.read_text() == "of an earlier run"
    said = " ".join(said.split())
    assert f"{len(rows)} answers were written, and are in {partial}" in said
    assert "interrupted; the same command begins with the first question again" in said
    assert "to go on" not in said
