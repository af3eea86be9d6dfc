"""`kava show`: the results of a pipeline, as its report's table."""

from __future__ import annotations

from pathlib import Path

import click

from kava_core.artefacts import read_text

from .run import AnyRun, data_option, pipelines_option


@click.command("show")
@click.argument("pipeline", required=False)
@pipelines_option
@data_option
def show(pipeline: str | None, pipelines: Path, data: Path) -> None:
    """Print the tables of PIPELINE's report (default: the active one), and where its pages are."""
    from kava_core.settings import load_any_pipeline

    name, settings = load_any_pipeline(pipelines, pipeline)
    run = AnyRun(name, settings, pipelines.parent, data)
    run.check_asks()
    for folder in ("report", "costs"):
        click.echo(read_text(run.made(folder) / "table.txt").rstrip())
    click.echo(f"Report: {run.path('report', 'index.html')}")
