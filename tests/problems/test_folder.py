"""The problems artefact: what was written is what is asked, test sets included."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kava_core.errors import KavaError
from kava_core.problems.folder import open_problems, write_problems
from kava_core.problems.records import Problem
from kava_core.problems.synthetic import Generator

SPLITS = Generator().splits(6, 2, 3, seed=0)
ASKED = [Problem("hard-000000", "How many?", (), "7", "gsm-hard", "sums")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_problems(tmp_path, replace(SPLITS, test_sets={"hard": ASKED}), "equations", {})
    return tmp_path


def test_test_sets_are_the_own_one_first_and_then_the_others(folder: Path) -> None:
    opened = open_problems(folder)
    assert opened.test_sets() == {"synthetic": SPLITS.test, "hard": ASKED}
    assert list(opened.test_sets()) == ["synthetic", "hard"]
    assert opened.load("train") == SPLITS.train
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test_sets"]["hard"]["by_steps"] == {"0": 1}


def test_a_further_test_set_changes_nothing_that_is_taught(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_problems(other, SPLITS, "equations", {})
    names = ("train", "validation", "test")
    assert open_problems(other).fingerprint(*names) == open_problems(folder).fingerprint(*names)
    assert open_problems(other).test_sets() == {"synthetic": SPLITS.test}


def test_an_empty_or_missing_test_set_is_refused(folder: Path) -> None:
    write_problems(folder, replace(SPLITS, test_sets={"hard": []}), "equations", {})
    with pytest.raises(KavaError, match="test set hard has no problems"):
        open_problems(folder).test_sets()
    (folder / "test_sets/hard.parquet").unlink()
    with pytest.raises(KavaError, match=r"lacks test_sets/hard.parquet. Run `kava prepare`"):
        open_problems(folder)


def test_a_folder_can_name_no_file_outside_it(folder: Path) -> None:
    about = json.loads((folder / "problems.json").read_text())
    (folder / "problems.json").write_text(json.dumps(about | {"test_sets": ["../../hard"]}))
    assert list(open_problems(folder).test_sets()) == ["synthetic", "hard"]
