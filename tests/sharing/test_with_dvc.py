"""Students alone, through DVC: what they import changes, and they are trained anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sharing.conftest import KAVA, Team
from tests.stages.project import Project, digest, ran


@pytest.mark.slow
def test_dvc_trains_from_folders_of_another_project(
    made: Team, received: Path, tmp_path: Path
) -> None:
    places = {"targets": "../received/store", "teacher": str(received / "teacher")}
    team = Team(tmp_path / "b", {"imports": places, "students": {"kava": KAVA}})
    project = Project(team.path)
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
        project.run(*command)
    project.run("git", "commit", "-q", "-m", "Start")  # DVCLive wants one
    project.run("kava", "sync")
    file = "pipelines/ours/dvc.yaml"
    assert ran(project.run("dvc", "repro", file)) == {"distill@kava"}
    assert digest(team.data("students/kava")) == digest(made.data("students/kava"))
    assert ran(project.run("dvc", "repro", file)) == set()
    team.write({"imports": places, "students": {"kava": {**KAVA, "alpha_kv": 2.0}}})
    assert ran(project.run("dvc", "repro", file)) == {"distill@kava"}
    # Another teacher's weights are noticed, and refused.
    config = received / "teacher/config.json"
    config.write_text(config.read_text("utf-8").replace("1e-06", "1e-05"), encoding="utf-8")
    said = project.run("dvc", "repro", file, expect=255)
    assert "was made with the teacher" in said
