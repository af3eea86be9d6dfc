"""`kava compare`: systems × pipelines, in the terminal and as one page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from kava_core.artefacts import atomic_path
from kava_core.console import say

from .run import data_option


@click.command()
@click.argument("names", metavar="A B …", nargs=-1, required=True)
@data_option
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The page. Default: DATA/compare/A-B-….html.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def compare(names: tuple[str, ...], data: Path, output: Path | None, as_json: bool) -> None:
    """Compare the evaluations of several pipelines or experiments.

    A, B, … are names of pipelines, or paths: of a pipeline's folder, of an evaluation folder, or
    of a copy of the project (a worktree, an experiment) whose active pipeline is meant.
    """
    from rich.console import Console

    from kava_core.reporting import compare as reporting

    pipelines = reporting.read_pipelines(names, data)
    if output is None:
        slug = "-".join(re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") for name in names)
        output = data / "compare" / f"{slug[:100]}.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    page = reporting.as_page(pipelines)
    with atomic_path(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    if as_json:
        click.echo(json.dumps(reporting.as_json(pipelines), indent=2, ensure_ascii=False))
    else:
        Console().print(reporting.as_table(pipelines))
    say(f"Page: {output}")
