"""The problem artefacts: what was written is what is taught and asked, each apart."""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from kava_core.errors import KavaError
from kava_core.problems.folder import (
    open_problems,
    open_test_sets,
    write_problems,
    write_test_sets,
)
from kava_core.problems.records import Problem, TraceForm
from kava_core.problems.sources.synthetic import Synthetic
from kava_core.problems.splits import ProblemSplits

SPLITS = Synthetic().splits(6, 2, 3, seed=0)
ASKED = [Problem("hard-000000", "How many?", (), "7", "gsm-hard", "sums")]
WITH_HARD = replace(
    SPLITS,
    test_sets={"hard": ASKED},
    rows={"hard": 3},
    dropped={"hard": {"no answer": 2}},
    leaked={"hard": 1},
)


def taught(path: Path, splits: ProblemSplits) -> Path:
    path.mkdir(exist_ok=True)
    write_problems(path, splits, "equations", {"seed": 0})
    return path


def asked(path: Path, splits: ProblemSplits) -> Path:
    path.mkdir(exist_ok=True)
    write_test_sets(path, splits, "equations", {"seed": 0})
    return path


def without_problems(file: Path) -> None:
    """Spoil all of a Parquet file but its footer."""
    content = bytearray(file.read_bytes())
    last = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[4:last] = bytes(last - 4)
    file.write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_is_taught_is_read_as_it_was(tmp_path: Path) -> None:
    opened = open_problems(taught(tmp_path, SPLITS))
    assert (opened.load("train"), opened.load("validation")) == (SPLITS.train, SPLITS.validation)
    assert opened.traces == "equations"
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["train"]["problems"] == 6
    assert metrics["rows"]["train"] == {"in": 6, "kept": 6, "dropped": {}}


def test_a_worker_opens_a_file_without_reading_a_problem(tmp_path: Path) -> None:
    opened = open_problems(taught(tmp_path, SPLITS))
    assert opened.open_unchecked("train")[:] == opened.open("train")[:] == SPLITS.train
    without_problems(tmp_path / "train.parquet")
    problems = opened.open_unchecked("train")
    assert len(problems) == opened.count("train") == 6
    for read in (lambda: problems[0], lambda: opened.open("train")):
        with pytest.raises(KavaError, match="is not a readable Parquet file"):
            read()


def test_test_sets_are_the_own_one_first_and_then_the_others(tmp_path: Path) -> None:
    opened = open_test_sets(asked(tmp_path, WITH_HARD))
    assert opened.load_all() == {"synthetic": SPLITS.test, "hard": ASKED}
    assert list(opened.load_all()) == ["synthetic", "hard"]
    assert (opened.load(), opened.load("hard")) == (SPLITS.test, ASKED)
    assert opened.traces == "equations"
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["test_sets"]["hard"]["by_steps"] == {"0": 1}
    assert metrics["test_sets"]["test"]["problems"] == 3
    assert metrics["rows"]["hard"] == {"in": 3, "kept": 1, "dropped": {"no answer": 2}}
    assert metrics["leaked"] == {"hard": 1}


def test_a_further_test_set_changes_nothing_that_is_taught(tmp_path: Path) -> None:
    one, other = taught(tmp_path / "one", SPLITS), taught(tmp_path / "other", WITH_HARD)
    assert contents(one) == contents(other)
    without, with_hard = asked(tmp_path / "a", SPLITS), asked(tmp_path / "b", WITH_HARD)
    assert open_test_sets(without).load_all() == {"synthetic": SPLITS.test}
    prints = [open_test_sets(folder).fingerprint("test") for folder in (without, with_hard)]
    assert prints[0] == prints[1]


@pytest.mark.parametrize("traces", get_args(TraceForm))
def test_every_form_of_traces_can_be_opened_again(tmp_path: Path, traces: TraceForm) -> None:
    write_problems(tmp_path, SPLITS, traces, {})
    write_test_sets(tmp_path, SPLITS, traces, {})
    assert open_problems(tmp_path).traces == open_test_sets(tmp_path).traces == traces


def test_a_fingerprint_names_problems_and_the_form_of_their_steps(tmp_path: Path) -> None:
    opened = open_problems(taught(tmp_path, SPLITS))
    assert replace(opened, traces="sentences").fingerprint("train") != opened.fingerprint("train")
    before = opened.fingerprint("train"), opened.fingerprint("validation")
    taught(tmp_path, replace(SPLITS, train=SPLITS.train[:5]))
    assert opened.fingerprint("train") != before[0]
    assert opened.fingerprint("validation") == before[1]


def test_an_empty_or_missing_set_is_refused(tmp_path: Path) -> None:
    asked(tmp_path, replace(SPLITS, test_sets={"hard": []}))
    with pytest.raises(KavaError, match="test set hard has no problems"):
        open_test_sets(tmp_path).load_all()
    (tmp_path / "hard.parquet").unlink()
    with pytest.raises(KavaError, match=r"lacks hard.parquet. Run `kava prepare`"):
        open_test_sets(tmp_path)
    (taught(tmp_path / "taught", SPLITS) / "train.parquet").unlink()
    with pytest.raises(KavaError, match=r"lacks train.parquet. Run `kava prepare`"):
        open_problems(tmp_path / "taught")


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    folders = taught(tmp_path / "taught", SPLITS), asked(tmp_path / "asked", SPLITS)
    with pytest.raises(KavaError, match=r"test_sets.json is missing"):
        open_test_sets(folders[0])
    with pytest.raises(KavaError, match=r"problems.json is missing"):
        open_problems(folders[1])
    (folders[0] / "problems.json").write_text("{}")
    with pytest.raises(KavaError, match=r"does not say how traces are written"):
        open_problems(folders[0])


def test_a_folder_can_name_no_file_outside_it(tmp_path: Path) -> None:
    asked(tmp_path, WITH_HARD)
    about = json.loads((tmp_path / "test_sets.json").read_text())
    (tmp_path / "test_sets.json").write_text(json.dumps(about | {"test_sets": ["../../hard"]}))
    assert list(open_test_sets(tmp_path).load_all()) == ["synthetic", "hard"]
