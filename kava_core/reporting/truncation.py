"""What the teacher's cache is worth when it is cut short: the fidelity stage's numbers, drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kava_core.findings.base import read_finding
from kava_core.findings.fidelity import METRICS, CacheCost, CacheScore, CacheScores, FidelityCosts
from kava_core.reporting.heatmaps import Limits, heatmap, limits_of
from kava_core.reporting.style import (
    MUTED,
    PAGE_WIDTH,
    SERIES,
    Drawing,
    canvas,
    finish,
    name_beside,
    percent_axis,
    spread,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACROSS = 2
MOST_PANELS = 12


@dataclass(frozen=True)
class BudgetGrid:
    """The grid of the fidelity stage, and the policy and bits of it that are named first."""

    metrics: CacheScores
    policy: str
    bits: str

    @property
    def budgets(self) -> list[int]:
        return sorted(self.metrics.policies[self.policy])

    @property
    def steps(self) -> list[int]:
        return sorted(self.metrics.full.by_steps)

    @property
    def spot(self) -> int | None:
        """The sweet spot over all problems."""
        return self.metrics.recommended[self.policy][self.bits]

    @property
    def series(self) -> list[tuple[str, str]]:
        """Policies and bits, the most bits first."""
        labels = self.metrics.policies[self.policy][self.budgets[0]]
        return [(policy, bits) for bits in by_width(labels) for policy in self.metrics.policies]


def by_width(labels: Iterable[str]) -> list[str]:
    """Labels of bits, such as `16` and `8/4`, from the most bits to the fewest."""

    def width(label: str) -> float:
        parts = [int(part) for part in label.split("/")]
        return sum(parts) / len(parts)

    return sorted(labels, key=lambda label: (-width(label), label))


def read_grid(folder: Path) -> BudgetGrid | None:
    """The fidelity stage's results; None where that stage is no part of the pipeline.

    What is named first is the policy that needs the fewest slots on all problems, at the most bits;
    of equal policies the one with more exact matches over all budgets.
    """
    if not folder.exists():
        return None
    metrics = read_finding(CacheScores, folder / METRICS, "fidelity")
    bits = by_width(next(iter(next(iter(metrics.policies.values())).values())))[0]

    def worth(policy: str) -> tuple[float, float]:
        scores = [found[bits].exact_match for found in metrics.policies[policy].values()]
        return -(metrics.recommended[policy][bits] or math.inf), sum(scores)

    return BudgetGrid(metrics, max(metrics.policies, key=worth), bits)


def accuracy_maps(found: BudgetGrid) -> Drawing:
    """Exact match over budget and number of steps, a panel for each policy and bits."""
    metrics = found.metrics

    def cells(score: CacheScore) -> list[float]:
        return [score.by_steps[n].exact_match for n in found.steps]

    caption = (
        "The teacher answers from what a policy leaves of its cache, on "
        f"{metrics.full.n:,} {metrics.split} problems; exact match in per cent. "
        + _framed(metrics.within)
    )
    return _budget_maps(
        "budget-by-difficulty",
        "Budget against difficulty",
        caption,
        found,
        {
            (policy, bits): [
                cells(metrics.none),
                *(cells(metrics.policies[policy][m][bits]) for m in found.budgets),
                cells(metrics.full),
            ]
            for policy, bits in found.series
        },
        lambda _: ((0.0, 100.0), 0),
    )


def latency_maps(found: BudgetGrid, costs: FidelityCosts) -> Drawing:
    """Milliseconds per problem over budget and number of steps, as `accuracy_maps`."""

    def cells(cost: CacheCost) -> list[float]:
        return [1e3 * cost.seconds_by_steps[n] for n in found.steps]

    def scale(grids: list[np.ndarray]) -> tuple[Limits, int]:
        highest = max(float(grid.max()) for grid in grids)
        unit = 10 ** math.floor(math.log10(highest)) if highest > 0 else 1.0
        return limits_of(grids, step=unit / 2) or (0.0, 1.0), 1 if unit > 1 else 2

    caption = (
        "Milliseconds per problem from the stored cache to the last token, decoding included. "
        + _framed(found.metrics.within)
    )
    return _budget_maps(
        "latency",
        "Wall-clock against budget and difficulty",
        caption,
        found,
        {
            (policy, bits): [
                cells(costs.none),
                *(cells(costs.policies[policy][m][bits]) for m in found.budgets),
                cells(costs.full),
            ]
            for policy, bits in found.series
        },
        scale,
    )


def _framed(within: float) -> str:
    return (
        "Framed is the sweet spot of each number of steps: the smallest budget at most "
        f"{within:g} points of exact match below the full cache."
    )


def _budget_maps(
    name: str,
    title: str,
    caption: str,
    found: BudgetGrid,
    columns: dict[tuple[str, str], list[list[float]]],
    scale: Callable[[list[np.ndarray]], tuple[Limits, int]],
) -> Drawing:
    """Heatmaps over budget (none, ascending, full) and number of steps, all on one scale.

    columns: (policy, bits) → values [budget][steps]; scale: limits and digits of all grids.
    """
    shown = dict(list(columns.items())[:MOST_PANELS])
    grids = {series: np.array(values).T for series, values in shown.items()}
    limits, digits = scale(list(grids.values()))
    full = found.metrics.full.by_steps
    rows = [f"{n} steps\nn = {full[n].n}" for n in found.steps]
    names = ["none", *map(str, found.budgets), "full"]
    if len(columns) > len(shown):
        caption += f" The first {len(shown)} of {len(columns)} policies and bits."

    def draw() -> Figure:
        across = min(ACROSS, len(grids))
        down = -(-len(grids) // across)
        figure = canvas(down * (96 + 40 * len(rows)) + 16, width=PAGE_WIDTH)
        axes = figure.subplots(down, across, squeeze=False, sharey=True)
        for ax, ((policy, bits), cells) in zip(axes.flat, grids.items(), strict=False):
            spots = [found.metrics.recommended_by_steps[n][policy][bits] for n in found.steps]
            marks = [
                (row, 1 + found.budgets.index(spot))
                for row, spot in enumerate(spots)
                if spot is not None
            ]
            heatmap(ax, cells, rows, names, limits, digits=digits, marks=marks)
            ax.set_title(f"{policy}, {bits} bits")
            ax.set_xlabel("budget M (slots per layer and head)")
        for ax in axes.flat[len(grids) :]:
            ax.set_axis_off()
        return figure

    return finish(name, title, caption, draw)


def accuracy_by_budget(found: BudgetGrid) -> Drawing:
    """Exact match of every policy over the budget, between no cache and the full one."""
    metrics, bits = found.metrics, found.bits

    def draw() -> Figure:
        figure = canvas(390)
        ax = figure.subplots()
        places = [math.log2(m) for m in found.budgets]
        reach = max(places[-1] - places[0], 1.0)
        ax.set_xlim(places[0] - 0.04 * reach, places[-1] + 0.26 * reach)
        lines = {
            "full cache": [metrics.full.exact_match] * len(places),
            **{
                policy: [found_at[m][bits].exact_match for m in found.budgets]
                for policy, found_at in metrics.policies.items()
            },
            "no cache": [metrics.none.exact_match] * len(places),
        }
        percent_axis(ax, max(map(max, lines.values())))
        height = ax.get_ylim()[1]
        gap = 0.062 * height
        labels = spread([line[-1] for line in lines.values()], gap, gap / 3, height - gap / 2)
        colours = dict(zip(metrics.policies, SERIES * len(lines), strict=False))
        for (name, line), label in zip(lines.items(), labels, strict=True):
            colour = colours.get(name, MUTED)
            ax.plot(places, line, "-" if name in colours else "--", color=colour, linewidth=1.8)
            spot = metrics.recommended[name][bits] if name in colours else None
            if spot is not None:
                at = found.budgets.index(spot)
                ax.plot(places[at], line[at], "o", color=colour, markersize=9)
            place = (places[-1] + 0.05 * reach, label)
            name_beside(ax, name, (places[-1], line[-1]), place, colour)
        ax.set_xticks(places, [str(m) for m in found.budgets])
        ax.set_xlabel("budget M (slots per layer and head, logarithmic)")
        ax.set_ylabel("exact match")
        return figure

    caption = (
        f"All problems, at {bits} bits. A dot is a policy's sweet spot, the smallest budget at "
        f"most {metrics.within:g} points below the full cache; a line without a dot has none in "
        "this grid."
    )
    return finish("accuracy-by-budget", "What a budget is worth, by policy", caption, draw)
