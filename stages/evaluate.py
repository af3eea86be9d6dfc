"""evaluation ← problems, teacher, students: accuracy and cost of every system."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kava_core.artefacts import publish, read_json, work_folder, write_json
from kava_core.console import progress, say
from kava_core.errors import KavaError
from stages.common import Run, stage, torch_threads

if TYPE_CHECKING:
    from kava_core.evaluation.results import Examined
    from kava_core.models.latent import LatentReasoner


@stage
def evaluate(run: Run) -> None:
    """Ask every system the problems of every test set.

    Systems are the teacher writing its chain of thought (teacher-cot), the teacher asked for the
    answer at once (teacher-no-cot) and every student of the pipeline. Writes evaluation/: metrics
    and comparisons per test set and system, predictions.parquet with all that was generated, what
    `dvc metrics` and `dvc plots` show, and similarity.json, the cosine similarity of each student's
    latents to its targets.
    """
    from kava_core.evaluation.results import ProblemSet, examine, write_results
    from kava_core.evaluation.similarity import slot_similarity
    from kava_core.models.loading import load_tokenizer, to_device
    from kava_core.problems.folder import open_problems
    from kava_core.problems.traces import TraceEncoder
    from kava_core.store import TargetsStore

    settings = run.settings.evaluate
    folder = open_problems(run.path("problems"))
    encoder = TraceEncoder(load_tokenizer(str(run.path("teacher"))), folder.traces)
    test_sets = [
        ProblemSet.of(name, problems[: settings.limit], encoder)
        for name, problems in folder.test_sets().items()
    ]
    _check_students(run)
    examined: dict[str, dict[str, Examined]] = {test_set.name: {} for test_set in test_sets}
    similarity: dict[str, Any] = {}
    systems = ["teacher-cot", "teacher-no-cot", *run.settings.students]
    with torch_threads(settings.threads), progress() as display:
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
            if system.config.latents:
                similarity[name] = slot_similarity(
                    system,
                    TargetsStore.open(run.path("kv_targets")),
                    records=settings.similarity_records,
                    batch_size=settings.batch_size,
                )
    output = run.path("evaluation")
    built = work_folder(output, {"settings": settings.model_dump(mode="json")}) / "output"
    built.mkdir(exist_ok=True)
    metrics = write_results(built, test_sets, examined, list(run.settings.students))
    write_json(built / "similarity.json", similarity)
    publish(built, output)
    for title, entries in metrics.items():
        say(f"{title} ({next(iter(entries.values()))['n']} problems):")
        for name, entry in entries.items():
            say(f"{name:>18}: {entry['exact_match']:5.1f} %")


def _system(run: Run, name: str, encoder: Any) -> LatentReasoner:
    from kava_core.evaluation.students import open_student
    from kava_core.models.latent import LatentReasoner
    from kava_core.models.loading import load_model

    if name in run.settings.students:
        return open_student(run.path("students", name))
    prompt = [] if name == "teacher-cot" else encoder.answer_prompt_ids
    return LatentReasoner.plain(
        load_model(str(run.path("teacher"))), answer_prompt_ids=prompt, eos_token_id=encoder.eos
    )


def _check_students(run: Run) -> None:
    """Every student is there and was made from this teacher, before anything is asked."""
    from kava_core.models.loading import model_fingerprint

    teacher = model_fingerprint(str(run.path("teacher")))
    for name in run.settings.students:
        about = read_json(run.path("students", name) / "student.json")
        made_from = about["fingerprints"]["teacher"]
        if made_from != teacher:
            raise KavaError(
                f"student {name} was made from the teacher {made_from[:12]}…, and the one in "
                f"{run.path('teacher')} is {teacher[:12]}…. Run `kava distill {name}` again."
            )
