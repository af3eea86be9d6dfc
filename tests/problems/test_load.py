"""From files to splits: every row is used, counted, or an error that names it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kava_core.errors import KavaError
from kava_core.problems.load import Limits, Reading, load_splits, load_test_set
from kava_core.problems.readers import Location
from kava_core.problems.records import TraceForm, normalise_question
from kava_core.problems.sources.gsm8k import GSM8K
from kava_core.problems.sources.gsm8k_aug import GSM8kAug
from kava_core.problems.sources.gsm_hard import GSMHard
from kava_core.problems.splits import ProblemSplits, count_leaks

BOTH: tuple[TraceForm, ...] = ("equations", "sentences")


def row(number: int, notes: bool = True, question: str | None = None) -> dict[str, str]:
    note = f"<<{number} + 1000={number + 1000}>>" if notes else ""
    return {
        "question": question or f"Ada has {number} pens and buys 1,000 more. How many has she now?",
        "answer": f"Ada has {number}+1000 = {note}{number + 1000:,} pens.\n\n"
        f"She keeps them all.\n#### {number + 1000:,}",
    }


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def load(
    location: Path | str,
    traces: TraceForm = "equations",
    limits: Limits | None = None,
    **sizes: Any,
) -> ProblemSplits:
    drop_last_step = sizes.pop("drop_last_step", False)
    reading = Reading(traces, drop_last_step, limits or Limits())
    return load_splits(GSM8K(), Location(str(location)), reading, **sizes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", [row(n) for n in range(20)] + [row(20, notes=False)])
    write(tmp_path / "test.jsonl", [row(n) for n in range(100, 105)] + [row(105, notes=False)])
    return tmp_path


def test_every_row_is_used_or_counted(folder: Path) -> None:
    splits = load(folder, train=10, validation=4, test=3)
    assert {
        name: len(problems) for name, problems in (splits.taught() | splits.asked()).items()
    } == {
        "train": 10,
        "validation": 4,
        "test": 3,
    }
    assert splits.dropped == {
        "train": {"beyond the number asked for": 6, "no steps": 1},
        "test": {"beyond the number asked for": 3},
    }
    assert load(folder, "sentences", validation=4).dropped == {}


def test_a_test_problem_is_asked_whether_it_has_steps_or_not(folder: Path) -> None:
    test = load(folder, validation=4).test
    assert [len(problem.steps) for problem in test] == [1, 1, 1, 1, 1, 0]
    assert test[-1].id == "gsm8k-test-000005"


def test_validation_is_cut_by_the_seed_and_not_by_the_size_of_train(folder: Path) -> None:
    first = load(folder, validation=5)
    assert load(folder, validation=5) == first
    fewer = load(folder, validation=5, train=3)
    assert fewer.validation == first.validation
    assert fewer.train == first.train[:3]
    assert load(folder, validation=5, seed=1) != first
    questions = {p.question for p in first.train} & {p.question for p in first.validation}
    assert not questions


def test_a_validation_set_of_the_source_is_kept_in_its_order_and_out_of_train(folder: Path) -> None:
    write(folder / "valid.jsonl", [row(3), row(50), row(51)])
    splits = load(folder, validation=2)
    assert [p.id for p in splits.validation] == [
        "gsm8k-validation-000000",
        "gsm8k-validation-000001",
    ]
    assert splits.validation[0].question == row(3)["question"]
    assert len(splits.train) == 19
    assert splits.dropped["train"] == {"no steps": 1, "question of the validation set": 1}
    assert splits.dropped["validation"] == {"beyond the number asked for": 1}
    with pytest.raises(KavaError, match="Expected 4 validation problems, found 3"):
        load(folder, validation=4)


def test_one_file_is_cut_into_three(folder: Path) -> None:
    path = folder / "train.jsonl"
    splits = load(path, validation=3, test=4)
    assert [len(problems) for problems in (splits.taught() | splits.asked()).values()] == [13, 3, 4]
    with pytest.raises(KavaError, match="no test problems"):
        load(path, validation=3)


def test_repeated_training_questions_are_dropped_and_counted(folder: Path) -> None:
    write(folder / "train.jsonl", [row(n) for n in (1, 2, 3, 1)])
    splits = load(folder, validation=1)
    assert len(splits.train) == 2
    assert splits.dropped["train"] == {"repeated question": 1}


def test_the_last_step_can_be_left_out(folder: Path) -> None:
    splits = load(folder, "sentences", validation=2, drop_last_step=True)
    assert all(p.steps[0].startswith("Ada has") and len(p.steps) == 1 for p in splits.train)
    with pytest.raises(KavaError, match="20 with no step but the last, 1 with no steps"):
        load(folder, validation=2, drop_last_step=True)


def test_what_is_too_long_is_left_out_and_counted(folder: Path) -> None:
    long = row(7, question="Ada has 7 pens. " + "She waits a day. " * 20 + "How many has she now?")
    write(folder / "train.jsonl", [row(n) for n in range(12)] + [long])
    write(folder / "test.jsonl", [row(100), {**long, "question": long["question"] + " And now?"}])
    limits = Limits(max_question_characters=100)
    splits = load(folder, validation=2, limits=limits)
    reason = "question longer than 100 characters"
    assert splits.dropped == {"train": {reason: 1}, "test": {reason: 1}}

    limits = Limits(max_trace_characters=14)  # "<<7+1000=1007>>" is longer, a test trace may be
    with pytest.raises(KavaError, match="13 with trace longer than 14 characters"):
        load(folder, validation=2, limits=limits)
    splits = load(folder, "sentences", validation=2, limits=Limits(max_trace_characters=47))
    assert len(splits.test) == 2
    assert splits.dropped == {"train": {"trace longer than 47 characters": 2}}
    with pytest.raises(KavaError, match="13 with more than 1 steps"):
        load(folder, "sentences", validation=2, limits=Limits(max_steps=1))


def test_a_test_question_in_train_is_an_error_unless_allowed_or_taken_out(folder: Path) -> None:
    asked = row(7)["question"].upper().replace("?", " ?")
    write(folder / "test.jsonl", [row(100), row(101, question=asked)])
    further = {"other": load(folder, validation=2).train[:3]}
    splits = load(folder, validation=2)
    with pytest.raises(KavaError, match="train or validation: 1 of test; the first is gsm8k-test-"):
        count_leaks(splits, allow=False)
    with pytest.raises(KavaError, match="1 of test, 3 of other"):
        count_leaks(replace(splits, test_sets=further), allow=False)
    assert count_leaks(replace(splits, test_sets=further), allow=True) == {"test": 1, "other": 3}

    clean = load(folder, validation=2, deduplicate=True, test_sets=further)
    assert count_leaks(replace(clean, test_sets=further), allow=False) == {"test": 0, "other": 0}
    asked_anywhere = {normalise_question(p.question) for p in [*splits.test, *further["other"]]}
    taken_out = len(asked_anywhere & {normalise_question(row(n)["question"]) for n in range(20)})
    assert clean.dropped["train"]["question of a test set"] == taken_out
    assert len(clean.train) + len(clean.validation) == 20 - taken_out


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
    folder: Path, line: str, words: str, traces: TraceForm
) -> None:
    path = folder / "train.jsonl"
    path.write_text(json.dumps(row(1)) + "\n\n" + line + "\n")
    with pytest.raises(KavaError, match=f"train.jsonl:3: .*{words}"):
        load(folder, traces, validation=0)


def test_too_few_rows_are_refused(folder: Path) -> None:
    with pytest.raises(KavaError, match=r"at least 31 usable training rows.*found 20"):
        load(folder, validation=30, train=1)
    with pytest.raises(KavaError, match="Expected 9 test problems, found 6"):
        load(folder, validation=3, test=9)
    (folder / "test.jsonl").write_text("")
    with pytest.raises(KavaError, match=r"No usable test row in .*: it has no rows"):
        load(folder, validation=3)
    (folder / "train.jsonl").unlink()
    with pytest.raises(KavaError, match=r"expected a split `train`, found \['test'\]"):
        load(folder, validation=3)


def test_a_form_that_a_source_does_not_have_is_refused(tmp_path: Path) -> None:
    location = Location(str(tmp_path))
    with pytest.raises(KavaError, match=r"prepare.traces: gsm8k-aug has equations, found senten"):
        load_splits(GSM8kAug(), location, Reading("sentences"))
    with pytest.raises(KavaError, match=r"prepare.source: gsm-hard has no traces to teach"):
        load_splits(GSMHard(), location, Reading("equations"))


def test_a_test_set_takes_the_split_called_test_or_the_only_one(folder: Path) -> None:
    def read(location: Path, split: str | None = None) -> list[str]:
        found = load_test_set(
            "asked", GSM8K(), Location(str(location)), Reading("equations"), split=split
        )
        return [problem.id for problem in found.read.problems]

    assert read(folder) == [f"asked-{n:06d}" for n in range(6)]
    assert len(read(folder, "train")) == len(read(folder / "train.jsonl")) == 21
    with pytest.raises(KavaError, match=r"test_sets.asked: expected a split `dev`.*train, test"):
        read(folder, "dev")


def test_a_test_set_without_the_form_asked_for_brings_the_one_it_has(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("How many?||<<1+1=2>> #### 2\nAnd now?|| #### two\n")
    location = Location(str(tmp_path))
    found = load_test_set("aug", GSM8kAug(), location, Reading("sentences"))
    assert [problem.steps for problem in found.read.problems] == [("<<1+1=2>>",)]
    assert found.read.counts() == {"answer is no number": 1}
    (tmp_path / "test.txt").write_text("How many?||<<1+1=2>> #### two\nAnd now?|| ####\n")
    with pytest.raises(KavaError, match="1 with answer is no number, 1 with no answer"):
        load_test_set("aug", GSM8kAug(), location, Reading("equations"))


def test_what_each_split_was_read_from_is_recorded(folder: Path) -> None:
    origins = load(folder, validation=4).origins
    assert {split: list(found["files"]) for split, found in origins.items()} == {
        "train": ["train.jsonl"],
        "validation": ["train.jsonl"],  # cut from it
        "test": ["test.jsonl"],
    }
    found = load_test_set("asked", GSM8K(), Location(str(folder)), Reading("equations"))
    assert found.origin == origins["test"]
