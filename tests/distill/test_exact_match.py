"""Held-out records are asked while a model learns, and the best weights are kept if wanted."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

from kava_core.distill.exact_match import best_step
from kava_core.errors import KavaError
from kava_core.settings import ExactMatch, HeldOut, Training
from tests.distill.toy import (
    TRAINING,
    Toy,
    but,
    checkpoints,
    files,
    killed,
    same,
    toy_questions,
    toy_student,
    toy_traces,
    write_store,
)
from tests.tiny import COMMON, EOS, tiny_model

HELD = 6
STEPS = 12


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of problems whose answers are all but two alike, which is soon learnt."""
    folder = tmp_path_factory.mktemp("alike") / "store"
    traces = [
        replace(trace, answer_ids=[9 if i % 12 else 11, EOS])
        for i, trace in enumerate(toy_traces(36))
    ]
    write_store(folder, traces)
    return folder


def asking(store: Path, folder: Path, **settings: Any) -> Toy:
    exact_match = ExactMatch(records=4, **{"every": 2, "max_new_tokens": 3, **settings})
    held_out = HeldOut(records=HELD, every=5)
    training = but(
        TRAINING, steps=STEPS, accumulation=1, held_out=held_out, exact_match=exact_match
    )
    return Toy(store, folder, settings=training, held_out=HELD)


def curve(run: Toy) -> dict[int, float]:
    text = (run.folder / "curves/plots/metrics/exact_match.tsv").read_text()
    rows = [line.split("\t") for line in text.splitlines()[1:]]
    return {int(step): float(value) for step, value in rows}


@pytest.fixture(scope="module")
def best(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, dict[str, Tensor]]:
    run = asking(store, tmp_path_factory.mktemp("best"), keep="best")
    return run, run.run()


def test_it_is_measured_on_time_and_changes_nothing_of_the_training(
    store: Path, tmp_path: Path, best: tuple[Toy, dict[str, Tensor]]
) -> None:
    last = asking(store, tmp_path / "last", every=5)
    never = last.but(folder=tmp_path / "never", settings=but(last.settings, exact_match=None))
    assert same(last.run(), never.run())
    assert list(curve(last)) == [5, 10, STEPS]  # and after the last step
    for name in ("loss", "eval_loss"):
        of_one, of_other = (
            run.folder / f"curves/plots/metrics/{name}.tsv" for run in (last, never)
        )
        assert of_one.read_text() == of_other.read_text()
    assert not (never.folder / "curves/plots/metrics/exact_match.tsv").exists()
    found = curve(best[0])
    assert list(found) == [2, 4, 6, 8, 10, 12]
    assert {step: found[step] for step in (10, 12)} == {
        step: curve(last)[step] for step in (10, 12)
    }
    assert 0 <= found[2] < max(found.values()) <= 100
    assert (
        json.loads((best[0].folder / "curves/metrics.json").read_text())["exact_match"]
        == (found[12])
    )


def test_the_best_weights_are_those_of_the_first_best_step(
    store: Path, tmp_path: Path, best: tuple[Toy, dict[str, Tensor]]
) -> None:
    run, weights = best
    found = curve(run)
    step = min(s for s, value in found.items() if value == max(found.values()))
    assert step < STEPS
    stopped = asking(store, tmp_path, keep="best").but(signal_at=step, signal=signal.SIGTERM)
    with pytest.raises(KavaError, match=f"stopped at step {step} of"):
        stopped.run()
    then = load_file(stopped.checkpoints / f"checkpoint-{step}" / "model.safetensors")
    assert then.keys() <= weights.keys()
    assert all(torch.equal(x, weights[name]) for name, x in then.items())
    last = asking(store, tmp_path / "last").run()
    assert not same(last, weights)


def test_killed_again_and_again_it_ends_with_the_same_weights_and_curves(
    store: Path, tmp_path: Path, best: tuple[Toy, dict[str, Tensor]]
) -> None:
    run = asking(store, tmp_path, keep="best")
    for step in (5, 6):  # of its own: after measurements that no checkpoint has
        assert killed(run.but(signal_at=step)) == -signal.SIGKILL
    assert checkpoints(run)
    assert same(run.run(), best[1])
    assert files(run.folder / "curves") == files(best[0].folder / "curves")
    assert same(run.run(), best[1])  # killed between its end and its artefact


def test_few_folders_of_weights_are_kept_and_a_missing_one_is_named(
    best: tuple[Toy, dict[str, Tensor]], tmp_path: Path
) -> None:
    assert len(list(best[0].checkpoints.glob("best-*"))) <= 2
    shutil.copytree(best[0].folder, tmp_path / "run")
    run = best[0].but(folder=tmp_path / "run")
    for folder in run.checkpoints.glob("best-*"):
        shutil.rmtree(folder)
    with pytest.raises(KavaError, match=r"best-\d+ is missing: expected the weights of step \d+"):
        run.run()


def test_adapters_and_their_base_are_the_best_ones_too(store: Path, tmp_path: Path) -> None:
    run = asking(store, tmp_path, keep="best").but(adapted=True)
    weights = run.run()
    step = best_step([{"exact_match": v, "step": s} for s, v in curve(run).items()])
    if step == STEPS:
        pytest.skip("the last step is the best one")
    then = load_file(run.checkpoints / f"best-{step}" / "model.safetensors")
    assert all(torch.equal(x, weights[name]) for name, x in then.items())


def test_who_is_asked_one_by_one_answers_the_same() -> None:
    traces = [replace(t, answer_ids=[9, EOS]) for t in toy_traces(9)]
    student = toy_student().eval()
    model = tiny_model(LlamaConfig(**COMMON), torch.float32)
    for asked in (student, model):
        # What it writes first, taken for the answer of every other record, is right.
        questions = toy_questions(traces)
        written = [first(asked, trace.question_ids) for trace in traces]
        golds = [
            replace(t, answer_ids=[w if i % 2 else 63 - w, EOS])
            for i, (t, w) in enumerate(zip(traces, written, strict=True))
        ]
        questions = replace(questions, records=golds)
        together = questions.correct(asked, range(9), batch_size=4, max_new_tokens=1)
        alone = [questions.correct(asked, [i], batch_size=1, max_new_tokens=1) for i in range(9)]

        assert together == sum(alone) and alone == [i % 2 for i in range(9)]


def first(asked: Any, question: list[int]) -> int:
    ids = torch.tensor([question])
    out = asked.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)
    return int(out[0, len(question)])


def test_the_first_of_the_best_steps_is_the_best_one() -> None:
    assert best_step([{"loss": 1.0, "step": 1}]) is None
    log = [{"exact_match": value, "step": step} for step, value in enumerate((10.0, 30.0, 30.0))]
    assert best_step([*log, {"loss": 2.0, "step": 3}]) == 1


@pytest.mark.parametrize("held_out", [None, {"records": 3, "every": 1}])
def test_what_is_asked_is_held_out(held_out: Any) -> None:
    with pytest.raises(ValidationError, match=r"at most held_out.records, [03], found 4"):
        Training(steps=1, held_out=held_out, exact_match=ExactMatch(records=4, every=1))
    assert "exact_match" not in Training(steps=1).model_dump()  # nor in what a student says of it
