"""report ← evaluation, students, teacher, kv_targets, problems: one page and a table."""

from __future__ import annotations

import shutil

from kava_core.artefacts import publish, work_folder
from stages.common import Run, stage


@stage
def report(run: Run) -> None:
    """Compare the systems: one HTML page, its figures as PNGs, and a table here.

    Writes report/index.html, which needs no network, and summary.json. The table goes to stdout.
    """
    from rich.console import Console

    from kava_core.reporting.inputs import Training, read_findings
    from kava_core.reporting.page import compare, write_report
    from kava_core.reporting.terminal import comparison_table

    settings = run.settings
    log = run.data / ".runs" / f"{run.name}.jsonl"
    findings = read_findings(run.path(), list(settings.students), log)
    plain = settings.model_dump(mode="json", by_alias=True)
    training = plain["teacher"]["training"]
    comparisons = compare(findings, Training.model_validate(training) if training else None)
    output = run.path("report")
    built = work_folder(output, plain["report"]) / "output"
    shutil.rmtree(built, ignore_errors=True)  # half a page of a killed run is worth nothing
    built.mkdir()
    write_report(
        built,
        findings,
        comparisons,
        title=settings.report.title,
        pipeline=run.name,
        settings=plain,
    )
    publish(built, output)
    console = Console(highlight=False)
    for comparison in comparisons:
        title = f"{settings.report.title}: {comparison.test_set}"
        console.print()
        console.print(comparison_table(title, comparison.systems, comparison.headline))
    console.print(f"\nReport: {output / 'index.html'}", soft_wrap=True)
