"""What is logged is the mean of what was measured, and what is no number ends the run."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kava_core.console import console
from kava_core.distill.balance import Balance
from kava_core.distill.batches import TargetsDataset
from kava_core.distill.fit import fit
from kava_core.distill.match import Match
from kava_core.distill.terms import student_terms
from kava_core.errors import KavaError
from kava_core.settings import Cadence, HeldOut
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

EVERY_SHARE = Cadence(log_every=1, save_every=3, gradient_share_every=1)


def test_the_loss_is_the_sum_of_its_terms_and_a_mean_since_the_last_log(
    store: Path, tmp_path: Path
) -> None:
    every = Toy(store, tmp_path / "every", cadence=EVERY_STEP)
    second = every.but(folder=tmp_path / "second", cadence=Cadence(log_every=2, save_every=3))
    assert same(every.run(), second.run())
    terms = [curve(every, f"loss_{name}") for name in ("answer", "kv", "codi")]
    assert curve(every, "loss") == pytest.approx(np.sum(terms, axis=0).tolist(), rel=1e-6)
    pairs = np.reshape(curve(every, "loss"), (5, 2)).mean(1)
    assert curve(second, "loss") == pytest.approx(pairs.tolist(), rel=1e-6)


def test_shares_of_the_gradient_are_measured_and_a_weak_term_is_named(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", toy_traces(4))
    objective = toy.toy_objective(store, alpha_kv=1e-6)
    student = toy_student()
    terms = student_terms(objective, Match.of(store))
    dataset = TargetsDataset(store, chains=False)
    settings = toy.but(TRAINING, steps=1, accumulation=1)
    run = Toy(tmp_path / "store", tmp_path, settings, EVERY_SHARE)

    norms = {}
    for name in ("answer", "codi", "kv"):
        student.zero_grad()
        batch = dataset.__getitems__([*ShardShuffleSampler(store.sizes, seed=settings.seed)])
        terms(student, batch)[name].backward()
        squares = [float(p.grad.double().square().sum())
                   for p in student.parameters() if p.grad is not None]  # fmt: skip
        norms[name] = sum(squares) ** 0.5
    student.zero_grad()

    with console.capture() as captured:
        fit(
            student,
            terms,
            dataset,
            ShardShuffleSampler(store.sizes, seed=settings.seed),
            settings,
            EVERY_SHARE,
            folder=run.checkpoints,
            curves=tmp_path / "curves",
            title="toy",
        )
    said = captured.get()
    for name, norm in norms.items():
        share = norm / sum(norms.values())
        assert curve(run, f"gradient_share_{name}") == [pytest.approx(share, rel=1e-4)]
    assert "the kv term carries 0.00% of the gradient at step 0" in said
    assert said.count("warning") == 1


def test_what_is_due_is_measured_once_a_step(store: Path, tmp_path: Path) -> None:
    """Weights and shares alike, on both batches for each of three terms; a batch names these."""
    opened = TargetsStore.open(store)
    terms = student_terms(toy.toy_objective(opened), Match.of(opened))
    calls: list[list[str]] = []

    def counted(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        calls.append(batch["ids"])
        return terms(model, batch)

    fit(
        toy_student(),
        counted,
        TargetsDataset(opened, chains=False),
        ShardShuffleSampler(opened.sizes, seed=0),
        toy.but(TRAINING, steps=4),
        Cadence(gradient_share_every=2),
        folder=tmp_path / "checkpoints",
        curves=tmp_path / "curves",
        title="toy",
        balance=Balance({"kv": 0.3}, every=2),
    )
    assert len(calls) == 4 * 2 + 2 * (1 + 3 * 2)


def test_a_gradient_that_is_no_number_ends_the_run_and_names_its_term(
    store: Path, tmp_path: Path
) -> None:
    opened = TargetsStore.open(store)
    terms = student_terms(toy.toy_objective(opened), Match.of(opened))

    def with_a_kink(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Finite where its gradient is not."""
        found = terms(model, batch)
        return {**found, "codi": (0 * found["codi"]).sqrt()}

    with pytest.raises(KavaError, match="the gradient of codi became no number at step 1, on the"):
        fit(
            toy_student(),
            with_a_kink,
            TargetsDataset(opened, chains=False),
            ShardShuffleSampler(opened.sizes, seed=0),
            TRAINING,
            EVERY_SHARE,
            folder=tmp_path / "checkpoints",
            curves=tmp_path / "curves",
            title="toy",
        )


def test_a_term_alone_has_no_share(store: Path, tmp_path: Path) -> None:
    opened = TargetsStore.open(store)
    run = Toy(store, tmp_path, toy.but(TRAINING, steps=1), EVERY_SHARE)
    fit(
        toy_student(),
        student_terms(toy.toy_objective(opened, alpha_kv=0.0, alpha_codi=0.0), Match.of(opened)),
        TargetsDataset(opened, chains=False),
        ShardShuffleSampler(opened.sizes, seed=0),
        run.settings,
        run.cadence,
        folder=run.checkpoints,
        curves=tmp_path / "curves",
        title="toy",
    )
    names = {file.stem for file in (tmp_path / "curves/plots/metrics").iterdir()}
    assert names == {"loss", "loss_answer", "learning_rate", "grad_norm"}


