"""What a student's latents hold, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kava_core.findings.latents import Changed, Insight, InterventionScores, LayerMaps
from kava_core.reporting.heatmaps import heatmap, limits_of, numbers
from kava_core.reporting.style import (
    COLOURS,
    INK,
    MUTED,
    SERIES,
    Dash,
    Drawing,
    canvas,
    finish,
    legend,
    percent_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = ("keys", "values")
MOST_LAYERS = 3


def slot_maps(
    name: str, title: str, caption: str, shown: Mapping[str, LayerMaps]
) -> Drawing | None:
    """Cosine similarity of K and V, layer × slot, a row per student, all on one colour scale."""
    shown = {student: maps for student, maps in shown.items() if maps.layers}
    grids = {
        (student, part): numbers(getattr(maps, part))
        for student, maps in shown.items()
        for part in PARTS
    }
    limits = limits_of(list(grids.values()))
    if limits is None:
        return None

    def draw() -> Figure:
        deepest = max(len(maps.layers) for maps in shown.values())
        tall = min(300, max(70, 30 * deepest))
        figure = canvas((tall + 66) * len(shown) + 10)
        axes = figure.subplots(len(shown), 2, squeeze=False)
        for row, (student, maps) in enumerate(shown.items()):
            for ax, part in zip(axes[row], PARTS, strict=True):
                cells = grids[student, part]
                image = heatmap(ax, cells, maps.layers, _slots(cells), limits, digits=2)
                ax.set_title(f"{student}: {part}")
                if row == len(shown) - 1:
                    ax.set_xlabel("latent slot")
                if part == "keys":
                    ax.set_ylabel("layer")
        bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 0.5 + 0.5 / len(shown)), pad=0.02)
        bar.set_label("cosine similarity (no unit)")
        bar.outline.set_visible(False)
        return figure

    return finish(name, title, caption + " All panels share one scale.", draw)


def attention_flow(student: str, insight: Insight) -> Drawing:
    """Where latents and answer look, per pass."""
    flow = insight.attention
    grids = [numbers(grid) for grid in flow.iterations]
    limits = limits_of(grids, step=0.05) or (0.0, 1.0)

    def draw() -> Figure:
        across = min(2 if len(grids) in (2, 4) else 3, len(grids))
        down = -(-len(grids) // across)
        figure = canvas(down * (110 + 22 * len(flow.sources)) + 20)
        axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        for i, (ax, cells) in enumerate(zip(axes.flat, grids, strict=False)):
            image = heatmap(
                ax, cells, flow.sources, flow.targets, limits, digits=2, first_row="top"
            )
            ax.set_title(_pass(i, len(grids)))
            ax.tick_params(axis="x", rotation=30, labelbottom=True)
        for ax in list(axes.flat)[len(grids) :]:
            ax.set_axis_off()
        bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
        bar.set_label("share of attention (no unit)")
        bar.outline.set_visible(False)
        return figure

    caption = (
        f"Mean over layers, heads and {insight.records:,} problems; a row is what one token's "
        "attention is spent on. Grey: the answer is there in the last pass only."
    )
    return finish(
        f"attention-{student}", f"{student}: attention flow along the passes", caption, draw
    )


def magnitudes(student: str, insight: Insight) -> Drawing:
    """Mean norms of K and V along the latents, over the teacher's full and truncated caches."""
    found = insight.magnitudes
    layers = len(found.teacher_full.keys)
    chosen = sorted({round(i * (layers - 1) / max(1, MOST_LAYERS - 1)) for i in range(MOST_LAYERS)})
    passes = found.iterations
    cuts = found.teacher_truncated

    def draw() -> Figure:
        figure = canvas(220 * len(chosen) + 60)
        axes = figure.subplots(len(chosen), 2, squeeze=False, sharex=True)
        for row, layer in enumerate(chosen):
            for ax, part in zip(axes[row], PARTS, strict=True):
                for i, maps in enumerate(passes):
                    opacity = 0.25 + 0.75 * (i + 1) / len(passes)
                    _along(ax, getattr(maps, part)[layer], SERIES[0], "-", opacity)
                _along(ax, getattr(found.teacher_full, part)[layer], INK, "-", 1.0)
                for j, maps in enumerate(cuts.values()):
                    _along(ax, getattr(maps, part)[layer], _cut_colour(j), "--", 1.0)
                ax.set_ylim(bottom=0)
                ax.set_title(f"{part}, layer {layer}")
                if part == "keys":
                    ax.set_ylabel("mean norm (no unit)")
                if row == len(chosen) - 1:
                    ax.set_xlabel("place along latents or trace")
                    ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        names: dict[str, tuple[str, Dash]] = {
            f"{student}, last pass (earlier ones paler)": (SERIES[0], "-")
        }
        names["teacher, whole trace"] = (INK, "-")
        names |= {f"teacher, M = {m}": (_cut_colour(j), "--") for j, m in enumerate(cuts)}
        legend(figure, names)
        return figure

    caption = (
        "Euclidean norm of a key or a value, mean over heads and "
        f"{insight.records:,} problems; the place is the share of the latents, of the trace or of "
        "its kept tokens that lies before it."
    )
    return finish(f"magnitudes-{student}", f"{student}: sizes of keys and values", caption, draw)


