"""No secret of the environment gets into what is made or said, files are made with the modes asked
for, and every dependency has a licence that allows what this project's allows."""

from __future__ import annotations

import importlib.util
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from kava_core.parallel.cluster import _own_folder
from stages.cli import kava
from tests.faults import starve
from tests.faults.conftest import Tell
from tests.faults.stage import STAGES, Stage
from tests.golden.inputs import NAME
from tests.stages.project import ROOT


def holding(folder: Path, secrets: list[str]) -> list[str]:
    """The files below `folder`, by name or content, that hold a secret."""
    return [
        str(file)
        for file in folder.rglob("*")
        if any(secret in str(file) for secret in secrets)
        or (file.is_file() and any(secret.encode() in file.read_bytes() for secret in secrets))
    ]


@pytest.mark.parametrize("name", STAGES)
def test_nothing_that_is_made_or_said_holds_a_secret(
    make_stage: Callable[[str], Stage], name: str, tell: Tell
) -> None:
    stage = make_stage(name)
    there = set(stage.home.rglob("*"))
    assert stage.run(starve.with_secrets)[0] == 0, stage.said
    assert holding(stage.home, list(starve.SECRETS.values())) == []
    made = [path for path in stage.home.rglob("*") if path not in there and path != stage.log]
    assert made and not [path for path in made if stat.S_IMODE(path.stat().st_mode) & 0o077]
    tell("secrets in the environment", f"{len(starve.SECRETS)} of them", "in nothing made or said")


def test_a_failing_stage_tells_no_secret(
    make_stage: Callable[[str], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where a traceback was asked for."""
    home = make_stage("evict").home
    (home / "data" / NAME / "teacher_kv" / "manifest.json").write_text("{")
    for name, secret in starve.SECRETS.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.chdir(home)
    result = CliRunner().invoke(kava, ["--verbose", "evict"])
    said = f"{result.output} {result.exception}"
    assert result.exception and not any(secret in said for secret in starve.SECRETS.values())


def test_an_exported_card_holds_no_secret(
    make_stage: Callable[[str], Stage], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = make_stage("distill").home
    for name, secret in starve.SECRETS.items():
        monkeypatch.setenv(name, secret)
    store, card = home / "data" / NAME / "kv_targets", tmp_path / "card"
    result = CliRunner().invoke(kava, ["store", "export", str(store), str(card)])
    assert result.exit_code == 0, result.output
    assert (card / "README.md").is_file()
    assert holding(card, list(starve.SECRETS.values())) == []


def test_rays_folder_is_its_owners() -> None:
    with _own_folder() as folder:
        assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o700


@pytest.fixture(scope="module")
def licences() -> ModuleType:
    spec = importlib.util.spec_from_file_location("licences", ROOT / "docs" / "licences.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["licences"] = module
    spec.loader.exec_module(module)
    return module


def test_every_dependency_has_a_licence_that_is_known(licences: ModuleType) -> None:
    """`make licences` says them; one that is unknown, or asks for more than notice, is an error."""
    found = licences.found()
    pinned = [line.partition("==")[0] for line in licences.pinned()]
    assert len(found) == len(pinned) > 20
    assert {entry.name for entry in found} == set(pinned)
    assert licences.wrong(found) == []


def test_a_licence_that_asks_for_more_is_named(licences: ModuleType) -> None:
    entries = [licences.Entry("a", "1", "MIT"), licences.Entry("b", "2", "AGPL-3.0-only"),
               licences.Entry("c", "3", "")]  # fmt: skip
    assert [entry.name for entry in licences.wrong(entries)] == ["b", "c"]
