from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from tests.stages.project import Project


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The smoke pipeline, run to its end by `dvc repro`. Leave it as it is: all processes of a run
    of the tests share it."""
    base = tmp_path_factory.getbasetemp()
    common = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    path, done = common / "finished", common / "finished.done"
    with (common / "finished.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(path, ignore_errors=True)  # of another process, which failed
            Project.clone(path).repro()
            done.touch()
    return Project(path)


@pytest.fixture
def copy(finished: Project, tmp_path: Path) -> Project:
    """A copy of the finished project, DVC cache and all, that a test may change."""
    shutil.copytree(finished.path, tmp_path / "copy", symlinks=True)
    return Project(tmp_path / "copy")
