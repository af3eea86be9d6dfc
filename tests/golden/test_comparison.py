"""What counts as other golden values: anything but rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kava_core.versions import VERSIONS
from tests.golden.comparison import differences, signature
from tests.golden.test_golden import check

WEIGHTS = np.random.default_rng(1).standard_normal(500)
VALUES: dict[str, Any] = {
    "loss": [5.25, 4.5],
    "text": "12",
    "n": 3,
    "weights": signature(WEIGHTS),
}


def test_rounding_is_no_difference() -> None:
    near = {**VALUES, "loss": [5.2501, 4.5], "weights": signature(WEIGHTS + 1e-5)}
    assert list(differences(VALUES, near)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": [5.25, 4.51]}, "loss[1] is 4.51, not 4.5"),
        ({"loss": [5.25]}, "loss has 1 items, not 2"),
        ({"text": "13"}, "text is '13', not '12'"),
        ({"n": 4}, "n is 4, not 3"),
        ({"n": True}, "n is True, not 3"),
        ({"loss": [5.25, float("nan")]}, "loss[1] is nan, not 4.5"),
        ({"new": 1}, "new is new"),
        ({"weights": signature(-WEIGHTS)}, "weights has norm"),
        ({"weights": signature(WEIGHTS[::-1])}, "weights has norm"),
        ({"weights": signature(1.01 * WEIGHTS)}, "weights has norm"),
        ({"weights": signature(WEIGHTS[:-1])}, "weights has 499 numbers, not 500"),
    ],
)
def test_everything_else_is(change: dict[str, Any], said: str) -> None:
    (found,) = differences(VALUES, {**VALUES, **change})
    assert found.startswith(said)
    assert [*differences({"a": 1}, {})] == ["a is gone"]


def golden(folder: Path, version: int) -> Path:
    file = folder / "evict.json"
    file.write_text(json.dumps({"version": version, "values": VALUES}))
    return file


@pytest.mark.parametrize("writes", [False, True])
def test_other_values_of_the_same_version_name_the_stage_to_raise(
    tmp_path: Path, writes: bool
) -> None:
    file = golden(tmp_path, VERSIONS["evict"])
    before = file.read_bytes()
    check(file, "evict", VALUES, writes)
    with pytest.raises(pytest.fail.Exception, match=r'n is 4, not 3.*raise "evict" in kava_core'):
        check(file, "evict", {**VALUES, "n": 4}, writes)
    assert file.read_bytes() == before


def test_another_version_asks_for_values_and_takes_them(tmp_path: Path) -> None:
    file = golden(tmp_path, VERSIONS["evict"] - 1)
    with pytest.raises(pytest.fail.Exception, match=r"evict has version .* --write-golden"):
        check(file, "evict", VALUES, writes=False)
    check(file, "evict", {**VALUES, "n": 4}, writes=True)
    check(file, "evict", {**VALUES, "n": 4}, writes=False)
