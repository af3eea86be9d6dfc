"""GSM8K rows, from files to problems."""

import json
from pathlib import Path

import pytest

from kava_core.errors import KavaError
from kava_core.problems.files import read_source
from kava_core.problems.gsm8k import load_gsm8k

BOTH = ("equations", "sentences")


def row(number: int, notes: bool = True, question: str | None = None) -> dict[str, str]:
    note = f"<<{number} + 1000={number + 1000}>>" if notes else ""
    return {
        "question": question or f"Ada has {number} pens and buys 1,000 more. How many has she now?",
        "answer": f"Ada has {number}+1000 = {note}{number + 1000:,} pens.\n\n"
        f"She keeps them all.\n#### {number + 1000:,}",
    }


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", [row(n) for n in range(20)] + [row(20, notes=False)])
    write(tmp_path / "test.jsonl", [row(n) for n in range(100, 105)] + [row(105, notes=False)])
    return tmp_path


def test_equations_are_the_notes_and_sentences_the_lines_without_them(folder: Path) -> None:
    first = load_gsm8k(str(folder), traces="equations", validation=2).test[0]
    assert first.id == "gsm8k-test-000000"
    assert first.steps == ("<<100+1000=1100>>",)
    assert first.answer == "1100"
    first = load_gsm8k(str(folder), traces="sentences", validation=2).test[0]
    assert first.steps == ("Ada has 100+1000 = 1,100 pens.", "She keeps them all.")


def test_every_row_is_used_or_counted(folder: Path) -> None:
    splits = load_gsm8k(str(folder), traces="equations", train=10, validation=4, test=3)
    assert {name: len(problems) for name, problems in splits.named().items()} == {
        "train": 10,
        "validation": 4,
        "test": 3,
    }
    assert splits.dropped == {
        "train": {"beyond the number asked for": 6, "no notes": 1},
        "test": {"beyond the number asked for": 2, "no notes": 1},
    }
    assert load_gsm8k(str(folder), traces="sentences", validation=4).dropped == {}


def test_validation_is_cut_by_the_seed_and_not_by_the_size_of_train(folder: Path) -> None:
    first = load_gsm8k(str(folder), traces="equations", validation=5)
    assert load_gsm8k(str(folder), traces="equations", validation=5) == first
    fewer = load_gsm8k(str(folder), traces="equations", validation=5, train=3)
    assert fewer.validation == first.validation
    assert fewer.train == first.train[:3]
    assert load_gsm8k(str(folder), traces="equations", validation=5, seed=1) != first
    questions = {p.question for p in first.train} & {p.question for p in first.validation}
    assert not questions


def test_one_file_is_cut_into_three(folder: Path) -> None:
    path = str(folder / "train.jsonl")
    splits = load_gsm8k(path, traces="equations", validation=3, test=4)
    assert [len(problems) for problems in splits.named().values()] == [13, 3, 4]
    with pytest.raises(KavaError, match="no test problems"):
        load_gsm8k(path, traces="equations", validation=3)


def test_repeated_training_questions_are_dropped_and_counted(folder: Path) -> None:
    write(folder / "train.jsonl", [row(n) for n in (1, 2, 3, 1)])
    splits = load_gsm8k(str(folder), traces="equations", validation=1)
    assert len(splits.train) == 2
    assert splits.dropped["train"] == {"repeated question": 1}


def test_a_test_question_in_train_is_an_error_unless_allowed(folder: Path) -> None:
    asked = row(7)["question"].upper().replace("?", " ?")
    write(folder / "test.jsonl", [row(100), row(101, question=asked)])
    with pytest.raises(KavaError, match=r"1 test questions.*gsm8k-test-000001"):
        load_gsm8k(str(folder), traces="equations", validation=2)
    allowed = load_gsm8k(str(folder), traces="equations", validation=2, allow_leakage=True)
    assert (allowed.leaked, len(allowed.test)) == (1, 2)


@pytest.mark.parametrize("traces", BOTH)
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", "expected JSON"),
        ("[1]", "expected a JSON object, found list"),
        ('{"question": "Q?"}', "`answer`, found no such field"),
        ('{"question": 3, "answer": "#### 1"}', "`question`, found int 3"),
        ('{"question": " ", "answer": "#### 1"}', "`question`, found str"),
        ('{"question": "Q?", "answer": "1 + 1 = 2"}', "expected `answer` to end in"),
        ('{"question": "Q?", "answer": "two\\n#### two"}', "expected `answer` to end in"),
    ],
)
def test_a_malformed_row_is_an_error_with_file_and_line(
    folder: Path, line: str, words: str, traces: str
) -> None:
    path = folder / "train.jsonl"
    path.write_text(json.dumps(row(1)) + "\n\n" + line + "\n")
    with pytest.raises(KavaError, match=f"train.jsonl:3: .*{words}"):
        load_gsm8k(str(folder), traces=traces, validation=0)  # type: ignore[arg-type]


def test_what_is_no_source_is_refused(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "empty.jsonl").write_text("")
    for location, words in (
        (str(folder / "none.jsonl"), "neither a file, a folder nor a Hub name"),
        ("../none", "neither a file, a folder nor a Hub name"),
        (str(folder / "empty"), "Expected train.jsonl"),
        (str(folder / "empty.jsonl"), "No usable train row"),
    ):
        with pytest.raises(KavaError, match=words):
            load_gsm8k(location, traces="equations")
    with pytest.raises(KavaError, match=r"at least 31 usable training rows.*found 20"):
        load_gsm8k(str(folder), traces="equations", validation=30, train=1)
    with pytest.raises(KavaError, match="Expected 9 test problems, found 5"):
        load_gsm8k(str(folder), traces="equations", validation=3, test=9)


def test_a_file_of_bytes_that_are_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(KavaError, match=r"train.jsonl:1"):
        list(read_source(str(path))["train"])
