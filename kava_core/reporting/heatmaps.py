"""The one way in which all figures colour a grid of numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kava_core.reporting.style import RULE, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_TICKS = 12
ANNOTATED_CELLS = 160
MARK = SERIES[1]

Limits = tuple[float, float]


def heatmap(
    ax: Axes,
    cells: np.ndarray,
    rows: Sequence[object],
    columns: Sequence[object],
    limits: Limits,
    *,
    digits: int | None = None,
    first_row: str = "bottom",
    marks: Collection[tuple[int, int]] = (),
) -> Any:
    """Draw `cells` [rows, columns], NaN as a blank; returns the image, for a colour bar.

    digits: of the values after the point, written into the cells where there are few enough; None
    writes none. first_row: `top` or `bottom`. marks: (row, column) of the cells to frame.
    """
    from matplotlib.patches import Rectangle

    low, high = limits
    ax.set_facecolor(RULE)
    image = ax.imshow(
        np.ma.masked_invalid(cells),
        cmap="viridis",
        vmin=low,
        vmax=high,
        origin="upper" if first_row == "top" else "lower",
        aspect="auto",
        interpolation="nearest",
    )
    ax.grid(False)
    ax.spines[:].set_visible(False)
    _ticks(ax.set_yticks, rows)
    _ticks(ax.set_xticks, columns)
    if digits is not None and cells.size <= ANNOTATED_CELLS and len(columns) <= MOST_TICKS:
        for (row, column), value in np.ndenumerate(cells):
            if np.isfinite(value):
                bright = high > low and (value - low) / (high - low) > 0.6
                text = f"{value:.{digits}f}".replace("-", "−")
                colour = "black" if bright else "white"
                ax.text(column, row, text, ha="center", va="center", color=colour, fontsize=10)
    for row, column in marks:  # on white, since the scale has cells of every darkness
        for colour, width in (("white", 5.0), (MARK, 2.5)):
            corner = (column - 0.46, row - 0.44)
            ax.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, ec=colour, lw=width))
    return image


def limits_of(grids: Sequence[np.ndarray], *, step: float = 0.1) -> Limits | None:
    """A scale from 0, or from below it, to the highest number; None where there is no number.

    The ends are multiples of `step`.
    """
    known = np.concatenate([grid[np.isfinite(grid)] for grid in grids]) if grids else np.array([])
    if not known.size:
        return None
    low = min(0.0, step * math.floor(known.min() / step))
    return low, max(low + step, step * math.ceil(known.max() / step))


def numbers(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    """A grid of numbers with NaN for null."""
    return np.array(rows, dtype=float)


def _ticks(place: Any, names: Sequence[object]) -> None:
    every = math.ceil(len(names) / MOST_TICKS)
    place(range(0, len(names), every), [str(name) for name in names[::every]])
