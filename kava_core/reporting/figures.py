"""The figures of a report. Each function takes what it draws and returns a finished figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kava_core.findings.scores import GroupScore
from kava_core.reporting.heatmaps import heatmap
from kava_core.reporting.inputs import Curves, TargetsOverview
from kava_core.reporting.style import (
    INK,
    MUTED,
    SERIES,
    TERMS,
    Drawing,
    canvas,
    colours_of,
    finish,
    legend,
    name_beside,
    percent_axis,
    spread,
)
from kava_core.reporting.systems import Headline, System

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TERM_TITLES = {
    "loss_answer": "answer: cross-entropy (nats per token)",
    "loss_cot": "chain of thought: w × cross-entropy",
    "loss_kv": "KV: α × distance to the targets",
    "loss_codi": "CODI: α × distance to the endpoint",
}


def accuracy_by_cost(name: str, systems: Sequence[System], headline: Headline | None) -> Drawing:
    """Exact match (%) with its 95 % interval against forward passes per problem."""

    def draw() -> Figure:
        figure = canvas(400)
        ax = figure.subplots()
        looks = colours_of([s.name for s in systems])
        cost = [math.log2(max(s.score.forward_passes, 1.0)) for s in systems]
        reach = max(max(cost) - min(cost), 1.0)
        groups = _groups(cost, 0.06 * reach)
        sides = _sides([(cost[g[0]], cost[g[-1]]) for g in groups], 0.25 * reach)
        left = 0.08 if sides[0] > 0 else 0.26
        ax.set_xlim(min(cost) - left * reach, max(cost) + 0.24 * reach)
        percent_axis(ax, max(s.score.ci95[1] for s in systems))
        ends = [] if headline is None else [headline.baseline.name, headline.ceiling.name]
        height = ax.get_ylim()[1]
        for group, side in zip(groups, sides, strict=True):
            gap = 0.056 * height
            wanted = [systems[i].score.exact_match for i in group]
            labels = spread(wanted, gap, gap / 2, height - gap / 2)
            edge = cost[group[-1]] if side > 0 else cost[group[0]]
            for place, (i, label) in enumerate(zip(group, labels, strict=True)):
                measured = systems[i].score
                colour, marker = looks[systems[i].name]
                x = cost[i] + (place - (len(group) - 1) / 2) * 0.012 * reach
                if systems[i].name in ends:  # away from the name
                    far = ax.get_xlim()[0 if side > 0 else 1]
                    level = [measured.exact_match] * 2
                    ax.plot([x, far], level, color=MUTED, linewidth=1, dashes=(2, 4))
                ax.plot([x, x], measured.ci95, color=colour, linewidth=2, alpha=0.55)
                ax.plot([x], [measured.exact_match], marker, color=colour, markersize=9)
                point = (x, measured.exact_match)
                name_beside(
                    ax, systems[i].name, point, (edge + side * 0.035 * reach, label), colour
                )
        low, high = ax.get_xlim()
        ticks = range(max(0, math.ceil(low)), math.floor(high) + 1)
        ax.set_xticks(list(ticks), [str(2**t) for t in ticks])
        ax.set_xlabel("forward passes per problem (mean, logarithmic)")
        ax.set_ylabel("exact match")
        return figure

    caption = (
        "Every call of the decoder counts, the question's included. Bars are 95 % intervals; "
        "systems of nearly equal cost are drawn side by side."
    )
    if headline is not None:
        caption += (
            f" The dotted lines are the ends of the gap, {headline.baseline.name} and "
            f"{headline.ceiling.name}."
        )
    return finish(name, "Accuracy against forward passes", caption, draw)


def accuracy_by_steps(name: str, systems: Sequence[System]) -> Drawing:
    """Exact match (%) of every system by the number of steps a problem takes."""

    def draw() -> Figure:
        figure = canvas(380)
        ax = figure.subplots()
        looks = colours_of([s.name for s in systems])
        counts = {n: s.n for system in systems for n, s in system.score.by_steps.items()}
        steps = sorted(counts)
        highest = max(s.exact_match for system in systems for s in system.score.by_steps.values())
        percent_axis(ax, highest)
        reach = max(steps[-1] - steps[0], 1)
        ax.set_xlim(steps[0] - 0.05 * reach, steps[-1] + 0.24 * reach)
        lasts = [sorted(s.score.by_steps.items())[-1] for s in systems]
        height = ax.get_ylim()[1]
        gap = 0.06 * height
        labels = spread([score.exact_match for _, score in lasts], gap, gap / 3, height)
        for system, (last, end), label in zip(systems, lasts, labels, strict=True):
            colour, marker = looks[system.name]
            points = sorted(system.score.by_steps.items())
            ax.plot(
                [n for n, _ in points],
                [s.exact_match for _, s in points],
                marker=marker,
                color=colour,
                linestyle="--" if system.kind.startswith("teacher") else "-",
            )
            place = (steps[-1] + 0.05 * reach, label)
            name_beside(ax, system.name, (last, end.exact_match), place, colour)
        ax.set_xticks(steps, [f"{n}\nn = {counts[n]}" for n in steps])
        ax.set_xlabel("steps of the problem")
        ax.set_ylabel("exact match")
        return figure

    caption = "Problems grouped by the number of dependent steps in their reference solution."
    return finish(name, "Accuracy by number of steps", caption, draw)


def accuracy_by_group(name: str, systems: Sequence[System]) -> Drawing:
    """Exact match (%) of every system by the operations and the trace length of a problem."""
    panels = {
        "operations of the problem": [s.score.by_operation for s in systems],
        "tokens of the reference chain": [s.score.by_trace_length for s in systems],
    }

    def draw() -> Figure:
        widths = [max(2, len(_labels(found))) for found in panels.values()]
        figure = canvas(96 + 27 * len(systems))
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True, width_ratios=widths)[0]
        for ax, (title, found) in zip(grid, panels.items(), strict=True):
            labels = _labels(found)
            cells = [[s[g].exact_match if g in s else math.nan for g in labels] for s in found]
            counts = {g: s[g].n for s in found for g in labels if g in s}
            columns = [f"{g}\nn = {counts[g]:,}" for g in labels]
            names = [s.name for s in systems]
            heatmap(ax, np.array(cells), names, columns, (0.0, 100.0), digits=0, first_row="top")
            ax.set_xlabel(title)
        return figure

    caption = (
        "Exact match in per cent. A problem with several operations counts under each of them."
    )
    return finish(name, "Accuracy by operation and trace length", caption, draw)


def _labels(found: Sequence[Mapping[str, GroupScore]]) -> list[str]:
    """The groups of all systems, in the order that the evaluation gave them."""
    return list(dict.fromkeys(label for groups in found for label in groups))


def loss_curves(teacher: Curves, students: Mapping[str, Curves]) -> Drawing | None:
    """The teacher's loss, then one panel per term of the students' objective."""
    panels = [("teacher: cross-entropy (nats per token)", "loss", {"": teacher})]
    terms = sorted(
        {m for curves in students.values() for m in curves if m.startswith("loss_")},
        key=lambda m: (list(TERM_TITLES).index(m) if m in TERM_TITLES else 99, m),
    )
    for term in terms:
        title = TERM_TITLES.get(term, term.removeprefix("loss_"))
        panels.append((title, term, dict(students)))
    panels = [panel for panel in panels if any(c.get(panel[1]) for c in panel[2].values())]
    if not panels:
        return None

    def draw() -> Figure:
        columns = min(2, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure = canvas(260 * rows + 40)
        looks = colours_of(list(students))
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for ax, (title, term, models) in zip(grid, panels, strict=False):
            values = []
            for name, curves in models.items():
                for metric, dash in ((term, "-"), (f"eval_{term}", "--")):
                    if curve := curves.get(metric):
                        colour = looks[name][0] if name else INK
                        marker = "." if len(curve.steps) < 2 else None
                        ax.plot(curve.steps, curve.values, dash, color=colour, marker=marker)
                        values += curve.values
            _loss_axis(ax, values)
            ax.set_title(title)
            _steps_axis(ax)
        for ax in list(grid)[len(panels) :]:
            ax.set_axis_off()
        legend(figure, {name: (looks[name][0], "-") for name in students})
        return figure

    caption = (
        "Each term of the objective as it enters the loss, weight included; means over the steps "
        "between two log entries. Dashed: the same on held-out records, where they are measured. A "
        "student is in the panels of the terms that teach it."
    )
    return finish("loss-curves", "Training losses", caption, draw)


def gradient_shares(students: Mapping[str, Curves]) -> Drawing | None:
    """The share of each term in the gradient's norm along training; None if none was logged."""
    prefix = "gradient_share_"
    shares = {
        name: {m.removeprefix(prefix): c for m, c in curves.items() if m.startswith(prefix)}
        for name, curves in students.items()
    }
    shares = {name: terms for name, terms in shares.items() if len(terms) > 1}
    if not shares:
        return None
    terms = sorted({term for found in shares.values() for term in found})
    left = [colour for colour in SERIES if colour not in TERMS.values()]
    looks = {**dict(zip(terms, left * len(terms), strict=False)), **TERMS}

    def draw() -> Figure:
        columns = min(3, len(shares))
        rows = math.ceil(len(shares) / columns)
        figure = canvas(230 * rows + 40)
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
        for ax, (name, found) in zip(grid, shares.items(), strict=False):
            for term in terms:
                if term in found:
                    percent = [100 * v for v in found[term].values]
                    ax.plot(found[term].steps, percent, color=looks[term], linewidth=1.8)
            ax.set_title(name)
            _steps_axis(ax)
            ax.set_ylim(0, 104)
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        for ax in list(grid)[len(shares) :]:
            ax.set_axis_off()
        legend(figure, {term: (looks[term], "-") for term in terms})
        return figure

    caption = (
        "The norm of each term's gradient over the sum of the norms. A term with a share near "
        "zero teaches next to nothing at its weight."
    )
    return finish("gradient-shares", "Gradient share by term", caption, draw)


