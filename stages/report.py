"""report ← all that came before it: one page and a table."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kava_core.artefacts import publish, read_json, work_folder
from kava_core.console import say

from .run import Run, stage

if TYPE_CHECKING:
    from kava_core.reporting.page import Comparison


@stage
def report(run: Run) -> None:
    """Compare the systems: one HTML page, its figures as PNGs, and a table.

    Writes report/index.html, which needs no network, table.txt for the terminal, and summary.json.
    """
    from kava_core.reporting.hardware import hardware
    from kava_core.reporting.inputs import Training, read_findings
    from kava_core.reporting.page import compare, write_report

    settings = run.settings
    log = run.data / ".runs" / f"{run.name}.jsonl"
    findings = read_findings(run.path(), list(settings.students), log)
    plain = settings.model_dump(mode="json", by_alias=True)
    training = read_json(run.path("teacher", "teacher.json"))["settings"]["training"]
    comparisons = compare(findings, Training.model_validate(training) if training else None)
    output = run.path("report")
    built = work_folder(output, "report", plain["report"]) / "output"
    shutil.rmtree(built, ignore_errors=True)  # half a page of a killed run is worth nothing
    built.mkdir()
    write_report(
        built,
        findings,
        comparisons,
        title=settings.report.title,
        pipeline=run.name,
        settings=plain,
        hardware=hardware(),
    )
    _write_table(built / "table.txt", settings.report.title, comparisons)
    publish((built, output))
    say(f"Table: {output / 'table.txt'}\nReport: {output / 'index.html'}")


def _write_table(path: Path, title: str, comparisons: Sequence[Comparison]) -> None:
    from rich.console import Console

    from kava_core.reporting.terminal import comparison_table

    with path.open("w", encoding="utf-8") as file:
        console = Console(file=file, width=88, highlight=False)
        for comparison in comparisons:
            name = f"{title}: {comparison.test_set}"
            console.print(comparison_table(name, comparison.systems, comparison.headline))
