"""A run in other processes is followed by the curves that it writes."""

from __future__ import annotations

from pathlib import Path

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
