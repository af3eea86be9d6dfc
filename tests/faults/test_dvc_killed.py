"""dvc itself killed: the stage that outlives it is named by the next `dvc repro`, with its pid."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.conftest import Tell
from tests.stages.project import Project

PATIENCE = 300


def stage_of(dvc: psutil.Process, project: Project) -> psutil.Process:
    """The stage `teacher` that dvc has started, once it has its lock."""
    deadline = time.monotonic() + PATIENCE
    work = project.path / "data" / ".work"
    while time.monotonic() < deadline:
        assert dvc.is_running()
        if list(work.glob("teacher-*.lock")):
            for child in dvc.children(recursive=True):
                command = child.cmdline()
                if "teacher" in command and any("kava" in part for part in command):
                    return child
        time.sleep(0.02)
    raise AssertionError("the stage did not start in time")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stage_that_outlives_dvc_is_named(
    tmp_path: Path, number: signal.Signals, tell: Tell
) -> None:
    project = Project.clone(tmp_path / "project")
    target = "pipelines/smoke/dvc.yaml"
    dvc = subprocess.Popen(
        ["dvc", "repro", f"{target}:teacher"],
        cwd=project.path,
        env=project.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    stage = stage_of(psutil.Process(dvc.pid), project)
    os.kill(stage.pid, signal.SIGSTOP)  # as long as the test looks
    dvc.send_signal(number)
    dvc.wait(PATIENCE)
    try:
        assert stage.is_running()
        again = subprocess.run(
            ["dvc", "repro", f"{target}:teacher"],
            cwd=project.path,
            env=project.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        said = " ".join(again.stdout.split())
        assert again.returncode != 0 and "`teacher` is at work already" in said, said
        assert re.search(rf"process {stage.pid} on this machine", said), said
    finally:
        os.kill(stage.pid, signal.SIGKILL)
    project.run("dvc", "repro", f"{target}:teacher")  # as it says, once that one is ended
    assert not list((project.path / "data" / ".work").iterdir())
    tell(f"dvc killed by {number.name}", "while a stage works", "the next run names the stage")
