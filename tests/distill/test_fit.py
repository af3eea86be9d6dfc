"""A killed run ends like one that was never killed, whatever it was trained with."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, TrainingArguments

from kava_core.distill.batches import AnswerDataset, ChainDataset, TargetsDataset
from kava_core.distill.callbacks import STOP_FILE
from kava_core.distill.fit import Stopped, fit
from kava_core.distill.match import Match
from kava_core.distill.terms import chain_terms, student_terms
from kava_core.errors import KavaError
from kava_core.settings import Cadence
from kava_core.store import ShardShuffleSampler, TargetsStore
from tests.distill import toy
from tests.distill.toy import (
    EVERY_STEP,
    TRAINING,
    Toy,
    checkpoints,
    curve,
    files,
    killed,
    same,
    toy_student,
    toy_traces,
    write_store,
)
from tests.tiny import COMMON, tiny_model

MARK = "KAVA_TESTED"

# --- kills --------------------------------------------------------------------------------------


def test_sigkill_again_and_again_changes_neither_weights_nor_curves(
    store: Path, tmp_path: Path, whole: tuple[dict[str, Tensor], dict[str, bytes]]
) -> None:
    run = Toy(store, tmp_path)
    # In steps 2, 5, 7 and 10: before the first checkpoint; between two; and twice after
    # a log that no checkpoint has. Checkpoints 3, 6 and 9 stand between epochs and within logs.
    for step, kept in ((2, []), (5, [3]), (4, [3, 6]), (4, [6, 9])):
        assert killed(run.but(signal_at=step)) == -signal.SIGKILL
        assert checkpoints(run) == kept
    weights, curves = whole
    assert same(run.run(), weights)
    assert files(tmp_path / "curves") == curves


def test_sigterm_saves_and_stops_and_the_rest_follows(
    store: Path, tmp_path: Path, whole: tuple[dict[str, Tensor], dict[str, bytes]]
) -> None:
    run = Toy(store, tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=r"stopped at step 2 of 10 and saved.*again"):
        run.but(signal_at=2, signal=signal.SIGTERM).run()
    assert checkpoints(run) == [2]
    assert signal.getsignal(signal.SIGTERM) is before
    weights, curves = whole
    assert same(run.run(), weights)
    assert files(tmp_path / "curves") == curves


def test_a_run_that_is_told_to_end_says_so_with_the_status_of_the_signal(
    store: Path, tmp_path: Path
) -> None:
    run = Toy(store, tmp_path)
    with pytest.raises(Stopped) as ended:
        run.but(signal_at=2, signal=signal.SIGTERM).run()
    assert issubclass(Stopped, KavaError)
    passed_on = pickle.loads(pickle.dumps(ended.value))  # as training processes do
    assert (str(passed_on), passed_on.status) == (str(ended.value), 128 + signal.SIGTERM)
    (run.checkpoints / STOP_FILE).touch()
    with pytest.raises(Stopped, match="stopped at step 3 of 10 and saved") as ended:
        run.run()
    assert ended.value.status == 1  # nobody sent a signal


def test_a_run_killed_after_its_last_step_takes_no_further_one(
    store: Path, tmp_path: Path, whole: tuple[dict[str, Tensor], dict[str, bytes]]
) -> None:
    run = Toy(store, tmp_path)
    run.run()
    weights, curves = whole
    shutil.rmtree(tmp_path / "curves")
    for _ in range(2):
        assert same(run.run(), weights)
        assert files(tmp_path / "curves") == curves
    assert checkpoints(run)[-1] == TRAINING.steps


def test_adapters_and_chains_survive_a_kill(store: Path, tmp_path: Path) -> None:
    run = Toy(store, tmp_path / "killed", adapted=True, chains=True)
    assert killed(run.but(signal_at=5)) == -signal.SIGKILL
    continued = run.run()
    undisturbed = run.but(folder=tmp_path / "whole").run()
    assert same(continued, undisturbed)
    changed = [name for name, x in toy_student(adapted=True).state_dict().items()
               if not torch.equal(x, undisturbed[name])]  # fmt: skip
    assert any("lora_B" in name for name in changed)
    assert not any("base_layer" in name or "embed" in name for name in changed)


def test_half_precision_survives_a_kill(store: Path, tmp_path: Path) -> None:
    settings = toy.but(TRAINING, precision="bfloat16")
    run = Toy(store, tmp_path / "killed", settings, adapted=True)
    assert killed(run.but(signal_at=5)) == -signal.SIGKILL
    undisturbed = run.but(folder=tmp_path / "whole")
    assert same(run.run(), undisturbed.run())
    assert files(tmp_path / "killed" / "curves") == files(tmp_path / "whole" / "curves")
    exact = run.but(folder=tmp_path / "exact", settings=TRAINING)
    exact.run()
    assert curve(exact, "loss") != curve(undisturbed, "loss")
    assert curve(exact, "loss") == pytest.approx(curve(undisturbed, "loss"), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, TRAINING.steps + 1))
def test_sigkill_at_any_step(
    store: Path, tmp_path: Path, whole: tuple[dict[str, Tensor], dict[str, bytes]], step: int
) -> None:
    run = Toy(store, tmp_path)
    assert killed(run.but(signal_at=step)) == -signal.SIGKILL
    assert same(run.run(), whole[0])
    assert files(tmp_path / "curves") == whole[1]


def test_loader_processes_change_nothing(
    store: Path, tmp_path: Path, whole: tuple[dict[str, Tensor], dict[str, bytes]]
) -> None:
    forks: list[int] = []
    os.register_at_fork(before=lambda: forks.append(1))
    run = Toy(store, tmp_path, loader_workers=1)
    assert same(run.run(), whole[0])
    assert not forks  # which would take over locks that other threads hold, of Ray for one
    assert files(tmp_path / "curves") == whole[1]


class Marked(Toy):
    """What it starts has its folder in the environment."""

    def run(self) -> dict[str, Tensor]:
        os.environ[MARK] = str(self.folder)
        return super().run()


def started_by(run: Marked) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(run.folder):
                found.append(process)
    return found


def test_loader_processes_end_with_a_training_that_is_killed(store: Path, tmp_path: Path) -> None:
    run = Marked(store, tmp_path, loader_workers=2)
    assert killed(run.but(signal_at=4)) == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while left := started_by(run):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_process_that_sees_many_gpus_computes_on_one(
    store: Path,
    tmp_path: Path,
    whole: tuple[dict[str, Tensor], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Left to itself the Trainer would wrap the model in `nn.DataParallel` and take eight batches
    for one."""
    plain = TrainingArguments._setup_devices.func

    def eight(arguments: TrainingArguments) -> torch.device:
        device = plain(arguments)
        arguments._n_gpu = 8
        return device

    faked = cached_property(eight)
    faked.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", faked)
    assert same(Toy(store, tmp_path).run(), whole[0])
    assert files(tmp_path / "curves") == whole[1]


