"""Students trained by the command: in several processes, online, stopped and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.stages.project import Project, digest

STUDENT = Path("data/smoke/students/kava")
SETTINGS = "pipelines.smoke.students.kava"


def curves(project: Project) -> dict[str, list[float]]:
    """Every curve of the student, by name."""
    folder = project.path / "data/smoke/curves/students/kava/plots/metrics"
    return {
        file.stem: [float(row.split("\t")[1]) for row in file.read_text().splitlines()[1:]]
        for file in sorted(folder.iterdir())
    }


def test_two_processes_and_online_targets_lose_what_one_process_and_the_store_do(
    copy: Project,
) -> None:
    copy.change(f"{SETTINGS}.training.held_out", {"records": 32, "every": 10})
    copy.kava("distill", "kava")
    expected = curves(copy)
    assert len(expected["eval_loss_kv"]) == 2
    copy.change(f"{SETTINGS}.targets", "online")
    copy.change(f"{SETTINGS}.processes", 2)
    copy.change("pipelines.smoke.resources", {"cpus_per_worker": 0.5})
    copy.kava("distill", "kava")
    found = curves(copy)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=5e-3), name
    about = json.loads((copy.path / STUDENT / "student.json").read_text())["settings"]
    assert (about["processes"], about["targets"]) == (2, "online")
    assert not list((copy.path / "data/.work").glob("kava-*"))


def test_how_often_is_logged_saved_and_measured_changes_nothing_but_curves(copy: Project) -> None:
    folders = (copy.path / "data/smoke/teacher", copy.path / STUDENT)
    expected, drawn = [digest(folder) for folder in folders], curves(copy)
    cadence = {"log_every": 2, "save_every": 7, "report_to": ["tensorboard"]}
    copy.change("pipelines.smoke.cadence", cadence)
    copy.kava("teacher")
    copy.kava("distill", "kava")
    assert [digest(folder) for folder in folders] == expected
    assert len(curves(copy)["loss"]) == 10 > len(drawn["loss"])
    assert (copy.path / "data/smoke/curves/teacher/plots/metrics/loss.tsv").is_file()
    runs = copy.path / "data/.runs/tensorboard/smoke"
    for run in ("teacher", "students/kava"):
        assert len(list((runs / run).glob("*/events.out.tfevents.*"))) == 1


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_saves_and_the_same_command_goes_on(copy: Project, processes: int) -> None:
    copy.change(f"{SETTINGS}.training.steps", 60)
    copy.change(f"{SETTINGS}.processes", processes)
    copy.kava("distill", "kava")
    expected, drawn = digest(copy.path / STUDENT), curves(copy)
    process = subprocess.Popen(
        [sys.executable, "-m", "stages", "distill", "kava"],
        cwd=copy.path,
        env=copy.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    checkpoints = copy.path / "data" / ".work"
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("kava-*/checkpoints/checkpoint-10")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert "of 60 and saved. Run the same command again to go on." in said
    assert "Traceback" not in said
    assert "continuing from checkpoint-" in copy.kava("distill", "kava")
    assert (digest(copy.path / STUDENT), curves(copy)) == (expected, drawn)


def test_processes_that_cannot_share_a_batch_are_refused(copy: Project) -> None:
    copy.change(f"{SETTINGS}.processes", 3)
    said = copy.kava("distill", "kava", expect=1)
    assert "batch_size 32 must be a multiple of processes 3" in said


def test_a_student_that_holds_out_too_much_is_refused(copy: Project) -> None:
    copy.change(f"{SETTINGS}.training.held_out", {"records": 500, "every": 10})
    said = copy.kava("distill", "kava", expect=1)
    assert "there are 12 training records, fewer than one batch of 32" in said
    assert "held_out.records" in said