def trace_lengths(targets: TargetsOverview) -> Drawing:
    """Histogram of N_C with the budget M, told apart by whether eviction drops anything."""
    lengths = targets.lengths

    def draw() -> Figure:
        figure = canvas(310)
        ax = figure.subplots()
        width = max(1, math.ceil((int(lengths.max()) - int(lengths.min()) + 1) / 60))
        start = int(lengths.min()) - int(lengths.min()) % width
        edges = np.arange(start, int(lengths.max()) + width + 1, width)
        dropped = lengths > targets.smallest
        ax.hist(
            [lengths[~dropped], lengths[dropped]],
            bins=(edges - 0.5).tolist(),
            stacked=True,
            color=[SERIES[9], SERIES[0]],
            rwidth=0.88,
            label=["all tokens fit", "tokens are dropped"],
        )
        top = ax.get_ylim()[1] * 1.12
        ax.set_ylim(0, top)
        lines = sorted({targets.smallest, targets.largest})
        for budget in lines:
            ax.axvline(budget + 0.5, color=INK, linewidth=1.4, dashes=(3, 3))
        named = " to ".join(map(str, lines))
        right = lines[-1] + 0.5 < (edges[0] + edges[-1]) / 2
        ax.annotate(
            f"budget M = {named}",
            (lines[-1] + 0.5, top),
            (6 if right else -6, -4),
            textcoords="offset points",
            va="top",
            ha="left" if right else "right",
            weight="bold",
        )
        ax.set_xlim(min(edges[0], lines[0]) - 1, max(edges[-1], lines[-1]) + 1)
        ax.set_xlabel("trace length N_C (tokens)")
        ax.set_ylabel("training problems")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        figure.legend(loc="outside upper left", ncols=2, handlelength=1)
        return figure

    median = int(np.median(lengths))
    caption = (
        f"{len(lengths):,} traces of {lengths.min():,} to {lengths.max():,} tokens, median "
        f"{median:,}. Eviction engages on {targets.eviction.engaged_percent:.1f} % of (record, "
        "layer, head): from these it really drops a token."
    )
    return finish("trace-lengths", "Trace lengths and the budget", caption, draw)


def _groups(places: Sequence[float], width: float) -> list[list[int]]:
    """Indices of places that lie within `width` of their left neighbour, left to right."""
    order = sorted(range(len(places)), key=lambda i: (places[i], i))
    groups: list[list[int]] = []
    for i in order:
        if groups and places[i] - places[groups[-1][-1]] <= width:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _sides(spans: Sequence[tuple[float, float]], room: float) -> list[int]:
    """On which side of each span (left end, right end; ascending) its names have room: 1 or −1.

    Right, unless the next span is nearer than `room` there and the left is freer.
    """
    sides: list[int] = []
    taken = -math.inf
    for i, (begin, end) in enumerate(spans):
        right = spans[i + 1][0] - end if i + 1 < len(spans) else math.inf
        sides.append(-1 if right < min(room, begin - taken) else 1)
        taken = end + room if sides[-1] > 0 else end
    return sides


def _steps_axis(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("training step")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _loss_axis(ax: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    positive = [v for v in values if v > 0]
    if positive and len(positive) == len(values) and max(positive) > 10 * min(positive):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.set_ylim(bottom=min(0.0, min(values, default=0.0)))
