"""The grid: every policy with every budget and all bits, in the order of numbers."""

from __future__ import annotations

from kava_core.eviction import POLICIES
from kava_core.fidelity.examiner import Layers
from kava_core.fidelity.grid import Cell, Grid


def test_the_grid_has_every_cell_once_by_number() -> None:
    grid = Grid.of(
        [POLICIES["crop"](), POLICIES["rkv"]()],
        [16, 2, 8],
        [(4, 4), (16, 16), (8, 4), (8, 8)],
        Layers.of("all", "none", 2, "head", 3),
        budget_shape="uniform",
        half="bfloat16",
    )
    assert grid.cells[:2] == [Cell("full"), Cell("none")]
    assert len(grid.cells) == len(set(grid.cells)) == 2 + 2 * 3 * 4
    assert [cell.bits for cell in grid.cells[2:6]] == ["16", "8", "8/4", "4"]
    assert [cell.budget for cell in grid.cells[2::4]] == [2, 8, 16] * 2
    assert grid.budgets == {2: [2, 2, 2], 8: [8, 8, 8], 16: [16, 16, 16]}
    assert grid.codecs[8, 4].keys == "uint8" and grid.codecs[8, 4].values == "uint4"


def test_layers_that_share_have_budgets_together() -> None:
    layers = Layers.of({"last": 3}, "merged", 2, "head", 4)
    assert (layers.chosen, layers.groups) == ([1, 2, 3], [[0, 1], [2]])
    grid = Grid.of(
        [POLICIES["rkv"]()], [4], [(32, 32)], layers, budget_shape="uniform", half="bfloat16"
    )
    assert grid.budgets == {4: [4, 4]}
    assert Layers.of([0, 2], "none", 2, "record", 4).groups == [[0], [1]]
