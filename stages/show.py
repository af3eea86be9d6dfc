"""`kava show`: the results of a pipeline, as its report's table."""

from __future__ import annotations

import click

from kava_core.artefacts import read_text

from .run import AnyRun, tool


@tool
def show(run: AnyRun) -> None:
    """Print the tables of a pipeline's report, and where its pages are."""
    for name in ("report", "costs"):
        click.echo(read_text(run.path(name, "table.txt")).rstrip())
    click.echo(f"Report: {run.path('report', 'index.html')}")
