"""teacher ← problems: a causal LM that writes the chain of thought and then the answer."""

from __future__ import annotations

from kava_core.artefacts import publish
from kava_core.console import say, warn

from .run import Run, stage


@stage
def teacher(run: Run) -> None:
    """Load or build a causal LM and fine-tune it on chains of thought.

    Writes teacher/: weights, configuration and tokenizer in Hugging Face's layout, and metrics.json
    with its accuracy on validation problems with and without a written chain; and its loss curves
    in curves/teacher/.
    """
    from kava_core.distill.teacher_job import train_teacher
    from kava_core.evaluation.validation import ValidateJob, validate
    from kava_core.parallel.threads import torch_threads
    from kava_core.planning.room import lacking_room
    from kava_core.problems.folder import open_problems

    settings, output = run.settings.teacher, run.path("teacher")
    problems = open_problems(run.made("problems"))
    if lacking := lacking_room(run.settings, run.path(), "teacher"):
        warn(f"teacher: {lacking}")
    with torch_threads(settings.training.threads if settings.training else 1):
        trained = train_teacher(
            settings, problems, output, run.settings.cadence, run.settings.resources
        )
        job = ValidateJob.of(problems.path, trained.folder, settings)
        metrics = validate(job, run.settings.resources)
        trained.save(metrics)
    publish((trained.curves, run.path("curves", "teacher")), (trained.folder, output))
    say(
        f"teacher on {metrics['n']} validation problems: {metrics['exact_match_cot']:.1f} % with "
        f"a chain of thought, {metrics['exact_match_no_cot']:.1f} % without"
    )
