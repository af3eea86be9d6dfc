"""A run that is shown elsewhere ends as one that is not."""

from __future__ import annotations

import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from kava_core.distill.tracking import Onlooker, Tracking
from kava_core.errors import KavaError
from kava_core.settings import Cadence
from tests.distill.toy import Toy, curve, files, same


class Noisy(TrainerCallback):
    """Draws from every generator, whatever it is told; fails at one event."""

    def __init__(self, fails_at: str | None = None) -> None:
        self.fails_at = fails_at
        self.seen: list[str] = []

    def _draw(self, event: str) -> None:
        self.seen.append(event)
        random.random(), np.random.rand(), torch.rand(3)
        if event == self.fails_at:
            raise ConnectionError("nobody answers")

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._draw("begin")

    def on_log(self, *_: Any, **__: Any) -> None:
        self._draw("log")

    def on_save(self, *_: Any, **__: Any) -> None:
        self._draw("save")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._draw("end")


class Watched(Tracking):
    """Tells one callback instead of an installed tracker."""

    noisy: Noisy

    def callbacks(self) -> list[TrainerCallback]:
        return [Onlooker("watcher", lambda _: self.noisy)]


def watched(fails_at: str | None = None) -> Watched:
    made = Watched()
    object.__setattr__(made, "noisy", Noisy(fails_at))
    return made


def test_tensorboard_is_told_the_curves_and_nothing_else_changes(
    store: Path, tmp_path: Path
) -> None:
    plain = Toy(store, folder=tmp_path / "plain")
    tracking = Tracking(("tensorboard",), "smoke/students/kava", tmp_path / "board")
    told = plain.but(folder=tmp_path / "told", tracking=tracking)
    assert same(plain.run(), told.run())
    assert files(plain.folder / "curves") == files(told.folder / "curves")
    board = EventAccumulator(str(tracking.folder)).Reload()
    for name in ("loss", "loss_kv", "learning_rate"):
        events = board.Scalars(f"train/{name}")
        assert [event.value for event in events] == pytest.approx(curve(told, name), rel=1e-6)
        every = told.cadence.log_every
        assert [event.step for event in events] == [every * (i + 1) for i in range(len(events))]


def test_a_tracker_that_draws_random_numbers_changes_nothing(store: Path, tmp_path: Path) -> None:
    plain, tracking = Toy(store, folder=tmp_path / "plain"), watched()
    told = plain.but(folder=tmp_path / "told", tracking=tracking)
    assert same(plain.run(), told.run())
    assert {"begin", "log", "save", "end"} == set(tracking.noisy.seen)


def test_a_tracker_that_fails_on_the_way_is_left_out(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, tracking = Toy(store, folder=tmp_path / "plain"), watched("log")
    told = plain.but(folder=tmp_path / "told", tracking=tracking)
    assert same(plain.run(), told.run())
    assert tracking.noisy.seen.count("log") == 1
    captured = capsys.readouterr()
    said = " ".join((captured.out + captured.err).split())
    assert said.count("watcher does not take reports (nobody answers)") == 1


def test_one_that_cannot_begin_ends_the_run_at_once(store: Path, tmp_path: Path) -> None:
    told = Toy(store, folder=tmp_path / "told", tracking=watched("begin"))
    with pytest.raises(KavaError, match=r"watcher does not take reports \(nobody answers\)"):
        told.run()
    assert not list(told.checkpoints.glob("checkpoint-*"))


def test_one_that_cannot_be_made_is_one_sentence() -> None:
    def make(_: str) -> TrainerCallback:
        raise RuntimeError("not there")

    with pytest.raises(KavaError, match=r"watcher does not take reports \(not there\)"):
        Onlooker("watcher", make)


def test_the_folder_that_a_tracker_leaves_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m stages` looks for packages in the project, where W&B makes `wandb/`."""
    if (found := find_spec("wandb")) is not None and found.origin is not None:
        pytest.skip("wandb is installed here")
    (tmp_path / "wandb/offline-run").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KavaError, match="wandb is not installed"):
        Tracking.of(Cadence(report_to=("wandb",)), tmp_path / "data/smoke/teacher")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_what_is_not_installed_is_one_sentence(name: str, tmp_path: Path) -> None:
    if find_spec(name):
        pytest.skip(f"{name} is installed here")
    cadence = Cadence(report_to=(name,))  # type: ignore[arg-type]
    with pytest.raises(KavaError) as error:
        Tracking.of(cadence, tmp_path / "data/smoke/teacher")
    assert str(error.value) == (
        f"cadence.report_to: {name} is not installed. Install it (`pip install {name}`), or leave "
        "it out."
    )


def test_a_run_is_called_as_its_artefact_and_lies_outside_of_all(tmp_path: Path) -> None:
    cadence = Cadence(report_to=("tensorboard",))
    tracking = Tracking.of(cadence, tmp_path / "data/smoke/students/kava")
    assert tracking.name == "smoke/students/kava"
    runs = tmp_path / "data/.runs/tensorboard/smoke/students/kava"
    assert tracking.folder.parent == runs and not runs.exists()
    assert Tracking.of(Cadence(), tmp_path / "data/smoke/teacher").callbacks() == []


@pytest.mark.parametrize("value", [["clearml"], ["wandb", "wandb"], "tensorboard"])
def test_who_is_told_is_one_of_four_and_named_once(value: Any) -> None:
    with pytest.raises(ValidationError, match="report_to"):
        Cadence.model_validate({"report_to": value})
