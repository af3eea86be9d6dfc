"""A run goes on from the newest checkpoint that was written to its end."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kava_core.distill.checkpoints import RandomState, last_whole_checkpoint
from kava_core.distill.fit import Stopped
from tests.distill.toy import Toy, checkpoints, files, same

DAMAGE: dict[str, tuple[str, bytes | None]] = {
    "truncated": ("trainer_state.json", b'{"epoch": 1.0, "global_st'),
    "missing": ("trainer_state.json", None),
    "empty": ("trainer_state.json", b""),
    "an empty object": ("trainer_state.json", b"{}"),
    "a list": ("trainer_state.json", b"[1]"),
    "another step's": ("trainer_state.json", b'{"global_step": 3, "stateful_callbacks": {}}'),
    "other keys": ("trainer_state.json", b'{"global_step": 8, "unheard": "of"}'),
    "not UTF-8": ("trainer_state.json", b"\xff\xfe{}"),
    "too deep": ("trainer_state.json", b"[" * 100_000),
    "half its weights": ("model.safetensors", b"\x08\x00\x00"),
    "no weights": ("model.safetensors", None),
    "half its optimizer": ("optimizer.pt", b"PK\x03\x04"),
}


@pytest.fixture(scope="module")
def stopped(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A run that was stopped with checkpoints at steps 6 and 8. Leave it as it is."""
    torch.set_num_threads(1)
    run = Toy(store, tmp_path_factory.mktemp("stopped"))
    with pytest.raises(Stopped):
        run.but(signal_at=8, signal=signal.SIGTERM).run()
    assert checkpoints(run) == [6, 8]
    return run


def test_a_torn_checkpoint_is_not_continued_from(
    stopped: Toy,
    tmp_path: Path,
    whole: tuple[dict[str, Tensor], dict[str, bytes]],
) -> None:
    shutil.copytree(stopped.folder, tmp_path / "run")
    run = Toy(stopped.store, tmp_path / "run")
    (run.checkpoints / "checkpoint-8" / "trainer_state.json").write_text("{}")
    (run.checkpoints / "checkpoint-x").mkdir()
    weights, curves = whole
    assert same(run.run(), weights)
    assert files(run.folder / "curves") == curves


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_checkpoint_that_is_whole_is_found(
    stopped: Toy, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped.checkpoints, tmp_path, dirs_exist_ok=True)
    name, content = DAMAGE[damage]
    file = tmp_path / "checkpoint-8" / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    said = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path / 'checkpoint-8'} is damaged, and is not continued from" in said
    assert not (tmp_path / "checkpoint-8").exists()


def test_what_is_no_checkpoint_is_left_alone(stopped: Toy, tmp_path: Path) -> None:
    shutil.copytree(stopped.checkpoints, tmp_path, dirs_exist_ok=True)
    for name in ("checkpoint-x", "checkpoint-", "checkpoint-9.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9").touch()  # a file in a folder's place
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    assert (tmp_path / "checkpoint-x").is_dir() and not (tmp_path / "checkpoint-9").exists()


def test_no_checkpoint_no_continuation(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path / "nothing") is None


def test_numbers_of_checkpoints_are_compared_as_numbers(stopped: Toy, tmp_path: Path) -> None:
    for step in (9, 10, 100):
        folder = tmp_path / f"checkpoint-{step}"
        shutil.copytree(stopped.checkpoints / "checkpoint-8", folder)
        state = json.loads((folder / "trainer_state.json").read_text())
        (folder / "trainer_state.json").write_text(json.dumps({**state, "global_step": step}))
    newest = last_whole_checkpoint(tmp_path)
    assert newest is not None and newest.name == "checkpoint-100"


def test_random_numbers_go_on_where_they_stood() -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    state = RandomState.now()
    first = drawn()
    assert drawn() != first
    state.restore()
    assert drawn() == first
