"""`kava repro`: DVC's own work, with students side by side."""

from __future__ import annotations

import json
from datetime import datetime, timedelta

from tests.stages.project import Project, ran
from tests.stages.test_dvc import small


def test_students_are_trained_at_once_and_dvc_knows(copy: Project) -> None:
    small(copy)
    said = copy.kava("repro", "--jobs", "2", "--pipeline", "small")
    students = {"distill@kava", "distill@no-cot"}
    making = {"prepare", "teacher", "generate", "evict", "evaluate", "report"}
    assert ran(said) == making | students
    assert said.count("Running stage") == 8
    log = (copy.path / "data/.runs/small.jsonl").read_text().splitlines()
    times = {}
    for each in map(json.loads, log):
        began = datetime.fromisoformat(each["started"])
        times[each["stage"]] = began, began + timedelta(seconds=each["seconds"])
    one, two = times["distill kava"], times["distill no-cot"]
    assert one[0] < two[1] and two[0] < one[1]  # each began before the other's end
    # Nothing is left to DVC, which finds what it would have made itself.
    assert ran(copy.run("dvc", "repro", "pipelines/small/dvc.yaml")) == set()

    copy.change("pipelines.small.students.kava.alpha_kv", 0.5)
    assert ran(copy.kava("repro", "--jobs", "2", "--pipeline", "small")) == {
        "distill@kava",
        "evaluate",
        "report",
    }


def test_a_student_that_fails_ends_it_with_a_sentence(copy: Project) -> None:
    small(copy)
    lora = {"rank": 2, "targets": ["no_such_module"]}
    copy.change("pipelines.small.students.kava.training.lora", lora)
    said = copy.kava("repro", "--jobs", "2", "--pipeline", "small", expect=1)
    assert "no_such_module" in said
    assert "error: `dvc --wait-for-lock repro --single-item" in said and "what is done" in said
    assert "Traceback" not in said
    assert "Running stage 'pipelines/small/dvc.yaml:evaluate'" not in said
