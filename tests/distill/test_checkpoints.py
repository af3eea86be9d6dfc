"""A run goes on from the newest checkpoint that was written to its end."""

from __future__ import annotations

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


@pytest.mark.parametrize("damage", ["truncated", "missing", "empty"])
def test_a_checkpoint_cut_off_while_it_was_written_is_not_continued_from(
    store: Path,
    tmp_path: Path,
    whole: tuple[dict[str, Tensor], dict[str, bytes]],
    damage: str,
) -> None:
    run = Toy(store, tmp_path)
    with pytest.raises(Stopped):
        run.but(signal_at=8, signal=signal.SIGTERM).run()
    assert checkpoints(run) == [6, 8]
    state = run.checkpoints / "checkpoint-8" / "trainer_state.json"
    if damage == "truncated":
        state.write_bytes(state.read_bytes()[:200])
    elif damage == "missing":
        (state.parent / "optimizer.pt").unlink()
        state.unlink()
    else:
        shutil.rmtree(state.parent)
        state.parent.mkdir()
    newest = last_whole_checkpoint(run.checkpoints)
    assert newest is not None and newest.name == "checkpoint-6"
    assert checkpoints(run) == [6]
    weights, curves = whole
    assert same(run.run(), weights)
    assert files(tmp_path / "curves") == curves


def test_no_checkpoint_no_continuation(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path / "nothing") is None


def test_numbers_of_checkpoints_are_compared_as_numbers(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
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
