"""A run in other processes is followed by the curves that it writes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kava_core.distill.callbacks import following
from tests.distill import toy
from tests.distill.toy import EVERY_STEP, TRAINING, Toy, curve


def test_a_run_elsewhere_is_followed_by_what_it_writes(store: Path, tmp_path: Path) -> None:
    run = Toy(store, tmp_path, toy.but(TRAINING, steps=2), EVERY_STEP)
    with following(tmp_path / "curves", "toy", 2) as display:
        assert display.tasks[0].completed == 0
        run.run()
    assert display.tasks[0].completed == 2
    assert f"kv {curve(run, 'loss_kv')[-1]:.3f}" in display.tasks[0].fields["note"]


def test_curves_look_for_no_repository(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=home, check=True)  # without a commit, and without DVC
    monkeypatch.chdir(home)
    run = Toy(store, home / "run", toy.but(TRAINING, steps=2), EVERY_STEP)
    run.run()
    assert len(curve(run, "loss_kv")) == 2
    assert not (home / ".dvc").exists()
