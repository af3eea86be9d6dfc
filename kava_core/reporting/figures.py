"""The figures of a report. Each function takes what it draws and returns a finished figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kava_core.reporting.inputs import Curve, Curves, Similarity, Targets
from kava_core.reporting.style import (
    INK,
    MUTED,
    RULE,
    SERIES,
    TERMS,
    Figured,
    canvas,
    colours_of,
    finish,
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
ANNOTATED_CELLS = 160


def accuracy_by_cost(name: str, systems: Sequence[System], headline: Headline | None) -> Figured:
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
                _name_beside(
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


def accuracy_by_steps(name: str, systems: Sequence[System]) -> Figured:
    """Exact match (%) of every system by the number of steps a problem takes."""

    def draw() -> Figure:
        figure = canvas(380)
        ax = figure.subplots()
        looks = colours_of([s.name for s in systems])
        shown = [s for s in systems if s.score.by_steps]
        counts = {n: s.n for system in shown for n, s in system.score.by_steps.items()}
        steps = sorted(counts)
        highest = max(s.exact_match for system in shown for s in system.score.by_steps.values())
        percent_axis(ax, highest)
        reach = max(steps[-1] - steps[0], 1)
        ax.set_xlim(steps[0] - 0.05 * reach, steps[-1] + 0.24 * reach)
        lasts = [sorted(s.score.by_steps.items())[-1] for s in shown]
        height = ax.get_ylim()[1]
        gap = 0.06 * height
        labels = spread([score.exact_match for _, score in lasts], gap, gap / 3, height)
        for system, (last, end), label in zip(shown, lasts, labels, strict=True):
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
            _name_beside(ax, system.name, (last, end.exact_match), place, colour)
        ax.set_xticks(steps, [f"{n}\nn = {counts[n]}" for n in steps])
        ax.set_xlabel("steps of the problem")
        ax.set_ylabel("exact match")
        return figure

    caption = "Problems grouped by the number of dependent steps in their reference solution."
    return finish(name, "Accuracy by number of steps", caption, draw)


def loss_curves(teacher: Curves, students: Mapping[str, Curves]) -> Figured | None:
    """The teacher's loss, then one panel per term of the students' objective."""
    panels: list[tuple[str, dict[str, Curve]]] = []
    if "loss" in teacher and teacher["loss"].steps:
        panels.append(("teacher: cross-entropy (nats per token)", {"": teacher["loss"]}))
    terms = sorted(
        {m for curves in students.values() for m in curves if m.startswith("loss_")},
        key=lambda m: (list(TERM_TITLES).index(m) if m in TERM_TITLES else 99, m),
    )
    for term in terms:
        found = {name: curves[term] for name, curves in students.items() if term in curves}
        panels.append((TERM_TITLES.get(term, term.removeprefix("loss_")), found))
    if not panels:
        return None

    def draw() -> Figure:
        columns = min(2, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure = canvas(260 * rows + 40)
        looks = colours_of(list(students))
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for ax, (title, curves) in zip(grid, panels, strict=False):
            for name, curve in curves.items():
                colour = looks[name][0] if name else INK
                marker = "." if len(curve.steps) < 2 else None
                ax.plot(curve.steps, curve.values, color=colour, linewidth=1.8, marker=marker)
            _loss_axis(ax, [v for curve in curves.values() for v in curve.values])
            ax.set_title(title)
            _steps_axis(ax)
        for ax in list(grid)[len(panels) :]:
            ax.set_axis_off()
        _legend(figure, {name: looks[name][0] for name in students})
        return figure

    caption = (
        "Each term of the objective as it enters the loss, weight included; means over the steps "
        "between two log entries. A student is in the panels of the terms that teach it."
    )
    return finish("loss-curves", "Training losses", caption, draw)


def gradient_shares(students: Mapping[str, Curves]) -> Figured | None:
    """The share of each term in the gradient's norm along training; None if none was logged."""
    prefix = "gradient_share_"
    shares = {
        name: {m.removeprefix(prefix): c for m, c in curves.items() if m.startswith(prefix)}
        for name, curves in students.items()
    }
    shares = {name: terms for name, terms in shares.items() if len(terms) > 1}
    if not shares:
        return None
    terms = [t for t in TERMS if any(t in found for found in shares.values())]

    def draw() -> Figure:
        columns = min(3, len(shares))
        rows = math.ceil(len(shares) / columns)
        figure = canvas(230 * rows + 40)
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
        for ax, (name, found) in zip(grid, shares.items(), strict=False):
            for term in terms:
                if term in found:
                    percent = [100 * v for v in found[term].values]
                    ax.plot(found[term].steps, percent, color=TERMS[term], linewidth=1.8)
            ax.set_title(name)
            _steps_axis(ax)
            ax.set_ylim(0, 104)
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        for ax in list(grid)[len(shares) :]:
            ax.set_axis_off()
        _legend(figure, {term: TERMS[term] for term in terms})
        return figure

    caption = (
        "The norm of each term's gradient over the sum of the norms. A term with a share near "
        "zero teaches next to nothing at its weight."
    )
    return finish("gradient-shares", "Gradient share by term", caption, draw)


