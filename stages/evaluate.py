"""evaluation ← problems, teacher, students: accuracy and cost of every system."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kava_core.artefacts import publish, read_json, work_folder, write_json
from kava_core.console import progress, say
from kava_core.errors import KavaError
from stages.common import Run, stage, torch_threads

if TYPE_CHECKING:
    from kava_core.evaluation.accuracy import Prediction
    from kava_core.models.latent import LatentReasoner


@stage
def evaluate(run: Run) -> None:
    """Ask every system the test problems.

    Systems are the teacher writing its chain of thought (teacher-cot), the teacher asked for the
    answer at once (teacher-no-cot) and every student of the pipeline. Writes evaluation/: metrics
    per test set and system, predictions.parquet with all that was generated, and similarity.json,
    the cosine similarity of each student's latents to its targets.
    """
    from kava_core.evaluation.accuracy import ask, summarise
    from kava_core.evaluation.similarity import slot_similarity
    from kava_core.models.loading import load_tokenizer, to_device
    from kava_core.problems.folder import open_problems
    from kava_core.problems.traces import TraceEncoder
    from kava_core.store import TargetsStore

    settings = run.settings.evaluate
    folder = open_problems(run.path("problems"))
    problems = folder.load("test")[: settings.limit]
    if not problems:
        raise KavaError(f"{folder.path} has no test problems. Ask `prepare` for some.")
    tokenizer = load_tokenizer(str(run.path("teacher")))
    encoder = TraceEncoder(tokenizer, folder.traces)
    _check_students(run)
    test_set = problems[0].source
    predictions: dict[str, list[Prediction]] = {}
    similarity: dict[str, Any] = {}
    systems = ["teacher-cot", "teacher-no-cot", *run.settings.students]
    with torch_threads(settings.threads), progress() as display:
        for name in systems:
            task = display.add_task(name, total=len(problems), note="")
            system = to_device(_system(run, name, encoder))
            predictions[name] = ask(
                system,
                tokenizer,
                encoder,
                problems,
                batch_size=settings.batch_size,
                max_new_tokens=settings.max_new_tokens,
                advance=lambda n, task=task: display.advance(task, n),  # type: ignore[misc]
            )
            right = sum(p.correct for p in predictions[name])
            display.update(task, note=f"{right} of {len(problems)} right")
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
    metrics = {test_set: {name: summarise(answers) for name, answers in predictions.items()}}
    write_json(built / "metrics.json", metrics)
    write_json(built / "similarity.json", similarity)
    questions = {p.id: p.question for p in problems}
    _write_predictions(built / "predictions.parquet", test_set, questions, predictions)
    publish(built, output)
    for name, summary in metrics[test_set].items():
        say(f"{name:>18}: {summary['exact_match']:5.1f} %")


def _system(run: Run, name: str, encoder: Any) -> LatentReasoner:
    from kava_core.models.latent import LatentReasoner
    from kava_core.models.loading import load_model

    if name in run.settings.students:
        return LatentReasoner.from_pretrained(run.path("students", name))
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


def _write_predictions(
    path: Path, test_set: str, questions: dict[str, str], predictions: dict[str, list[Prediction]]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"test_set": test_set, "system": name, "question": questions[p.id], **asdict(p)}
        for name, answers in predictions.items()
        for p in answers
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