def test_the_seed_changes_the_run(
    store: Path, tmp_path: Path, whole: tuple[dict[str, Tensor], dict[str, bytes]]
) -> None:
    other = toy.but(TRAINING, seed=6)
    assert not same(Toy(store, tmp_path, other).run(), whole[0])


def test_the_decay_of_the_second_moment_changes_the_run(
    store: Path, tmp_path: Path, whole: tuple[dict[str, Tensor], dict[str, bytes]]
) -> None:
    other = toy.but(TRAINING, adam_beta2=0.9)
    assert not same(Toy(store, tmp_path, other).run(), whole[0])


def test_the_cadence_changes_no_weight_not_even_half_way(
    store: Path, tmp_path: Path, whole: tuple[dict[str, Tensor], dict[str, bytes]]
) -> None:
    run = Toy(store, tmp_path)
    assert killed(run.but(signal_at=5)) == -signal.SIGKILL
    other = run.but(cadence=Cadence(log_every=1, save_every=2, gradient_share_every=0))
    assert same(other.run(), whole[0])
    undisturbed = other.but(folder=tmp_path / "other")
    assert same(undisturbed.run(), whole[0])


# --- order and cutting ----------------------------------------------------------------------------


def fit_recording(folder: Path, settings: Any, records: int = 16) -> list[list[str]]:
    """The records of every batch of a run, in order."""
    traces, seen = toy_traces(records), []
    student = toy_student(latents=0)
    terms = student_terms(toy.toy_objective(None), None)

    def recorded(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        seen.append(batch["ids"])
        return terms(model, batch)

    fit(
        student,
        recorded,
        AnswerDataset(traces, chains=False),
        ShardShuffleSampler([9, records - 9], seed=settings.seed),
        settings,
        toy.EVERY_STEP,
        folder=folder / "checkpoints",
        curves=folder / "curves",
        title="toy",
    )
    return seen


def test_records_come_in_the_samplers_order_epoch_after_epoch(tmp_path: Path) -> None:
    settings = toy.but(TRAINING, steps=8, accumulation=1)
    seen = fit_recording(tmp_path, settings)
    sampler = ShardShuffleSampler([9, 7], seed=TRAINING.seed)
    expected = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        expected += [f"toy-{i}" for i in sampler]
    assert [name for batch in seen for name in batch] == expected
    assert expected[:16] != expected[16:]


def test_a_batch_of_8_is_two_accumulated_batches_of_4(tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_store(store, toy_traces(24))
    settings = toy.but(TRAINING, steps=6)
    parts = Toy(store, tmp_path / "parts", settings, EVERY_STEP, dropout=0.0, chains=True)
    together = Toy(
        store,
        tmp_path / "together",
        toy.but(settings, batch_size=8, accumulation=1),
        EVERY_STEP,
        dropout=0.0,
        chains=True,
    )
    a, b = parts.run(), together.run()
    largest = max(float((x - b[name]).abs().max()) for name, x in a.items())
    assert largest < 2e-4  # Adam divides by the gradient's size, and with it by its rounding
    for name in ("loss", "loss_answer", "loss_cot", "loss_kv", "loss_codi", "grad_norm"):
        assert curve(parts, name) == pytest.approx(curve(together, name), rel=1e-4), name


def test_a_cosine_follows_the_warm_up(store: Path, tmp_path: Path) -> None:
    run = Toy(store, tmp_path, cadence=EVERY_STEP)
    run.run()
    expected = [0.0, 0.5, *(0.5 * (1 + np.cos(np.pi * k / 8)) for k in range(8))]
    assert curve(run, "learning_rate") == pytest.approx([1e-2 * x for x in expected], abs=1e-9)


# --- other models and precisions ------------------------------------------------------------------


def test_half_precision_leaves_the_caller_its_own_model(store: Path, tmp_path: Path) -> None:
    run = Toy(store, tmp_path, toy.but(TRAINING, steps=2, precision="bfloat16"))
    opened = TargetsStore.open(store)
    student = toy_student()
    before = type(student).forward
    fit(
        student,
        student_terms(toy.toy_objective(opened), Match.of(opened)),
        TargetsDataset(opened, chains=False),
        ShardShuffleSampler(opened.sizes, seed=0),
        run.settings,
        run.cadence,
        folder=run.checkpoints,
        curves=tmp_path / "curves",
        title="toy",
    )
    assert student.forward.__func__ is before  # no autocast is left around it
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_a_teacher_learns_its_chains(tmp_path: Path) -> None:
    traces = toy_traces(4)
    model = tiny_model(LlamaConfig(**COMMON), torch.float32)
    dataset = ChainDataset(traces)
    with torch.no_grad():
        first = float(chain_terms(model, dataset.__getitems__([0, 1, 2, 3]))["chain"])
    fit(
        model,
        chain_terms,
        dataset,
        ShardShuffleSampler([4], seed=0),
        toy.but(TRAINING, steps=40, accumulation=1),
        toy.CADENCE,
        folder=tmp_path / "checkpoints",
        curves=tmp_path / "curves",
        title="teacher",
    )
    with torch.no_grad():
        last = float(chain_terms(model.eval(), dataset.__getitems__([0, 1, 2, 3]))["chain"])
    assert last < 0.2 * first
