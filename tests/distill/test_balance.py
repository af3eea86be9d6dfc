"""Weights given as shares of the gradient, and weights that fade, against what they promise."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kava_core.distill.balance import Balance
from kava_core.settings import Cadence, Student, Training
from tests.distill import toy
from tests.distill.toy import TRAINING, Toy, curve, files, killed, same, toy_traces, write_store

EVERY_SHARE = Cadence(log_every=1, save_every=3, gradient_share_every=1)
PLAIN = toy.but(TRAINING, accumulation=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("store") / "store"
    write_store(folder, toy_traces(26))
    return folder


# --- the arithmetic -------------------------------------------------------------------------------


@given(
    norms=st.fixed_dictionaries(
        {name: st.floats(1e-6, 1e6) for name in ("answer", "cot", "kv", "codi")}
    ),
    kv=st.floats(0.01, 0.5),
    codi=st.floats(0.01, 0.49),
    done=st.floats(0, 1),
)
def test_every_term_gets_its_share(
    norms: dict[str, float], kv: float, codi: float, done: float
) -> None:
    balance = Balance({"kv": kv, "codi": codi}, fading=frozenset({"kv"}))
    weights = balance.weights(norms, done)
    sizes = {name: weights.get(name, 1.0) * norm for name, norm in norms.items()}
    shares = {name: size / sum(sizes.values()) for name, size in sizes.items()}
    assert shares["codi"] == pytest.approx(codi)
    assert shares["kv"] == pytest.approx(kv * (1 - done))
    assert shares["answer"] / shares["cot"] == pytest.approx(norms["answer"] / norms["cot"])


def test_a_term_without_gradient_gets_no_weight_and_an_absent_one_none() -> None:
    balance = Balance({"kv": 0.3, "codi": 0.3})
    assert balance.weights({"answer": 2.0, "kv": 0.0}, 0.0) == {"kv": 0.0}


def test_a_fading_number_counts_with_what_is_left_of_it() -> None:
    balance = Balance({"readout": 0.5}, fading=frozenset({"kv"}))
    norms = {"answer": 1.0, "kv": 4.0, "readout": 1.0}
    assert balance.weights(norms, 0.75) == {"readout": pytest.approx(1.0 + 4.0 * 0.25)}


# --- in training ----------------------------------------------------------------------------------


def test_a_share_is_held_in_every_step(store: Path, tmp_path: Path) -> None:
    run = Toy(store, tmp_path, PLAIN, EVERY_SHARE, balance=Balance({"kv": 0.3, "codi": 0.2}))
    run.run()
    assert curve(run, "gradient_share_kv") == pytest.approx([0.3] * PLAIN.steps, rel=1e-3)
    assert curve(run, "gradient_share_codi") == pytest.approx([0.2] * PLAIN.steps, rel=1e-3)
    weights = curve(run, "weight_kv")
    assert len(set(weights)) == PLAIN.steps and min(weights) > 0


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A run of two steps of 32 records, in one batch each, that learns next to nothing."""
    folder = tmp_path_factory.mktemp("uncut")
    write_store(folder / "store", toy_traces(32), shard_size=32)
    training = toy.but(PLAIN, steps=2, batch_size=32, learning_rate=1e-9)
    shares = Balance({"kv": 0.3, "codi": 0.2})
    run = Toy(folder / "store", folder / "run", training, EVERY_SHARE, dropout=0.0, balance=shares)
    run.run()
    return run


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 4), (2, 16)])
def test_no_weight_depends_on_how_a_step_is_cut(
    uncut: Toy, tmp_path: Path, batch_size: int, accumulation: int
) -> None:
    """A share is one of the whole step's gradient."""
    cut = toy.but(uncut.settings, batch_size=batch_size, accumulation=accumulation)
    run = uncut.but(folder=tmp_path, settings=cut)
    run.run()
    for name in ("weight_kv", "weight_codi", "gradient_share_kv", "gradient_share_answer"):
        assert curve(run, name) == pytest.approx(curve(uncut, name), rel=1e-4), name
    assert curve(run, "gradient_share_kv") == pytest.approx([0.3] * 2, rel=1e-4)


def test_shares_are_measured_every_so_many_steps(store: Path, tmp_path: Path) -> None:
    run = Toy(store, tmp_path, PLAIN, EVERY_SHARE, balance=Balance({"kv": 0.3}, every=4))
    run.run()
    weights = curve(run, "weight_kv")
    assert weights == [weights[step // 4 * 4] for step in range(PLAIN.steps)]
    assert len(set(weights)) == 3
    shares = curve(run, "gradient_share_kv")
    assert [shares[step] for step in (0, 4, 8)] == pytest.approx([0.3] * 3, rel=1e-3)


def test_a_share_survives_a_kill(store: Path, tmp_path: Path) -> None:
    """The weights of the steps 5 and 6 were measured before the checkpoint that is gone on from."""
    run = Toy(store, tmp_path / "killed", balance=Balance({"kv": 0.3}, every=4))
    assert killed(run.but(signal_at=7)) == -signal.SIGKILL
    whole = run.but(folder=tmp_path / "whole")
    assert same(run.run(), whole.run())
    assert files(run.folder / "curves") == files(whole.folder / "curves")


def test_a_fading_term_starts_whole_and_is_gone_at_the_end(store: Path, tmp_path: Path) -> None:
    """Without learning the term itself is that of the constant run."""
    still = toy.but(PLAIN, learning_rate=1e-12, weight_decay=0.0)
    constant = Toy(store, tmp_path / "constant", still, EVERY_SHARE, dropout=0.0)
    linear = constant.but(folder=tmp_path / "linear", balance=Balance(fading=frozenset({"kv"})))
    constant.run()
    linear.run()
    left = [1 - step / still.steps for step in range(still.steps)]
    expected = [x * part for x, part in zip(curve(constant, "loss_kv"), left, strict=True)]
    assert curve(linear, "loss_kv") == pytest.approx(expected, rel=1e-4)
    assert curve(linear, "loss_codi") == pytest.approx(curve(constant, "loss_codi"), rel=1e-4)


# --- settings -------------------------------------------------------------------------------------


def student(**settings: object) -> Student:
    training = Training(steps=1)
    return Student.model_validate({"reads": "kv_targets", "training": training, **settings})


def test_a_students_settings_say_what_is_balanced() -> None:
    balance = Balance.of(
        student(
            alpha_kv={"share": 0.3}, w_cot={"share": 0.1}, balance_every=7, kv_schedule="linear"
        )
    )
    assert balance == Balance({"kv": 0.3, "cot": 0.1}, 7, frozenset({"kv"}))
    assert Balance.of(student(alpha_kv=2.0)) == Balance({}, 100)


def test_shares_leave_something_to_the_answer() -> None:
    with pytest.raises(ValidationError, match=r"add up to 1\.1"):
        student(alpha_kv={"share": 0.6}, alpha_codi={"share": 0.5})


def test_a_schedule_needs_a_term() -> None:
    with pytest.raises(ValidationError, match="kv_schedule: means nothing here"):
        student(alpha_codi=1.0, kv_schedule="linear")
