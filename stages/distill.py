"""students/<name> ← kv_targets (or problems), teacher: a student that reasons in latents."""

from __future__ import annotations

from pathlib import Path

import click

from kava_core.artefacts import publish
from kava_core.console import warn
from kava_core.errors import KavaError
from kava_core.settings import Imports, Pipeline

from .run import AnyRun, any_stage

FOLDER = click.Path(file_okay=False, path_type=Path)


@any_stage
@click.argument("student")
@click.option("--targets", type=FOLDER, help="Of an imported pipeline: the targets store.")
@click.option("--teacher", type=FOLDER, help="Of an imported pipeline: the teacher's folder.")
def distill(run: AnyRun, student: str, targets: Path | None, teacher: Path | None) -> None:
    """Train the student called STUDENT in the pipeline's `students`.

    Reads kv_targets/ and the teacher's weights and tokenizer, nothing else (a student without
    latents reads problems/ instead; one with a `model` starts from its weights). Writes
    students/STUDENT/: a model that transformers loads and `LatentReasoner.from_pretrained` thinks
    with, its tokenizer and student.json, and its loss curves in curves/students/STUDENT/. Killed
    and run again, it goes on from its last checkpoint and ends with the same weights.

    A pipeline that has students alone imports targets and teacher: from the folders of its
    `imports`, from those named by --targets and --teacher, or from where `kava store import` put
    them.
    """
    from kava_core.distill.inputs import StudentInputs
    from kava_core.distill.student_job import train_student
    from kava_core.planning.room import student_lacking_room

    if student not in run.settings.students:
        raise KavaError(
            f"pipeline {run.name} has no student {student!r}. There are: "
            f"{', '.join(run.settings.students)}."
        )
    if targets is not None or teacher is not None:
        named = (None if path is None else str(path.absolute()) for path in (targets, teacher))
        run = run.reading(Imports(**dict(zip(("targets", "teacher"), named, strict=True))))
    run.check_imports()
    settings, output = run.settings.students[student], run.path("students", student)
    inputs = StudentInputs.checked(
        student,
        settings,
        run.settings.evict if isinstance(run.settings, Pipeline) else None,
        source=run.taught if settings.reads == "problems" else run.made(settings.reads),
        teacher=run.made("teacher"),
        lacking=run.lacking if settings.reads == "problems" else None,
    )
    cadence, resources = run.settings.cadence, run.settings.resources
    lacking = student_lacking_room(settings, cadence, inputs.model, inputs.source, output)
    if lacking is not None:
        warn(f"distill {student}: {lacking}")
    job = train_student(student, settings, inputs, output, cadence, resources)
    publish((job.curves, run.path("curves", "students", student)), (job.folder, output))
