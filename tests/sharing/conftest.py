"""Two teams: A made targets with a tiny teacher, B has students alone."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.cli import kava
from tests.sharing.fake_hub import FakeHub

TRAINING = {"steps": 2, "batch_size": 8, "threads": 1}
KAVA = {"reads": "kv_targets", "iterations": 1, "alpha_kv": 1.0, "training": TRAINING}
NO_COT = {"reads": "problems", "training": TRAINING}
PREPARE = {
    "source": {"name": "synthetic", "steps": [2, 3], "max_operand": 9},
    "train": 24,
    "validation": 4,
    "test": 6,
}
MAKING: dict[str, Any] = {
    "prepare": PREPARE,
    "teacher": {
        "scratch": {
            "vocabulary": 300,
            "hidden_size": 32,
            "intermediate_size": 48,
            "context_length": 256,
        },
        "training": TRAINING,
        "validate_on": 4,
        "max_new_tokens": 4,
    },
    "generate": {"shard_size": 12, "batch_size": 12},
    "evict": {"budget": 3},
    "students": {"kava": KAVA, "no-cot": NO_COT},
    "evaluate": {
        "batch_size": 6,
        "max_new_tokens": 4,
        "interpret_records": 2,
        "intervention_problems": 4,
        "similarity_records": 4,
        "threads": 1,
    },
    "report": {"title": "A"},
    "resources": {"workers": 0},
}


class Team:
    """A project at `path`, its pipeline called `ours`, run in this process."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.write(settings)

    def write(self, settings: dict[str, Any]) -> None:
        text = yaml.safe_dump({"pipeline": "ours", "pipelines": {"ours": settings}})
        (self.path / "pipelines.yaml").write_text(text, encoding="utf-8")

    def kava(self, *command: str) -> None:
        """A command that knows pipelines, in this project."""
        places = ["--pipelines", self.path / "pipelines.yaml", "--data", self.path / "data"]
        kava.main([*command, *map(str, places)], standalone_mode=False)

    def data(self, *parts: str) -> Path:
        return self.path.joinpath("data", "ours", *parts)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Team:
    """Team A, with targets, teacher, students and their evaluation. Leave it as it is."""
    team = Team(tmp_path_factory.mktemp("a") / "project", MAKING)
    for stage in ("prepare", "teacher", "generate", "evict"):
        team.kava(stage)
    for student in MAKING["students"]:
        team.kava("distill", student)
    team.kava("evaluate")
    return team


@pytest.fixture(scope="session")
def exported(made: Team, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A's targets and teacher, as they go to the Hub. Leave it as it is."""
    folder = tmp_path_factory.mktemp("hub") / "export"
    options = ["--teacher", str(made.data("teacher")), "--license", "cc0-1.0"]
    kava.main(
        ["store", "export", str(made.data("kv_targets")), str(folder), *options],
        standalone_mode=False,
    )
    return folder


@pytest.fixture
def received(exported: Path, tmp_path: Path) -> Path:
    """The same folder, somewhere else, that a test may change."""
    return Path(shutil.copytree(exported, tmp_path / "received"))


@pytest.fixture
def other(tmp_path: Path) -> Team:
    """Team B, which never saw A's problems."""
    return Team(tmp_path / "b", {"students": {"kava": KAVA}})


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
