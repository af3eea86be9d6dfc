"""`kava check`: whether a pipeline can run, without weights, data or a network."""

from __future__ import annotations

from pathlib import Path

import click

from .run import data_option, pipelines_option


@click.command("check")
@click.argument("names", metavar="[PIPELINE]...", nargs=-1)
@pipelines_option
@data_option
def check(names: tuple[str, ...], pipelines: Path, data: Path) -> None:
    """Check each PIPELINE (default: all of the file) in seconds, before it costs days.

    Reads its settings, builds its models from their published shapes without memory for weights,
    prints its plan, and runs two steps of every stage on tiny random models of the same families
    with drawn problems. Needs neither weights, nor data, nor a network.
    """
    from .rehearsal import check_pipelines

    check_pipelines(pipelines, names, data)
