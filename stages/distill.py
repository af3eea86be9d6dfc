"""students/<name> ← kv_targets (or problems), teacher: a student that reasons in latents."""

from __future__ import annotations

import click

from kava_core.artefacts import publish
from kava_core.errors import KavaError

from .run import Run, stage


@stage
@click.argument("student")
def distill(run: Run, student: str) -> None:
    """Train the student called STUDENT in the pipeline's `students`.

    Reads kv_targets/ and the teacher's weights and tokenizer, nothing else (a student without
    latents reads problems/ instead; one with a `model` starts from its weights). Writes
    students/STUDENT/: a model that transformers loads and `LatentReasoner.from_pretrained` thinks
    with, its tokenizer and student.json, and its loss curves in curves/students/STUDENT/. Killed
    and run again, it goes on from its last checkpoint and ends with the same weights.
    """
    from kava_core.distill.inputs import StudentInputs
    from kava_core.distill.student_job import train_student

    if student not in run.settings.students:
        raise KavaError(
            f"pipeline {run.name} has no student {student!r}. There are: "
            f"{', '.join(run.settings.students)}."
        )
    settings, output = run.settings.students[student], run.path("students", student)
    inputs = StudentInputs.checked(
        student,
        settings,
        run.settings.evict,
        teacher=run.path("teacher"),
        source=run.taught if settings.reads == "problems" else run.path(settings.reads),
    )
    cadence, resources = run.settings.cadence, run.settings.resources
    job = train_student(student, settings, inputs, output, cadence, resources)
    publish((job.curves, run.path("curves", "students", student)), (job.folder, output))
