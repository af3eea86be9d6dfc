"""`kava repro`: DVC's own work, with students side by side."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from datetime import datetime, timedelta

import psutil
import pytest

from tests.stages.project import Project, end_session, ran, small


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


@pytest.mark.parametrize("jobs", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_told_to_end_it_leaves_no_dvc_and_no_stage_at_work(copy: Project, jobs: str) -> None:
    small(copy)
    shell = copy.path / "shell"  # one that waits for what it runs, as dash does and bash does not
    shell.write_text('#!/bin/sh\n/bin/sh "$@"\nexit $?\n')
    shell.chmod(0o755)
    for student in ("kava", "no-cot"):
        copy.change(f"pipelines.small.students.{student}.training.steps", 1_000_000)
    repro = subprocess.Popen(
        ["kava", "repro", "--jobs", jobs, "--pipeline", "small"],
        cwd=copy.path,
        env={**copy.environment, "SHELL": str(shell)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    work, deadline = copy.path / "data/.work", time.monotonic() + 300
    try:
        while sum(
            bool(list(work.glob(f"distill-{each}-*.lock"))) for each in ("kava", "no-cot")
        ) < int(jobs):
            assert repro.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        started = psutil.Process(repro.pid).children(recursive=True)
        assert len(started) >= 2 * int(jobs)  # a DVC and its stage for each
        repro.send_signal(signal.SIGTERM)
        said, _ = repro.communicate(timeout=300)
    finally:
        end_session(repro.pid)
    assert repro.returncode == 128 + signal.SIGTERM, said
    assert "interrupted; run the same command again" in said and "Traceback" not in said
    assert not [process for process in started if process.is_running()]
    for student in ("kava", "no-cot"):
        copy.change(f"pipelines.small.students.{student}.training.steps", 2)
    done = ran(copy.kava("repro", "--jobs", jobs, "--pipeline", "small"))
    assert {"distill@kava", "distill@no-cot", "report"} <= done and "teacher" not in done
