"""Which layers become targets, and which of them share."""

from __future__ import annotations

import pytest

from kava_core.errors import KavaError
from kava_core.eviction import group_layers, parse_layers


@pytest.mark.parametrize(
    ("setting", "layers"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ({"last": 2}, [4, 5]),
        ({"last": 6}, [0, 1, 2, 3, 4, 5]),
        ({"every": 1}, [0, 1, 2, 3, 4, 5]),
        ({"every": 2}, [1, 3, 5]),
        ({"every": 4}, [1, 5]),
        ({"every": 6}, [5]),
        ([0, 3], [0, 3]),
        ((5,), [5]),
    ],
)
def test_layers_are_chosen_as_the_setting_says(setting: object, layers: list[int]) -> None:
    assert parse_layers(setting, 6) == layers  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "setting",
    [
        "some",
        {"last": 0},
        {"last": 7},
        {"every": 0},
        {"every": 2.0},
        {"first": 2},
        {"last": 1, "every": 2},
        {},
        [],
        [6],
        [-1],
        [1, 1],
        [3, 0],
        [True],
        ["0"],
        None,
        4,
    ],
)
def test_layers_that_are_not_there_are_named(setting: object) -> None:
    with pytest.raises(KavaError, match="layers"):
        parse_layers(setting, 6)  # type: ignore[arg-type]


def test_groups_are_adjacent_and_cover_all_layers() -> None:
    assert group_layers(4, 2) == [[0, 1], [2, 3]]
    assert group_layers(5, 2) == [[0, 1], [2, 3], [4]]
    assert group_layers(3, 3) == [[0, 1, 2]]
    assert group_layers(2, 1) == [[0], [1]]
    for size in (0, 4, -1, 1.5):
        with pytest.raises(KavaError, match="groups"):
            group_layers(3, size)  # type: ignore[arg-type]
