"""The first records teach, the last are held out, shard by shard, and a batch must be left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from kava_core.distill.batches import TargetsDataset
from kava_core.distill.fit import fit
from kava_core.distill.held_out import hold_out
from kava_core.distill.match import Match
from kava_core.distill.terms import student_terms
from kava_core.errors import KavaError
from kava_core.settings import Cadence, HeldOut, Training
from kava_core.store import ShardShuffleSampler
from tests.distill.toy import toy_objective, toy_student, toy_traces, write_store

PATH = "students.kava.training"


def training(held_out: int = 0, **changes: int) -> Training:
    apart = HeldOut(records=held_out, every=1) if held_out else None
    return Training(**{"steps": 1, "batch_size": 4, "held_out": apart, **changes})


@pytest.mark.parametrize(
    ("records", "taught"), [(0, [6, 6, 2]), (1, [6, 6, 1]), (2, [6, 6]), (5, [6, 3]), (10, [4])]
)
def test_the_last_records_are_held_out(records: int, taught: list[int]) -> None:
    assert hold_out([6, 6, 2], training(records), PATH) == (taught, range(14 - records, 14))


@pytest.mark.parametrize(
    ("records", "held_out", "taught"),
    [(4, 0, [4]), (7, 0, [6, 1]), (12, 2, [6, 6]), (14, 0, [6, 6, 2])],
)
def test_the_first_records_teach(records: int, held_out: int, taught: list[int]) -> None:
    settings = training(held_out, records=records)
    assert hold_out([6, 6, 2], settings, PATH) == (taught, range(14 - held_out, 14))
    assert settings.taught(14) == records
    epochs = training(held_out, records=records, steps=None, epochs=3)
    assert epochs.total_steps(epochs.taught(14)) == 3 * (records // 4)


def test_a_student_sees_those_alone(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", toy_traces(16))
    settings = training(records=8, steps=5)
    seen: set[str] = set()

    def noting(student: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        seen.update(batch["ids"])
        return terms(student, batch)

    terms = student_terms(toy_objective(store, alpha_kv=0.0), Match.of(store))
    taught, _ = hold_out(store.sizes, settings, PATH)
    fit(
        toy_student(), noting, TargetsDataset(store, chains=False),
        ShardShuffleSampler(taught, seed=0), settings, Cadence(),
        folder=tmp_path / "checkpoints", curves=tmp_path / "curves", title="few",
    )  # fmt: skip
    assert seen == {store.index.record(i).id for i in range(8)}


def test_more_records_than_there_are_are_refused() -> None:
    said = r"training\.records: expected at most the 12 training records .* held out, found 13"
    with pytest.raises(KavaError, match=said):
        hold_out([6, 6, 2], training(2, records=13), PATH)
    with pytest.raises(KavaError, match=r"are 3 training .*, or raise \S+training\.records\.$"):
        hold_out([6, 6, 2], training(records=3), PATH)
    assert "records" not in training().model_dump()


def test_less_than_a_batch_is_refused_with_the_settings_to_change() -> None:
    with pytest.raises(
        KavaError, match=r"are 3 training records, .* of 4\. Lower \S+batch_size\.$"
    ):
        hold_out([3], training(), PATH)
    said = (
        r"are 0 training .*Lower students\.kava\.training\.batch_size or \S+\.held_out\.records\.$"
    )
    with pytest.raises(KavaError, match=said):
        hold_out([3], training(5), PATH)
