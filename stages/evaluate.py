"""evaluation ← problems, teacher, students: accuracy and cost of every system."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kava_core.artefacts import publish, read_json, work_folder, write_json
from kava_core.console import progress, say
from kava_core.errors import KavaError

from .run import Run, stage

if TYPE_CHECKING:
    from kava_core.evaluation.results import Examined
    from kava_core.latents.teacher import TeacherView
    from kava_core.models.latent import LatentReasoner
    from kava_core.problems.folder import AskedFolder
    from kava_core.problems.records import Problem


@stage
def evaluate(run: Run) -> None:
    """Ask every system the problems of every test set.

    Systems are the teacher writing its chain of thought (teacher-cot), the teacher asked for the
    answer at once (teacher-no-cot) and every student of the pipeline. Writes evaluation/: metrics
    and comparisons per test set and system, predictions.parquet with all that was generated, what
    `dvc metrics` and `dvc plots` show, similarity.json, the cosine similarity of each student's
    latents to its targets, and interpretability.json, what the latents hold
    (`kava_core.latents.interpret`).
    """
    from kava_core.evaluation.results import ProblemSet, examine, write_results
    from kava_core.latents.interpret import interpret, write_insights
    from kava_core.latents.similarity import slot_similarity
    from kava_core.models.loading import load_tokenizer, to_device
    from kava_core.parallel.threads import torch_threads
    from kava_core.problems.folder import open_test_sets
    from kava_core.problems.traces import TraceEncoder
    from kava_core.store import TargetsStore

    settings = run.settings.evaluate
    folder = open_test_sets(run.path("test_sets"))
    encoder = TraceEncoder(load_tokenizer(str(run.path("teacher"))), folder.traces)
    test_sets = [
        ProblemSet.of(name, problems[: settings.limit], encoder)
        for name, problems in folder.load_all().items()
    ]
    _check_students(run)
    examined: dict[str, dict[str, Examined]] = {test_set.name: {} for test_set in test_sets}
    similarity: dict[str, Any] = {}
    insights: dict[str, Any] = {}
    own = test_sets[0].problems
    systems = ["teacher-cot", "teacher-no-cot", *run.settings.students]
    with torch_threads(settings.threads), progress() as display:
        teacher = _read_teacher(run, folder, own)
        for name in systems:
            total = sum(len(test_set.problems) for test_set in test_sets)
            task = display.add_task(name, total=total, note="")
            system = to_device(_system(run, name, encoder))
            for test_set in test_sets:
                display.update(task, note=test_set.name)
                examined[test_set.name][name] = examine(
                    system,
                    encoder,
                    test_set,
                    batch_size=settings.batch_size,
                    max_new_tokens=settings.max_new_tokens,
                    advance=lambda n, task=task: display.advance(task, n),  # type: ignore[misc]
                )
            if not system.config.latents or run.settings.students[name].model is not None:
                continue  # the slots of a student that began as another model have their own basis
            similarity[name] = slot_similarity(
                system,
                TargetsStore.open(run.path("kv_targets")),
                records=settings.similarity_records,
                batch_size=settings.batch_size,
            )
            if teacher is not None:
                display.update(task, note="latents")
                insights[name] = interpret(
                    system,
                    teacher,
                    encoder,
                    {problem.id: problem for problem in own},
                    own[: settings.intervention_problems],
                    batch_size=settings.batch_size,
                    max_new_tokens=settings.max_new_tokens,
                )
    output = run.path("evaluation")
    built = (
        work_folder(output, "evaluate", {"settings": settings.model_dump(mode="json")}) / "output"
    )
    built.mkdir(exist_ok=True)
    metrics = write_results(built, test_sets, examined, list(run.settings.students))
    write_json(built / "similarity.json", similarity)
    if insights:
        write_insights(built / "interpretability.json", insights)
    publish((built, output))
    for title, entries in metrics.items():
        say(f"{title} ({next(iter(entries.values()))['n']} problems):")
        for name, entry in entries.items():
            say(f"{name:>18}: {entry['exact_match']:5.1f} %")


def _system(run: Run, name: str, encoder: Any) -> LatentReasoner:
    from kava_core.models.latent import LatentReasoner
    from kava_core.models.loading import load_model
    from kava_core.models.students import open_student

    if name in run.settings.students:
        return open_student(run.path("students", name))
    prompt = [] if name == "teacher-cot" else encoder.answer_prompt_ids
    return LatentReasoner.plain(
        load_model(str(run.path("teacher"))), answer_prompt_ids=prompt, eos_token_id=encoder.eos
    )


def _read_teacher(run: Run, folder: AskedFolder, problems: list[Problem]) -> TeacherView | None:
    """The teacher over the first test problems, its caches cut as the store's, and otherwise.

    None where latents are not looked into, or no student has any.
    """
    from kava_core.fidelity.examiner import Layers
    from kava_core.latents.interpret import EXAMPLES, TOP, read_teacher
    from kava_core.latents.teacher import Truncation, readable
    from kava_core.models.loading import load_model, load_tokenizer, to_device
    from kava_core.problems.traces import TraceEncoder
    from kava_core.store import TargetsStore
    from kava_core.targets.plan import Plan
    from kava_core.targets.specs import latent_fraction

    settings = run.settings.evaluate
    thinking = [s for s in run.settings.students.values() if s.reads == "kv_targets"]
    if not (settings.interpret_records and thinking):
        return None
    store = TargetsStore.open(run.path("kv_targets"))
    plan = Plan.of_store(store)
    own = plan.settings.budget
    budgets = sorted({max(1, own // 4), max(1, own // 2), own, 2 * own})
    model = to_device(load_model(str(run.path("teacher"))))
    tokenizer = load_tokenizer(str(run.path("teacher")))
    encoder = TraceEncoder(tokenizer, folder.traces, latent_fraction(store))
    traces = encoder.encode_all([problem for problem in problems if problem.steps])
    return read_teacher(
        model,
        readable(traces, model, settings.interpret_records),
        tokenizer,
        Truncation(
            policy=plan.settings.policy,
            layers=Layers(plan.layers, plan.groups, plan.settings.share),
            budgets={m: plan.with_budget(m).budgets for m in budgets},
            budget=own,
            phase=store.manifest.rotary.phase,
        ),
        examples=EXAMPLES,
        top=TOP,
        batch_size=settings.batch_size,
    )


def _check_students(run: Run) -> None:
    """Every student is there, was made from this teacher and has as many latents as there are
    slots, before anything is asked."""
    from kava_core.models.loading import model_fingerprint
    from kava_core.store import TargetsStore

    teacher = model_fingerprint(str(run.path("teacher")))
    for name in run.settings.students:
        folder = run.path("students", name)
        about = read_json(folder / "student.json")
        made_from = about["fingerprints"]["teacher"]
        if made_from != teacher:
            raise KavaError(
                f"student {name} was made from the teacher {made_from[:12]}…, and the one in "
                f"{run.path('teacher')} is {teacher[:12]}…. Run `kava distill {name}` again."
            )
        latents = read_json(folder / "config.json").get("latents", 0)
        if latents:
            targets = run.path("kv_targets")
            slots = TargetsStore.open(targets).geometry.slots
            if latents != slots:
                raise KavaError(
                    f"student {name} reasons in {latents} latents, and {targets} has {slots} slots "
                    f"per layer and head. Run `kava distill {name}` again."
                )