def similarity_maps(similarity: Mapping[str, Similarity]) -> Figured | None:
    """Cosine similarity of student K and V to the targets, layer × slot, on one colour scale."""
    shown = {name: s for name, s in similarity.items() if s.layers}
    if not shown:
        return None
    arrays = {
        (name, part): np.array(getattr(s, part), dtype=float)  # [L', M]; NaN = no record
        for name, s in shown.items()
        for part in ("keys", "values")
    }
    known = np.concatenate([a[np.isfinite(a)] for a in arrays.values()])
    if not known.size:
        return None
    low = min(0.0, math.floor(10 * known.min()) / 10)
    high = max(low + 0.1, math.ceil(10 * known.max()) / 10)

    def draw() -> Figure:
        deepest = max(len(s.layers) for s in shown.values())
        tall = min(300, max(70, 30 * deepest))
        figure = canvas((tall + 66) * len(shown) + 10)
        grid = figure.subplots(len(shown), 2, squeeze=False)
        for row, (name, s) in enumerate(shown.items()):
            for ax, part in zip(grid[row], ("keys", "values"), strict=True):
                image = _heatmap(ax, arrays[name, part], s.layers, low, high)
                ax.set_title(f"{name}: {part}")
                if row == len(shown) - 1:
                    ax.set_xlabel("latent slot")
                if part == "keys":
                    ax.set_ylabel("layer")
        bar = figure.colorbar(image, ax=grid, shrink=min(1.0, 0.5 + 0.5 / len(shown)), pad=0.02)
        bar.set_label("cosine similarity (no unit)")
        bar.outline.set_visible(False)
        return figure

    records = max(s.records for s in shown.values())
    caption = (
        "Mean over the heads and the store's first "
        f"{records:,} records of the cosine between a student's cache at each latent and the "
        "teacher's token kept for that slot. Grey: no record has that slot. All panels share one "
        "scale."
    )
    return finish("similarity", "Student and teacher caches, layer by slot", caption, draw)


def trace_lengths(targets: Targets) -> Figured:
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
        f"{median:,}. Eviction engages on {100 * targets.engaged:.1f} % of them: there it drops at "
        "least one token of some layer and head."
    )
    return finish("trace-lengths", "Trace lengths and the budget", caption, draw)


def _name_beside(
    ax: Axes,
    name: str,
    point: tuple[float, float],
    place: tuple[float, float],
    colour: str,
) -> None:
    """A system's name at `place` with a thin line to its `point`."""
    line = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "alpha": 0.6}
    right = place[0] > point[0]
    line |= {"shrinkA": 2, "shrinkB": 6, "relpos": (0.0 if right else 1.0, 0.5)}
    ax.annotate(
        name,
        point,
        place,
        va="center",
        ha="left" if right else "right",
        color=colour,
        weight="bold",
        arrowprops=line,
    )


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


def _heatmap(ax: Axes, cells: np.ndarray, layers: Sequence[int], low: float, high: float) -> Any:
    rows, slots = cells.shape
    ax.set_facecolor(RULE)
    image = ax.imshow(
        np.ma.masked_invalid(cells),
        cmap="viridis",
        vmin=low,
        vmax=high,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
    )
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_yticks(range(rows), [str(layer) for layer in layers])
    if rows > 12:
        ax.set_yticks(ax.get_yticks()[:: math.ceil(rows / 12)])
        ax.set_yticklabels([str(layers[int(t)]) for t in ax.get_yticks()])
    every = math.ceil(slots / 12)
    ax.set_xticks(range(0, slots, every), [str(slot + 1) for slot in range(0, slots, every)])
    if rows * slots <= ANNOTATED_CELLS and slots <= 12:
        for (row, slot), value in np.ndenumerate(cells):
            if np.isfinite(value):
                bright = (value - low) / (high - low) > 0.6
                colour = "black" if bright else "white"
                text = f"{value:.2f}".replace("-", "−")
                ax.text(slot, row, text, ha="center", va="center", color=colour, fontsize=10)
    return image


def _legend(figure: Figure, colours: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    if handles:
        figure.legend(
            handles=handles, loc="outside upper left", ncols=len(handles), handlelength=1.2
        )
