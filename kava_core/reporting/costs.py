"""What a pipeline cost where it last ran: a page beside the report, for what is not the same twice.

Seconds, memory and the machine. No result depends on them, and no later stage reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from kava_core.findings.evaluation import SystemCost
from kava_core.reporting.inputs import PipelineCosts, PipelineFindings
from kava_core.reporting.page import ComparisonSection, readable_seconds, render, write_page
from kava_core.reporting.style import Drawing, canvas, colours_of, finish, looks_of
from kava_core.reporting.terminal import cost_table
from kava_core.reporting.truncation import latency_maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EQUAL = 0.1


def write_costs(
    folder: Path,
    costs: PipelineCosts,
    findings: PipelineFindings,
    comparisons: Sequence[ComparisonSection],
    *,
    title: str,
    pipeline: str,
) -> None:
    """Write index.html, a PNG per figure and table.txt into `folder`."""
    systems = costs.evaluation.systems
    figures = {
        test_set: cost_bars(f"costs-{number}", found)
        for number, (test_set, found) in enumerate(systems.items(), start=1)
    }
    latency = []
    if findings.grid is not None and costs.fidelity is not None:
        latency.append(latency_maps(findings.grid, costs.fidelity))
    training = {name: costs.training_seconds(name) for name in findings.students}
    lead = training_times(comparisons, training)
    page = render(
        "costs.html.jinja",
        title=title,
        pipeline=pipeline,
        lead=lead,
        systems=systems,
        training=training,
        figures=figures,
        latency=latency,
        costs=costs,
        looks=looks_of(name for found in systems.values() for name in found),
    )
    write_page(folder, page, [*figures.values(), *latency])
    with (folder / "table.txt").open("w", encoding="utf-8") as file:
        console = Console(file=file, width=88, highlight=False)
        for test_set, found in systems.items():
            console.print(cost_table(f"{title}, costs: {test_set}", found, training))
        console.print(lead)


def training_times(
    comparisons: Sequence[ComparisonSection], training: Mapping[str, float | None]
) -> str:
    """Who is ahead in equal time: the best latent student, or those without latents.

    Times that differ by at most a tenth are called equal. Empty where the run log does not know
    them, or there is no such comparison.
    """
    lead = comparisons[0].headline
    ours = None if lead is None else training.get(lead.best.name)
    if lead is None or ours is None:
        return ""
    said = [f"Training {lead.best.name}, the best latent student, took {readable_seconds(ours)}."]
    for duel in lead.duels:
        theirs = training.get(duel.rival.name)
        if theirs is not None:
            share = theirs / ours
            when = "In equal time" if abs(share - 1) <= EQUAL else f"In {share:.0%} of that time"
            took = readable_seconds(theirs)
            said.append(f"{when} ({took}), {duel.rival.name} {duel.outcome}.")
    return " ".join(said)


def cost_bars(name: str, systems: Mapping[str, SystemCost]) -> Drawing:
    """Milliseconds per problem and peak memory of every system on one test set."""
    panels = {
        "wall-clock per problem (ms)": [
            1e3 * cost.seconds_per_problem for cost in systems.values()
        ],
        "peak memory of a batch (MB)": [cost.peak_memory_mb for cost in systems.values()],
    }

    def draw() -> Figure:
        figure = canvas(70 + 28 * len(systems))
        axes = figure.subplots(1, 2, sharey=True)
        looks = colours_of(list(systems))
        for ax, (label, values) in zip(axes, panels.items(), strict=True):
            bars = ax.barh(range(len(systems)), values, color=[looks[s][0] for s in systems])
            ax.bar_label(bars, [f"{value:.3g}" for value in values], padding=4)
            ax.set_xlim(0, 1.15 * max(values))
            ax.set_xlabel(label)
            ax.grid(visible=False)
        axes[0].set_yticks(range(len(systems)), list(systems))
        axes[0].invert_yaxis()
        return figure

    caption = (
        "Wall-clock is that of a batch over its size, after a first run that is not timed; peak "
        "memory is a batch's tensors, the weights not counted."
    )
    return finish(name, "Wall-clock and memory", caption, draw)
