"""Coconut's curriculum: what is written at each stage, and how the stages follow each other."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kava_core.distill.batches import TargetsDataset
from kava_core.distill.curriculum import Stages
from kava_core.distill.fit import Stopped, fit
from kava_core.distill.match import Match
from kava_core.distill.terms import student_terms
from kava_core.errors import KavaError
from kava_core.settings import Cadence, HeldOut, Student, Training
from kava_core.store import ShardShuffleSampler, TargetsStore
from tests.distill.toy import but, toy_objective, toy_student, toy_traces, write_store
from tests.tiny import EOS, PROMPT, assert_near, tiny_student

TRAINING = Training(steps=8, batch_size=4, learning_rate=1e-2, warmup=0.25, seed=5, threads=1)
CADENCE = Cadence(log_every=1, save_every=100, gradient_share_every=0)


def in_steps(records: list[Any]) -> list[Any]:
    """Traces whose first step has one token, and the second two, as far as there are so many."""
    return [
        replace(r, step_ends=[n for n in (1, 3) if n < len(r.cot_ids)] + [len(r.cot_ids)])
        for r in records
    ]


@pytest.fixture
def store(tmp_path: Path) -> TargetsStore:
    return write_store(tmp_path / "store", in_steps(toy_traces(16)))


def settings(per_step: int = 2, training: Training = TRAINING, **length: int) -> Student:
    return Student(
        reads="kv_targets",
        reasoning="sequential",
        projection=False,
        curriculum={"latents_per_step": per_step, **(length or {"steps": 3})},
        training=training,
    )


def stages_of(student: Student, records: int = 16) -> Stages:
    found = Stages.of(student, 4, records, "students.it")
    assert found is not None
    return found


# --- what is written ------------------------------------------------------------------------------


def test_the_first_steps_give_way_to_latents_and_the_others_are_taught(
    store: TargetsStore,
) -> None:
    stages, indices = stages_of(settings()), list(range(len(store)))
    batch = TargetsDataset(store, chains=False, records=True).__getitems__(indices)
    lengths = set()
    for stage in (1, 2):
        stages.stage = stage
        found = stages.cut(batch)
        assert found["latents"] == 2 * stage
        for row, index in enumerate(indices):
            record = store.index.record(index)
            steps = len(record.step_ends)
            gone = record.step_ends[min(stage, steps) - 1]
            lengths.add((stage, steps))
            rest = [*record.cot_ids[gone:], *PROMPT]
            written = found["answer_ids"][row][found["answer_mask"][row] == 1]
            assert written.tolist() == [*rest, *record.answer_ids]
            assert written[-1] == EOS and found["prompt_lengths"][row] == len(rest)
    assert {(1, 3), (2, 3), (2, 2)} <= lengths  # and some had fewer steps than are replaced
    stages.stage = 3
    assert stages.cut(batch) is batch and "latents" not in batch


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_stage_thinks_as_a_student_with_so_many_latents(name: str) -> None:
    plain = {"reasoning": "sequential", "projection": False}
    whole = tiny_student(name, **plain)
    fewer = tiny_student(name, latents=2, answer_prompt_ids=[], **plain)
    ids, mask = torch.tensor([[9, 10, 11], [3, 12, 13]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    written = torch.tensor([[20, *PROMPT, 21, EOS], [*PROMPT, 22, EOS, 3]])
    ones = torch.tensor([[1] * 6, [1] * 5 + [0]])
    lengths = torch.tensor([4, 3])
    found = whole(ids, mask, written, ones, prompt_lengths=lengths, latents=2)
    expected = fewer(ids, mask, written, ones, prompt_lengths=lengths)
    assert_near(found.logits, expected.logits)
    assert_near(found.endpoint, expected.endpoint)
    assert_near(torch.stack(found.keys), torch.stack(expected.keys))
    assert torch.equal(found.latent_positions, expected.latent_positions)
    # In the last stage the prompt is given, as when the student is asked.
    assert_near(whole(ids, mask, written, ones).logits[:, 0], last_prompt_logits(whole, ids, mask))


def last_prompt_logits(student: Any, ids: Tensor, mask: Tensor) -> Tensor:
    prompt = torch.tensor(PROMPT).expand(2, -1)
    lengths = torch.full((2,), len(PROMPT))
    read = student(ids, mask, prompt, torch.ones_like(prompt), prompt_lengths=lengths)
    return read.logits[:, -1]


def test_records_that_know_no_steps_are_named(tmp_path: Path) -> None:
    dataset = TargetsDataset(write_store(tmp_path / "s", toy_traces(4)), False, records=True)
    with pytest.raises(KavaError, match="record toy-0 does not say where its steps end"):
        stages_of(settings()).cut(dataset.__getitems__([0, 1]))


# --- how stages follow each other -----------------------------------------------------------------


class Run:
    """A run of `fit` on a store; seen: latents of every batch that was trained on."""

    def __init__(self, store: TargetsStore, folder: Path, student: Student, signal_at: int = 0):
        self.seen: list[int] = []
        self.model = toy_student(reasoning="sequential", projection=False)
        stages, held_out = stages_of(student), range(12, 16)
        terms = student_terms(
            toy_objective(store, alpha_kv=0.0), Match.of(store), None, None, stages.cut
        )

        def counted(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
            if model.training:
                self.seen.append(stages.cut(batch).get("latents", 4))
                if len(self.seen) == signal_at:
                    os.kill(os.getpid(), signal.SIGTERM)
            return terms(model, batch)

        fit(
            self.model,
            counted,
            TargetsDataset(store, chains=False, records=True),
            ShardShuffleSampler([6, 6], seed=5),
            student.training,
            CADENCE,
            folder=folder / "checkpoints",
            curves=folder / "curves",
            title="it",
            held_out=held_out,
            stages=stages,
        )


def test_stages_follow_each_other_each_with_a_fresh_optimiser(
    store: TargetsStore, tmp_path: Path
) -> None:
    run = Run(store, tmp_path / "run", settings())
    assert run.seen == [2] * 3 + [4] * 5  # in the last two all is replaced, and less is written
    saved = torch.load(tmp_path / "run/checkpoints/checkpoint-8/optimizer.pt", weights_only=True)
    taken = {int(state["step"]) for state in saved["state"].values()}
    assert taken == {2}  # steps of the last stage
    rates = (tmp_path / "run/curves/plots/metrics/learning_rate.tsv").read_text().split()[3::2]
    assert len(set(rates[2:])) == 1 and float(rates[-1]) == 0.01


@pytest.mark.parametrize("signal_at", [2, 3, 5, 6])
def test_a_stopped_run_goes_on_in_its_stage(
    store: TargetsStore, tmp_path: Path, signal_at: int
) -> None:
    training = but(TRAINING, held_out=HeldOut(records=4, every=2))
    student = settings(training=training)
    whole = Run(store, tmp_path / "whole", student)
    with pytest.raises(Stopped):
        Run(store, tmp_path / "run", student, signal_at)
    rest = Run(store, tmp_path / "run", student)
    assert rest.seen == whole.seen[signal_at:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(rest.model.state_dict()[name], value), name
    for file in (tmp_path / "whole/curves").rglob("*.tsv"):
        other = tmp_path / "run/curves" / file.relative_to(tmp_path / "whole/curves")
        assert file.read_text() == other.read_text()


def test_a_stage_may_be_so_many_epochs() -> None:
    epochs = Training(epochs=9, batch_size=4, accumulation=2, learning_rate=1e-2)
    stages = stages_of(settings(1, epochs, epochs=2), records=19)
    assert (stages.per_step, stages.count, stages.length) == (1, 4, 4)


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (settings(3), r"it\.curriculum: expected latents_per_step 3 to divide .*, found 4"),
        (
            settings(1, steps=2),
            r"4 stages of 2 steps take 8 steps, and the training has 8: nothing",
        ),
    ],
)
def test_stages_that_do_not_fit_are_refused(student: Student, said: str) -> None:
    with pytest.raises(KavaError, match=said):
        stages_of(student)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reasoning": "jacobi"}, "curriculum: means nothing here: in a curriculum latents are"),
        ({"alpha_kv": 1.0}, "curriculum: means nothing here: in a curriculum latents stand for"),
        ({"alpha_readout": 1.0}, "curriculum: means nothing here: in a curriculum latents stand"),
        ({"curriculum": {"latents_per_step": 1}}, "exactly one of `steps` and `epochs`"),
        ({"reads": "problems"}, "curriculum: means nothing here: `reads: problems`"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], said: str) -> None:
    plain = {
        "reads": "kv_targets",
        "reasoning": "sequential",
        "curriculum": {"latents_per_step": 1, "steps": 2},
        "training": {"steps": 9},
    }
    if changes.get("reads") == "problems":
        plain.pop("reasoning")
    with pytest.raises(ValueError, match=said):
        Student.model_validate({**plain, **changes})
    assert "curriculum" not in Student(reads="kv_targets", training=TRAINING).model_dump()
