"""Team B trains from team A's targets, by the commands of docs/sharing.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.stages.project import ROOT, Project, digest

DATA = Path("data/smoke")


def commands(heading: str) -> list[list[str]]:
    """The command lines under a heading of the page."""
    page = (ROOT / "docs" / "sharing.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"^### {re.escape(heading)}\n\n```sh\n(.*?)```", page, re.M | re.S)
    return [shlex.split(line) for line in block.splitlines()]


@pytest.fixture
def team_a(copy: Project, tmp_path: Path) -> Project:
    for command in commands("Team A: make them and push them"):
        copy.run(*[str(tmp_path / "remote") if x == "/path/to/remote" else x for x in command])
    return copy


def test_a_clone_trains_from_targets_and_teacher_alone(team_a: Project, tmp_path: Path) -> None:
    team_a.run("git", "clone", "-q", str(team_a.path), str(tmp_path / "b"))
    team_b = Project(tmp_path / "b")
    for command in commands("Team B: in a clone of the repository, train from them"):
        team_b.run(*command)
    assert sorted(p.name for p in (team_b.path / DATA).iterdir() if p.is_dir()) == [
        "curves",
        "kv_targets",
        "students",
        "teacher",
    ]
    trained = digest(team_b.path / DATA / "students/kava")
    assert trained == digest(team_a.path / DATA / "students/kava")


def test_another_project_imports_them(team_a: Project, tmp_path: Path) -> None:
    team_b = Project(tmp_path / "b")
    team_b.path.mkdir()
    team_b.run("git", "init", "-q")
    team_b.run("dvc", "init", "-q")
    (team_b.path / DATA).mkdir(parents=True)
    for command in commands("Team B: in a project of its own"):
        team_b.run(*[str(team_a.path) if x == "URL" else x for x in command])
    for name in ("kv_targets", "teacher"):
        assert digest(team_b.path / DATA / name) == digest(team_a.path / DATA / name)
