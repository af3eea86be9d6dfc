"""students/<name> ← kv_targets (or problems), teacher: a student that reasons in latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kava_core.artefacts import publish, work_folder, write_json
from kava_core.errors import KavaError
from stages.common import Run, stage, torch_threads
from stages.fitting import fit_settings

if TYPE_CHECKING:
    from kava_core.config import Student
    from kava_core.models.latent import LatentReasoner
    from kava_core.store import TargetsStore


@stage
@click.argument("student")
def distill(run: Run, student: str) -> None:
    """Train the student called STUDENT in the pipeline's `students`.

    Reads kv_targets/ and the teacher's weights and tokenizer, nothing else (a student without
    latents reads problems/ instead). Writes students/STUDENT/: a model for
    `LatentReasoner.from_pretrained`, its tokenizer, student.json and loss curves. Killed and run
    again, it goes on from its last checkpoint and ends with the same weights.
    """
    from kava_core.distill.batches import AnswerDataset, TargetsDataset
    from kava_core.distill.fit import fit
    from kava_core.distill.student import (
        Match,
        add_lora,
        merge_lora,
        student_terms,
    )
    from kava_core.models.loading import (
        load_model,
        load_tokenizer,
        model_fingerprint,
        save_model,
        tokenizer_fingerprint,
    )
    from kava_core.problems.folder import open_problems
    from kava_core.problems.traces import TraceEncoder
    from kava_core.store import Expectation, TargetsStore
    from kava_core.store.sampler import ShardShuffleSampler

    if student not in run.settings.students:
        raise KavaError(
            f"pipeline {run.name} has no student {student!r}. There are: "
            f"{', '.join(run.settings.students)}."
        )
    settings = run.settings.students[student]
    training = settings.training
    teacher = str(run.path("teacher"))
    tokenizer = load_tokenizer(teacher)
    inputs = {
        "teacher": model_fingerprint(teacher),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    store: TargetsStore | None = None
    dataset: Any
    if settings.reasoning != "none":
        store = TargetsStore.open(
            run.path("kv_targets"),
            Expectation(teacher=inputs["teacher"], tokenizer=inputs["tokenizer"]),
        )
        inputs["kv_targets"] = store.manifest.digest
        traces = str(store.manifest.settings["traces"])
        dataset, sizes = TargetsDataset(store, chains=settings.w_cot > 0), list(store.sizes)
    else:
        problems = open_problems(run.path("problems"))
        inputs["problems"] = problems.fingerprint("train")
        traces = problems.traces
        encoded = TraceEncoder(tokenizer, problems.traces).encode_all(problems.load("train"))
        dataset, sizes = AnswerDataset(encoded, chains=settings.w_cot > 0), [len(encoded)]
    if len(dataset) < training.batch_size:
        raise KavaError(
            f"there are {len(dataset)} training records, fewer than one batch of "
            f"{training.batch_size}. Lower students.{student}.training.batch_size."
        )
    plain = settings.model_dump(mode="json", by_alias=True)
    output = run.path("students", student)
    work = work_folder(output, {"settings": plain, "inputs": inputs})
    folder = work / "output"
    folder.mkdir(exist_ok=True)
    with torch_threads(training.threads):
        model = _build(settings, load_model(teacher), tokenizer, store)
        adapters = None
        if training.lora is not None:
            adapters = add_lora(model, **training.lora.model_dump(), seed=training.seed)
        fit(
            model,
            student_terms(_objective(settings, store), Match.of(store) if store else None),
            dataset,
            ShardShuffleSampler(sizes, seed=training.seed, window=settings.shard_window),
            fit_settings(training),
            folder=work / "checkpoints",
            live_folder=folder / "live",
            title=student,
            loader_workers=run.settings.resources.loader_workers,
            shares_every=settings.gradient_share_every,
        )
        if adapters is not None:
            merge_lora(model, adapters)
        save_model(folder, model, tokenizer)
        write_json(
            folder / "student.json",
            {"name": student, "settings": plain, "fingerprints": inputs, "traces": traces},
        )
        publish(folder, output)


def _build(
    settings: Student, teacher: Any, tokenizer: Any, store: TargetsStore | None
) -> LatentReasoner:
    from kava_core.models.latent import LatentReasoner
    from kava_core.problems.traces import TraceEncoder

    encoder = TraceEncoder(tokenizer)
    model = LatentReasoner.from_teacher(
        teacher,
        latents=store.geometry.slots if store else 0,
        iterations=settings.iterations,
        reasoning=settings.reasoning if store else "jacobi",
        projection=settings.projection,
        per_position=settings.per_position,
        answer_prompt_ids=encoder.answer_prompt_ids,
        eos_token_id=encoder.eos,
        seed=settings.training.seed,
    )
    context = getattr(model.decoder.config, "max_position_embeddings", None)
    if store is not None and context is not None:
        longest = (
            int((store.index.column("n_question") + store.index.column("n_answer")).max())
            + 2
            + store.geometry.slots
            + len(encoder.answer_prompt_ids)
        )
        if longest > context:
            raise KavaError(
                f"a question with its latents and answer takes {longest} positions and the model's "
                f"context is {context}. Drop long problems in `prepare` or lower evict.budget."
            )
    return model


def _objective(settings: Student, store: TargetsStore | None) -> Any:
    from kava_core.distill.student import objective_of

    return objective_of(
        store,
        alpha_kv=settings.alpha_kv,
        alpha_codi=settings.alpha_codi,
        w_cot=settings.w_cot,
        kv_distance=settings.kv_distance,
        kv_std=settings.kv_std,
        codi_distance=settings.codi_distance,
        codi_std=settings.codi_std,
    )
