"""report, costs ← all that came before: a page of what was found, and one of what it cost."""

from __future__ import annotations

from kava_core.artefacts import fresh_folder, publish, work_folder
from kava_core.console import say
from kava_core.settings import Imported

from .run import AnyRun, any_stage


@any_stage
def report(run: AnyRun) -> None:
    """Compare the systems: one HTML page, its figures as PNGs, and a table.

    Writes report/index.html, which needs no network, table.txt for the terminal, summary.json and
    losses.json; and apart from them, in costs/, a page and a table of seconds and memory, which are
    not the same twice.
    """
    from kava_core.reporting.costs import write_costs
    from kava_core.reporting.inputs import read_costs, read_findings
    from kava_core.reporting.page import compare, write_report
    from kava_core.reporting.terminal import write_comparison

    run.check_asks()
    settings, students = run.settings, list(run.settings.students)
    title = settings.report.title
    made = [f"students/{name}" for name in students]
    for artefact in ("problems", "test_sets", "teacher", "kv_targets", *made, "evaluation"):
        run.made(artefact)
    findings = read_findings(
        run.path(),
        students,
        teacher=run.path("teacher"),
        kv_targets=run.path("kv_targets") if isinstance(settings, Imported) else None,
        write_steps=settings.evaluate.write_steps,
    )
    costs = read_costs(run.path(), students, run.data / ".runs" / f"{run.name}.jsonl")
    comparisons = compare(findings)
    plain = settings.model_dump(mode="json", by_alias=True)
    work = work_folder(run.path("report"), "report", plain["report"])
    folders = [(fresh_folder(work / name), run.path(name)) for name in ("report", "costs")]
    (page, _), (beside, _) = folders
    write_report(page, findings, comparisons, title=title, pipeline=run.name, settings=plain)
    write_comparison(page / "table.txt", title, comparisons)
    write_costs(beside, costs, findings, comparisons, title=title, pipeline=run.name)
    publish(*folders)
    say(f"Table: {run.path('report', 'table.txt')}\nReport: {run.path('report', 'index.html')}")
