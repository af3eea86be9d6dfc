"""A stage that would fill the disk says so before it begins."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from kava_core.planning.room import lacking_room
from kava_core.settings import load_pipeline
from tests.golden.inputs import NAME, make_inputs


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with problems, a teacher and both stores."""
    return make_inputs(tmp_path_factory.mktemp("room"))


def test_what_does_not_fit_is_said_with_its_size(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, settings = load_pipeline(made / "pipelines.yaml")
    folder = made / "data" / NAME
    for artefact in ("teacher_kv", "kv_targets"):
        assert lacking_room(settings, folder, artefact) is None
        size = sum(path.stat().st_size for path in (folder / artefact).rglob("*"))
        for free, fits in ((size // 2, False), (2 * size, True)):
            monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(0, 0, free))
            said = lacking_room(settings, folder, artefact)
            assert (said is None) == fits, (artefact, size, said)
        monkeypatch.undo()


def test_what_is_sent_to_a_bucket_needs_no_room(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, settings = load_pipeline(made / "pipelines.yaml")
    resources = settings.resources.model_copy(update={"targets_to": "s3://bucket/team"})
    sent = settings.model_copy(update={"resources": resources})
    folder = made / "data" / NAME
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 1))
    assert lacking_room(sent, folder, "kv_targets") is None
    assert lacking_room(sent, folder, "teacher_kv") is not None


def test_where_there_are_no_problems_nothing_is_said(made: Path, tmp_path: Path) -> None:
    _, settings = load_pipeline(made / "pipelines.yaml")
    assert lacking_room(settings, tmp_path, "kv_targets") is None
