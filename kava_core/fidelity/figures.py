"""Heatmaps over budget and number of steps, one panel per policy and bit width."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kava_core.reporting.heatmaps import heatmap
from kava_core.reporting.style import canvas, finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kava_core.reporting.style import Figured

Panel = Mapping[tuple[int, str], float]
ACROSS = 3
CELL = 44, 26  # CSS pixels
FRAME = 60, 84


def heatmaps(
    name: str,
    title: str,
    panels: Mapping[str, Panel],
    columns: Sequence[str],
    marks: Mapping[str, Collection[tuple[int, str]]],
    *,
    limits: tuple[float, float] | None,
    digits: int,
) -> Figured:
    """One heatmap per panel, all on one scale, with the values written into the cells.

    panels: title → {(number of steps, column): value}; columns: their order from left to right;
    marks: title → cells to frame; limits: of the scale, None for those of the data; digits: of a
    value after the point.
    """
    steps = sorted({key[0] for panel in panels.values() for key in panel})
    across = min(len(panels), ACROSS)
    down = -(-len(panels) // across)
    values = [value for panel in panels.values() for value in panel.values()]
    scale = limits or (min(values), max(values))

    def draw() -> Figure:
        width = across * (FRAME[0] + CELL[0] * len(columns))
        figure = canvas(40 + down * (FRAME[1] + CELL[1] * len(steps)), width=width)
        axes = figure.subplots(down, across, squeeze=False)
        for ax, (heading, panel) in zip(axes.flat, panels.items(), strict=False):
            grid = [[panel.get((n, column), float("nan")) for column in columns] for n in steps]
            framed = [(steps.index(n), columns.index(c)) for n, c in marks.get(heading, ())]
            heatmap(ax, np.array(grid), steps, columns, scale, digits=digits, marks=sorted(framed))
            ax.set_title(heading)
            ax.set_xlabel("budget (slots per layer and head)")
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        for ax in axes[:, 0]:
            ax.set_ylabel("steps")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        return figure

    return finish(name, title, "", draw)
