from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.stages.project import Project


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The smoke pipeline, run to its end by `dvc repro`. Leave it as it is."""
    project = Project.clone(tmp_path_factory.mktemp("finished"))
    project.repro()
    return project


@pytest.fixture
def copy(finished: Project, tmp_path: Path) -> Project:
    """A copy of the finished project, DVC cache and all, that a test may change."""
    shutil.copytree(finished.path, tmp_path / "copy", symlinks=True)
    return Project(tmp_path / "copy")
