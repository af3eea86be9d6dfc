"""A stage that would fill the disk says so before it begins."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner

from kava_core.distill.teacher_job import train_teacher
from kava_core.planning.room import lacking_room, student_lacking_room
from kava_core.problems.folder import open_problems
from kava_core.settings import Cadence, load_pipeline
from stages.cli import kava
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


def test_the_checkpoints_of_a_training_need_room_too(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, settings = load_pipeline(made / "pipelines.yaml")
    folder, often = made / "data" / NAME, Cadence(save_every=1, gradient_share_every=0)
    problems = open_problems(folder / "problems")
    trained = train_teacher(
        settings.teacher, problems, tmp_path / "teacher", often, settings.resources
    )
    model = size_of(trained.folder / "model.safetensors")
    (checkpoint, _) = sorted((trained.folder.parent / "checkpoints").glob("checkpoint-*"))
    one = sum(map(size_of, checkpoint.iterdir()))
    student = partial(student_lacking_room, settings.students["kava"])
    for cadence, written in ((often, 3 * one), (Cadence(), one + model)):  # two and the next; one
        own = settings.model_copy(update={"cadence": cadence})
        source, output = folder / "kv_targets", folder / "students/kava"
        for lacking, place in (
            (partial(lacking_room, own, folder, "teacher"), folder / "teacher"),
            (partial(student, cadence, str(folder / "teacher"), source, output), output),
        ):
            assert lacking() is None
            for share, fits in ((0.8, False), (1.25, True)):
                free = round(share * written)
                monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(0, 0, free))
                said = lacking()
                assert (said is None) == fits, (place, written, said)
                assert fits or f"{place} will take about 0.0 GB with the checkpoints" in str(said)
            monkeypatch.undo()


def test_stages_that_train_say_it_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_inputs(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 1))
    options = ["--pipelines", str(home / "pipelines.yaml"), "--data", str(home / "data")]
    for stage in (["distill", "no-cot"], ["teacher"]):
        done = CliRunner(catch_exceptions=False).invoke(kava, [*stage, *options])
        assert done.exit_code == 0, done.output
        assert f"{' '.join(stage)}: {home / 'data' / NAME}" in done.output
        assert "its disk has 0.0 GB free. Make room there" in " ".join(done.output.split())


def size_of(file: Path) -> int:
    return file.stat().st_size
