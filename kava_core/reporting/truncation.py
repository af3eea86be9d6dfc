"""What the teacher's cache is worth when it is cut short: the fidelity stage's numbers, drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import model_validator

from kava_core.reporting.files import Found, GroupScore, Percent, read_checked
from kava_core.reporting.heatmaps import heatmap, limits_of
from kava_core.reporting.style import (
    MUTED,
    SERIES,
    Figured,
    canvas,
    finish,
    name_beside,
    percent_axis,
    spread,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Spots = dict[str, dict[str, int | None]]  # policy → bits → the smallest budget near enough to full


class Quality(Found):
    """One kind of cache: exact_match in %, perplexity of the gold answers, KL to the full cache."""

    exact_match: Percent
    n: int
    perplexity: float
    kl: float
    tokens_kept: float
    bytes_per_problem: float
    by_steps: dict[int, GroupScore]


class Seconds(Found):
    """Wall-clock of one kind of cache on problems of one number of steps."""

    seconds_per_problem: float


class Cost(Seconds):
    """Wall-clock of one kind of cache, in all and by number of steps."""

    by_steps: dict[int, Seconds]


class Metrics(Found):
    """fidelity/metrics.json; policies: policy → budget → bits."""

    split: str
    within: float
    full: Quality
    none: Quality
    policies: dict[str, dict[int, dict[str, Quality]]]
    recommended: Spots
    recommended_by_steps: dict[int, Spots]

    @model_validator(mode="after")
    def _a_grid(self) -> Metrics:
        grids = [
            {(budget, bits) for budget, found in budgets.items() for bits in found}
            for budgets in self.policies.values()
        ]
        if not grids or not grids[0] or any(grid != grids[0] for grid in grids):
            raise ValueError("expected every policy with the same budgets and bits")
        return self


class Timings(Found):
    """fidelity/timings.json."""

    full: Cost
    none: Cost
    policies: dict[str, dict[int, dict[str, Cost]]]


@dataclass(frozen=True)
class Truncation:
    """The grid of the fidelity stage, and the policy and bits of it that are shown in detail."""

    metrics: Metrics
    timings: Timings
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


def read_truncation(folder: Path) -> Truncation | None:
    """The fidelity stage's results; None where that stage is no part of the pipeline.

    What is shown in detail is the policy that needs the fewest slots on all problems, at the most
    bits; of equal policies the one with more exact matches over all budgets.
    """
    if not folder.exists():
        return None
    metrics: Metrics = read_checked(Metrics, folder / "metrics.json", "fidelity")
    timings: Timings = read_checked(Timings, folder / "timings.json", "fidelity")
    first = next(iter(next(iter(metrics.policies.values())).values()))
    bits = max(first, key=lambda label: sum(map(int, label.split("/"))) / len(label.split("/")))

    def worth(policy: str) -> tuple[float, float]:
        scores = [found[bits].exact_match for found in metrics.policies[policy].values()]
        return -(metrics.recommended[policy][bits] or math.inf), sum(scores)

    return Truncation(metrics, timings, max(metrics.policies, key=worth), bits)


def truncation_maps(found: Truncation) -> Figured:
    """Exact match and milliseconds per problem over budget and number of steps."""
    metrics, timings = found.metrics, found.timings
    qualities = [
        metrics.none,
        *(metrics.policies[found.policy][m][found.bits] for m in found.budgets),
        metrics.full,
    ]
    costs = [
        timings.none,
        *(timings.policies[found.policy][m][found.bits] for m in found.budgets),
        timings.full,
    ]
    accuracy = np.array([[q.by_steps[n].exact_match for q in qualities] for n in found.steps])
    latency = np.array(
        [[1e3 * c.by_steps[n].seconds_per_problem for c in costs] for n in found.steps]
    )
    spots = {n: metrics.recommended_by_steps[n][found.policy][found.bits] for n in found.steps}
    marks = [
        (row, 1 + found.budgets.index(spot))
        for row, spot in enumerate(spots.values())
        if spot is not None
    ]
    columns = ["none", *map(str, found.budgets), "full"]
    rows = [f"{n} steps\nn = {metrics.full.by_steps[n].n}" for n in found.steps]
    highest = float(latency.max())
    scale = 10 ** math.floor(math.log10(highest)) if highest > 0 else 1.0
    quick = limits_of([latency], step=scale / 2) or (0.0, 1.0)

    def draw() -> Figure:
        figure = canvas(116 + 42 * len(rows))
        left, right = figure.subplots(1, 2, sharey=True)
        heatmap(left, accuracy, rows, columns, (0.0, 100.0), digits=0, marks=marks)
        left.set_title("exact match (%)")
        digits = 1 if scale > 1 else 2
        heatmap(right, latency, rows, columns, quick, digits=digits, marks=marks)
        right.set_title("wall-clock per problem (ms)")
        for ax in (left, right):
            ax.set_xlabel("budget M (slots per layer and head)")
        return figure

    caption = (
        f"The teacher answers from what {found.policy} leaves of its cache at {found.bits} bits, "
        f"on {metrics.full.n:,} {metrics.split} problems. Framed is the sweet spot of each number "
        f"of steps: the smallest budget at most {metrics.within:g} points below the full cache. "
        "Wall-clock runs from the stored cache to the last token, decoding included."
    )
    return finish("budget-by-difficulty", "Budget against difficulty", caption, draw)


def accuracy_by_budget(found: Truncation) -> Figured:
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
