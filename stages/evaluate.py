"""evaluation ← problems, teacher, students: accuracy and cost of every system."""

from __future__ import annotations

from pathlib import Path

from kava_core.artefacts import fresh_folder, publish, work_folder
from kava_core.console import progress, say, warn

from .run import AnyRun, any_stage


@any_stage
def evaluate(run: AnyRun) -> None:
    """Ask every system the problems of every test set.

    Systems are the teacher writing its chain of thought (teacher-cot), the teacher asked for the
    answer at once (teacher-no-cot), every student of the pipeline, and those of
    `evaluate.others`. Writes evaluation/: metrics
    and comparisons per test set and system, predictions.parquet with all that was generated, what
    `dvc metrics` and `dvc plots` show, lm_eval.json, the accuracy by another harness' rules,
    similarity.json, the cosine similarity of each student's latents to its targets, and
    interpretability.json, what the latents hold. Seconds and memory go to
    measured/evaluation.json.
    """
    from kava_core.evaluation.comparison import compare_systems
    from kava_core.evaluation.examination import ProblemSet
    from kava_core.evaluation.results import costs_of, write_results
    from kava_core.evaluation.systems import Systems
    from kava_core.findings.base import write_finding
    from kava_core.findings.evaluation import MEASURED
    from kava_core.hardware import hardware
    from kava_core.latents.teacher import Truncation, read_teacher, readable
    from kava_core.models.loading import load_model, load_tokenizer, to_device
    from kava_core.parallel.devices import check_own_gpu
    from kava_core.parallel.threads import torch_threads
    from kava_core.problems.folder import open_test_sets
    from kava_core.problems.traces import TraceEncoder
    from kava_core.store import TargetsStore
    from kava_core.targets.plan import Plan
    from kava_core.targets.specs import latent_fraction

    run.check_asks()
    run.check_imports()
    settings, students = run.settings.evaluate, run.settings.students
    check_own_gpu(run.settings.resources.device, run.settings.resources.gpus_per_worker)
    _name_strays(run)
    teacher, targets = str(run.path("teacher")), run.path("kv_targets")
    systems = Systems.of(
        run.path("teacher"),
        {name: run.path("students", name) for name in students},
        targets,
        {name: Path(folder).expanduser() for name, folder in settings.others.items()},
    )
    folder = open_test_sets(run.path("test_sets"))
    systems.check_prompts(folder.prompt)
    encoder = TraceEncoder(load_tokenizer(teacher), folder.traces, prompt=folder.prompt)
    test_sets = [
        ProblemSet.of(name, problems[: settings.limit], encoder)
        for name, problems in folder.load_all().items()
    ]
    store = TargetsStore.open(targets) if systems.native else None
    view = None
    with torch_threads(settings.threads), progress() as display:
        if store is not None and settings.interpret_records:
            fraction = latent_fraction(store)
            thinking = TraceEncoder(encoder.tokenizer, folder.traces, fraction, folder.prompt)
            traces = thinking.encode_all([p for p in test_sets[0].problems if p.steps])
            model = to_device(load_model(teacher))
            view = read_teacher(
                model,
                readable(traces, model, settings.interpret_records),
                encoder.tokenizer,
                Truncation.of(Plan.of_store(store)),
                batch_size=settings.batch_size,
            )
        found = compare_systems(
            systems,
            encoder,
            test_sets,
            store,
            view,
            display,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            similarity_records=settings.similarity_records,
            intervention_problems=settings.intervention_problems,
        )
    output = run.path("evaluation")
    work = work_folder(output, "evaluate", {"settings": settings.model_dump(mode="json")})
    built = fresh_folder(work / "output")
    scores = write_results(built, test_sets, found, [*students, *settings.others])
    write_finding(run.path("measured", MEASURED), costs_of(found.examinations, hardware()))
    publish((built, output))
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
