"""A teacher learns in one process or in several, and is the same one, to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kava_core.distill.teacher_job import TrainedTeacher, train_teacher
from kava_core.problems.folder import open_problems, write_problems
from kava_core.problems.splits import ProblemSplits
from kava_core.settings import Cadence, Resources, Teacher
from tests.evaluation.talker import problems


def trained(folder: Path, processes: int, **more: Any) -> TrainedTeacher:
    everything = problems()
    batch = len(everything) // 2 * 2
    write_problems(folder / "problems", ProblemSplits(*[everything] * 3), "equations", {})
    settings = Teacher.model_validate(
        {
            "scratch": {"vocabulary": 280, "hidden_size": 32, "intermediate_size": 32},
            "training": {"steps": 3, "batch_size": batch, "threads": 1},
            "processes": processes,
            **more,
        }
    )
    return train_teacher(
        settings,
        open_problems(folder / "problems"),
        folder / "data/teacher",
        Cadence(log_every=1),
        Resources(),
    )


def curve(teacher: TrainedTeacher) -> list[float]:
    text = (teacher.curves / "plots/metrics/loss.tsv").read_text()
    return [float(row.split("\t")[1]) for row in text.splitlines()[1:]]


@pytest.mark.usefixtures("two_cores")
def test_a_teacher_may_learn_in_two_processes(tmp_path: Path) -> None:
    one, two = trained(tmp_path / "one", 1), trained(tmp_path / "two", 2)
    assert curve(two) == pytest.approx(curve(one), rel=1e-4) and len(curve(one)) == 3
    assert curve(one)[-1] < curve(one)[0]
    names = [sorted(p.name for p in teacher.folder.iterdir()) for teacher in (one, two)]
    assert names[0] == names[1]
    found = [load_file(teacher.folder / "model.safetensors") for teacher in (one, two)]
    assert max(float((x - found[1][k]).abs().max()) for k, x in found[0].items()) < 1e-3
    one.save({"n": 1})
    two.save({"n": 1})
    assert [teacher.about["settings"]["processes"] for teacher in (one, two)] == [1, 2]


def test_a_teacher_that_forgets_is_another_one_and_says_so(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", 1)
    forgets = {"keeps": "steps", "share": 1.0}
    other = trained(tmp_path / "other", 1, forgets=forgets)
    assert other.about["settings"]["forgets"] == forgets
    assert "forgets" not in whole.about["settings"]
    one, two = (load_file(t.folder / "model.safetensors") for t in (whole, other))
    assert any(not torch.equal(x, two[name]) for name, x in one.items())
