"""evaluation ← problems, teacher, students: accuracy and cost of every system."""

from __future__ import annotations

from pathlib import Path

from kava_core.artefacts import fresh_folder, publish, work_folder
from kava_core.console import say, warn

from .run import AnyRun, any_stage


@any_stage
def evaluate(run: AnyRun) -> None:
    """Ask every system the problems of every test set.

    Systems are the teacher writing its chain of thought (teacher-cot), the teacher asked for the
    answer at once (teacher-no-cot), every student of the pipeline, those of `evaluate.write_steps`
    writing their chain as well (NAME-cot), and those of `evaluate.others`. Writes evaluation/:
    metrics and comparisons per test set and system, predictions.parquet with all that was
    generated, what `dvc metrics` and `dvc plots` show, lm_eval.json, the accuracy by another
    harness' rules, similarity.json, the cosine similarity of each student's latents to its targets,
    interpretability.json, what the latents hold, and weights.json, the fingerprints of what was
    asked. Seconds and memory go to measured/evaluation.json. Killed and run again, it goes on where
    it was; a system that is as it was when it was last asked is not asked again.
    """
    from kava_core.evaluation.comparison import compare_systems
    from kava_core.evaluation.job import EvaluateJob
    from kava_core.evaluation.parts import Material, Plan
    from kava_core.evaluation.results import costs_of, write_results
    from kava_core.evaluation.systems import Systems
    from kava_core.findings.base import write_finding
    from kava_core.findings.evaluation import MEASURED, WEIGHTS
    from kava_core.leftovers import keep_only
    from kava_core.parallel.devices import check_own_gpu

    check_own_gpu(run.settings.resources.device, run.settings.resources.gpus_per_worker)
    run.check_asks()
    run.check_imports()
    settings, students, output = (
        run.settings.evaluate,
        run.settings.students,
        run.path("evaluation"),
    )
    _name_strays(run)
    asked = "problems" if settings.split == "validation" else "test_sets"
    run.made(asked)
    problems, test_sets = run.path("problems"), run.path("test_sets")
    compared = any(student.reads == "kv_targets" for student in students.values())
    targets = run.made("kv_targets") if compared else run.path("kv_targets")
    systems = Systems.of(
        run.made("teacher"),
        {name: run.made("students", name) for name in students},
        targets,
        {name: Path(folder).expanduser() for name, folder in settings.others.items()},
        settings.write_steps,
    )
    material = Material.open(systems.teacher, problems, test_sets, settings)
    systems.check_prompts(material.encoder.prompt)
    plan = Plan.of(systems, material, targets, settings, output)
    job = EvaluateJob(systems, plan, problems, test_sets, targets, settings)
    found = compare_systems(job, material, run.settings.resources)
    work = work_folder(output, "evaluate", {"settings": settings.model_dump(mode="json")})
    built = fresh_folder(work / "output")
    scores = write_results(built, list(material.test_sets.values()), found, systems.compared)
    write_finding(built / WEIGHTS, plan.weights)
    write_finding(run.path("measured", MEASURED), costs_of(found.examinations))
    publish((built, output))
    keep_only(output, "evaluate", plan.folders)
    for title, entries in scores.items():
        say(f"{title} ({next(iter(entries.values())).n} problems):")
        for name, entry in entries.items():
            say(f"{name:>18}: {entry.exact_match:5.1f} %")


def _name_strays(run: AnyRun) -> None:
    """Folders of students that the settings no longer name are left alone, and out."""
    folder = run.path("students")
    there = {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()
    for name in sorted(there - run.settings.students.keys()):
        warn(f"evaluate: {folder / name} is no student of the settings, and is left out")
