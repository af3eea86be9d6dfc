"""The last records are held out, shard by shard, and a batch must be left."""

from __future__ import annotations

import pytest

from kava_core.distill.held_out import hold_out
from kava_core.errors import KavaError
from kava_core.settings import HeldOut, Training

PATH = "students.kava.training"


def training(records: int = 0) -> Training:
    held_out = HeldOut(records=records, every=1) if records else None
    return Training(steps=1, batch_size=4, held_out=held_out)


@pytest.mark.parametrize(
    ("records", "taught"), [(0, [6, 6, 2]), (1, [6, 6, 1]), (2, [6, 6]), (5, [6, 3]), (10, [4])]
)
def test_the_last_records_are_held_out(records: int, taught: list[int]) -> None:
    assert hold_out([6, 6, 2], training(records), PATH) == (taught, range(14 - records, 14))


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
