"""The comparison and the costs as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kava_core.findings.evaluation import SystemCost
from kava_core.reporting.page import ComparisonSection, readable_seconds
from kava_core.reporting.systems import Headline, System

COLOURS = {"teacher-cot": "bold", "latent": "cyan", "teacher-no-cot": "dim"}


def comparison_table(title: str, systems: Sequence[System], headline: Headline | None) -> Group:
    """Who is ahead, in words; exact match with its 95 % interval and passes of each system."""
    table = _table(
        "", ["exact\nmatch", "95 %\ninterval", "forward\npasses", "tokens", "training\nsteps"]
    )
    for system in systems:
        score = system.score
        best = headline is not None and system is headline.best
        table.add_row(
            Text(f"{system.name} *" if system.collapse else system.name),
            f"{score.exact_match:.1f} %",
            f"{score.ci95[0]:.1f} to {score.ci95[1]:.1f}",
            f"{score.forward_passes:.1f}",
            f"{score.tokens:.1f}",
            f"{system.training.steps:,}" if system.training else "–",
            style="bold cyan" if best else COLOURS.get(system.kind, ""),
        )
    words = [f"{systems[0].score.n:,} test problems; passes and tokens are means per problem."]
    words += [f"* {system.name} {system.collapse}." for system in systems if system.collapse]
    parts: list[RenderableType] = [Text(title, style="bold")]
    if headline is not None:
        parts.append(Padding(Text(headline.sentence), (1, 0)))
    return Group(*parts, table, Text("\n".join(words), style="dim"))


def write_comparison(path: Path, title: str, comparisons: Sequence[ComparisonSection]) -> None:
    """Write the tables of all test sets, as a terminal of 88 columns shows them."""
    with path.open("w", encoding="utf-8") as file:
        console = Console(file=file, width=88, highlight=False)
        for part in comparisons:
            name = f"{title}: {part.test_set}"
            console.print(comparison_table(name, part.systems, part.headline))


def cost_table(
    title: str, costs: Mapping[str, SystemCost], training: Mapping[str, float | None]
) -> Group:
    """Seconds and memory of each system on one test set; training: seconds, as far as is known."""
    table = _table(title, ["ms per\nproblem", "peak\nmemory", "training"])
    for name, cost in costs.items():
        seconds = training.get(name)
        table.add_row(
            Text(name),
            f"{1000 * cost.seconds_per_problem:.1f}",
            f"{cost.peak_memory_mb:.3g} MB",
            "–" if seconds is None else readable_seconds(seconds),
        )
    return Group(table)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(
        title=title or None,
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("system", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table
