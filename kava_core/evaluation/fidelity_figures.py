"""Heatmaps over budget and number of steps, one panel per policy and bit width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kava_core.reporting.style import INK, canvas, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
    *,
    limits: tuple[float, float] | None,
    digits: int,
) -> Figured:
    """One heatmap per panel, all on one scale, with the values written into the cells.

    panels: title → {(number of steps, column): value}; columns: their order from left to right;
    limits: of the scale, None for those of the data; digits: of a value after the point.
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
            _panel(ax, heading, panel, steps, columns, scale, digits)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        for ax in axes[:, 0]:
            ax.set_ylabel("steps")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        return figure

    return finish(name, title, "", draw)


def _panel(
    ax: Axes,
    heading: str,
    panel: Panel,
    steps: Sequence[int],
    columns: Sequence[str],
    scale: tuple[float, float],
    digits: int,
) -> None:
    low, high = scale
    grid = [[panel.get((n, column), float("nan")) for column in columns] for n in steps]
    ax.imshow(grid, cmap="Blues", vmin=low, vmax=high, aspect="auto")
    ax.set_title(heading)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(steps)), [str(n) for n in steps])
    ax.set_xlabel("budget")
    ax.grid(visible=False)
    for (n, column), value in panel.items():
        dark = value - low > 0.6 * (high - low)
        ax.text(
            columns.index(column),
            steps.index(n),
            f"{value:.{digits}f}",
            ha="center",
            va="center",
            fontsize=10,
            color="white" if dark else INK,
        )