def interventions(insights: Mapping[str, Insight]) -> Drawing | None:
    """Exact match with one latent changed, by slot; a panel per student; None without any."""
    made = {name: i.interventions for name, i in insights.items() if i.interventions is not None}
    if not made:
        return None
    kinds = {"removed": SERIES[7], "mean": SERIES[2], "donor": SERIES[4]}

    def draw() -> Figure:
        from matplotlib.ticker import MaxNLocator

        across = min(3, len(made))
        down = -(-len(made) // across)
        figure = canvas(240 * down + 50)
        axes = figure.subplots(down, across, squeeze=False, sharey=True)
        for ax, (student, found) in zip(axes.flat, made.items(), strict=False):
            ax.axhspan(*found.ci95, color=INK, alpha=0.08, linewidth=0)
            ax.axhline(found.none, color=INK, linewidth=1.4)
            for number, (kind, colour) in enumerate(kinds.items()):
                _by_slot(ax, getattr(found.alone, kind) or [], colour, 0.12 * (number - 1))
            ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            ax.set_title(student)
            ax.set_xlabel("latent slot that is changed")
        for ax in list(axes.flat)[len(made) :]:
            ax.set_axis_off()
        percent_axis(axes[0, 0], max(map(_highest, made.values())))
        for ax in axes[:, 0]:
            ax.set_ylabel("exact match")
        legend(figure, {"untouched": (INK, "-"), **{k: (c, "-") for k, c in kinds.items()}})
        return figure

    asked = max(found.n for found in made.values())
    caption = (
        f"{asked:,} test problems, asked with one latent removed (set to zero), set to its mean "
        "over problems, or taken from another problem (the donor); bars and band: 95 % intervals. "
        "Hollow: inert, the answer does not need this latent."
    )
    return finish("interventions", "What the answer needs of each latent", caption, draw)


def _by_slot(ax: Axes, slots: Sequence[Changed], colour: str, aside: float) -> None:
    """Exact match by slot with its interval, hollow where inert; aside: of the slot's place."""
    places = [slot + 1 + aside for slot in range(len(slots))]
    heights = [changed.exact_match for changed in slots]
    low, high = ([changed.ci95[i] for changed in slots] for i in (0, 1))
    ax.vlines(places, low, high, color=colour, linewidth=1.0, alpha=0.6)
    ax.plot(places, heights, "-", color=colour, linewidth=1.6)
    for place, changed in zip(places, slots, strict=True):
        face = COLOURS["paper"][0] if changed.inert else colour
        ax.plot(place, changed.exact_match, "o", color=colour, markerfacecolor=face, markersize=5)


def _highest(found: InterventionScores) -> float:
    """The highest bound of what `interventions` draws."""
    slots = [*found.alone.removed, *found.alone.mean, *(found.alone.donor or [])]
    return max(found.ci95[1], *(changed.ci95[1] for changed in slots))


def _along(ax: Axes, line: Sequence[float | None], colour: str, dash: Dash, alpha: float) -> None:
    """A line over places in the middle of equal shares of 0 to 1."""
    heights = np.array(line, dtype=float)
    places = (np.arange(len(heights)) + 0.5) / len(heights)
    ax.plot(places, heights, dash, color=colour, alpha=alpha, linewidth=1.8)


def _cut_colour(number: int) -> str:
    return [SERIES[1], SERIES[2], SERIES[4], MUTED][number % 4]


def _pass(number: int, passes: int) -> str:
    return f"pass {number + 1} of {passes}"


def _slots(cells: np.ndarray) -> list[int]:
    return list(range(1, cells.shape[1] + 1))
