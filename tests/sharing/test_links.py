"""A folder that stands for a store on object storage is shared as the store itself would be."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.object_server import ObjectServer
from kava_core.errors import KavaError
from kava_core.store import link, objects, push
from kava_core.store.export import export
from tests.sharing.conftest import MAKING, Team
from tests.stages.project import digest


@pytest.fixture
def linked(made: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Team]:
    """Team A, whose caches and targets lie elsewhere."""
    monkeypatch.setattr(objects, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("KAVA_CACHE", str(tmp_path / "cache"))
    generate = {**MAKING["generate"], "on_error": "quarantine"}
    team = Team(tmp_path / "linked", {**MAKING, "generate": generate})
    stores = ("teacher_kv", "kv_targets")
    shutil.copytree(made.data(), team.data(), ignore=shutil.ignore_patterns(*stores))
    with ObjectServer(made.data()).running() as server:
        for name in stores:
            link(f"{server.url}/{name}", team.data(name))
        yield team


def test_it_is_published_and_exported(made: Team, linked: Team, tmp_path: Path) -> None:
    for team, place in ((made, tmp_path / "near"), (linked, tmp_path / "far")):
        team.kava("publish", "student", "kava", str(place / "student"))
        team.kava("publish", "store", str(place / "store"), "--license", "mit", "--with-teacher")
    assert digest(tmp_path / "near") == digest(tmp_path / "far")


def test_it_is_imported(made: Team, linked: Team, other: Team) -> None:
    places = [str(linked.data("kv_targets")), "--teacher", str(linked.data("teacher"))]
    other.kava("store", "import", *places)
    assert digest(other.data("kv_targets")) == digest(made.data("kv_targets"))


def test_a_student_of_problems_learns_what_it_has(made: Team, linked: Team) -> None:
    shutil.rmtree(linked.data("students/no-cot"))
    linked.kava("distill", "no-cot")
    assert digest(linked.data("students/no-cot")) == digest(made.data("students/no-cot"))


@pytest.mark.usefixtures("linked")
def test_what_is_damaged_there_is_named_there(made: Team, tmp_path: Path) -> None:
    name = "shard-00001.safetensors"
    shutil.copytree(made.data("kv_targets"), tmp_path / "far" / "kv_targets")
    content = (tmp_path / "far/kv_targets" / name).read_bytes()
    (tmp_path / "far/kv_targets" / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with ObjectServer(tmp_path / "far").running() as server:
        folder = tmp_path / "damaged"
        link(f"{server.url}/kv_targets", folder)
        with pytest.raises(KavaError, match=f"{server.url}/kv_targets/{name} does not match"):
            export(folder, tmp_path / "out")


def test_it_is_not_pushed(linked: Team) -> None:
    with pytest.raises(KavaError, match=r"has no files to push: it stands for http://"):
        push(linked.data("kv_targets"), "s3://bucket/store")
