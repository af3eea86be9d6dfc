"""The comparison as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kava_core.reporting.systems import Headline, System

COLOURS = {"teacher-cot": "bold", "latent": "cyan", "teacher-no-cot": "dim"}


def comparison_table(title: str, systems: Sequence[System], headline: Headline | None) -> Group:
    """Exact match with its 95 % interval and costs of each system, and the gap in words."""
    table = Table(
        title=title,
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("system", overflow="fold")
    for name in (
        "exact\nmatch",
        "95 %\ninterval",
        "forward\npasses",
        "tokens",
        "ms per\nproblem",
        "training\nsteps",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for system in systems:
        score = system.score
        best = headline is not None and system is headline.best
        table.add_row(
            Text(system.name),
            f"{score.exact_match:.1f} %",
            f"{score.ci95[0]:.1f} to {score.ci95[1]:.1f}",
            f"{score.forward_passes:.1f}",
            f"{score.tokens:.1f}",
            f"{1000 * score.seconds_per_problem:.1f}",
            f"{system.training.steps:,}" if system.training else "–",
            style="bold cyan" if best else COLOURS.get(system.kind, ""),
        )
    words = f"{systems[0].score.n:,} test problems; passes, tokens and time are means per problem."
    parts: list[RenderableType] = [table, Text(words, style="dim")]
    if headline is not None:
        parts.append(Padding(Text(headline.sentence), (1, 0, 0, 0)))
    return Group(*parts)