# --- held-out records -----------------------------------------------------------------------------


def test_held_out_records_are_measured_and_change_nothing(store: Path, tmp_path: Path) -> None:
    """The last 2 of 26 records are left over by every epoch anyway, but for being held out."""
    settings = toy.but(TRAINING, batch_size=3, held_out=HeldOut(records=2, every=4))
    watched = Toy(store, tmp_path / "watched", settings, held_out=2)
    alone = watched.but(folder=tmp_path / "alone", settings=toy.but(settings, held_out=None))
    assert same(watched.run(), alone.run())
    extra = {"eval_loss", *(f"eval_loss_{name}" for name in ("answer", "codi", "kv"))}
    plots = Path("curves") / "plots" / "metrics"
    names = {path.stem for path in (watched.folder / plots).iterdir()}
    assert names - {path.stem for path in (alone.folder / plots).iterdir()} == extra
    for name in names - extra:
        assert curve(watched, name) == curve(alone, name)


def test_held_out_losses_are_those_of_the_records(store: Path, tmp_path: Path) -> None:
    """Means over the two records, though a batch of one is measured at a time; without dropout."""
    settings = toy.but(TRAINING, steps=1, batch_size=1, held_out=HeldOut(records=2, every=1))
    run = Toy(store, tmp_path, settings, EVERY_STEP, dropout=0.3, held_out=2)
    weights = run.run()
    student, opened = toy_student(), TargetsStore.open(store)
    student.load_state_dict(weights)
    terms = student_terms(toy.toy_objective(opened), Match.of(opened))
    with torch.no_grad():
        expected = terms(
            student.eval(), TargetsDataset(opened, chains=False).__getitems__([24, 25])
        )
    for name, value in expected.items():
        assert curve(run, f"eval_loss_{name}") == [pytest.approx(float(value), rel=1e-5)]
    total = sum(float(value) for value in expected.values())
    assert curve(run, "eval_loss") == [pytest.approx(total, rel=1e-5)]


@pytest.mark.parametrize(
    "balance", [Balance({"kv": 0.3}, every=2), Balance(fading=frozenset({"kv"}))]
)
def test_held_out_losses_are_those_of_weights_that_stay(
    store: Path, tmp_path: Path, balance: Balance
) -> None:
    """A share counts with weight 1, and what fades as a whole: values of a curve compare."""
    settings = toy.but(TRAINING, steps=4, held_out=HeldOut(records=2, every=1))
    run = Toy(store, tmp_path, settings, EVERY_STEP, held_out=2, balance=balance)
    student, opened = toy_student(), TargetsStore.open(store)
    student.load_state_dict(run.run())
    terms = student_terms(toy.toy_objective(opened), Match.of(opened))
    with torch.no_grad():
        expected = terms(
            student.eval(), TargetsDataset(opened, chains=False).__getitems__([24, 25])
        )
    for name, value in expected.items():
        assert curve(run, f"eval_loss_{name}")[-1] == pytest.approx(float(value), rel=1e-5)
    total = sum(float(value) for value in expected.values())
    assert curve(run, "eval_loss")[-1] == pytest.approx(total, rel=1e-5)


def test_held_out_losses_survive_a_kill(store: Path, tmp_path: Path) -> None:
    settings = toy.but(TRAINING, held_out=HeldOut(records=2, every=2))
    run = Toy(store, tmp_path / "killed", settings, held_out=2)
    assert killed(run.but(signal_at=8)) == -signal.SIGKILL  # 4 and 6 evaluated, 6 saved
    whole = run.but(folder=tmp_path / "whole")
    assert same(run.run(), whole.run())
    assert files(run.folder / "curves") == files(whole.folder / "curves")


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_no_number_names_the_records_and_saves_what_came_before(
    store: Path, tmp_path: Path, accumulation: int
) -> None:
    """The checkpoint is that of step 4, though the second batch of step 5 is the broken one."""
    run = Toy(store, tmp_path, toy.but(TRAINING, accumulation=accumulation))
    opened = TargetsStore.open(store)
    terms = student_terms(toy.toy_objective(opened), Match.of(opened))
    seen = toy.Seen()

    def broken(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        at, result = seen.number(batch), terms(model, batch)
        return {**result, "kv": result["kv"] * float("nan")} if at == last else result

    last = 5 * accumulation
    with pytest.raises(KavaError) as error:
        fit(
            toy_student(dropout=0.1),
            broken,
            TargetsDataset(opened, chains=False),
            ShardShuffleSampler(opened.sizes, seed=TRAINING.seed),
            run.settings,
            run.cadence,
            folder=run.checkpoints,
            curves=tmp_path / "curves",
            title="toy",
        )
    assert "nan at step 5" in str(error.value)
    assert f"records {', '.join(seen.batches[last - 1])}. The state before" in str(error.value)
    assert checkpoints(run) == [3, 4]
    assert same(run.run(), run.but(folder=tmp_path / "whole").run())
    assert files(tmp_path / "curves") == files(tmp_path / "whole" / "curves")
