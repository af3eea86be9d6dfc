"""students/<name> ← kv_targets (or problems), teacher: a student that reasons in latents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from kava_core.artefacts import publish, work_folder, write_json
from kava_core.errors import KavaError

from .fitting import fit_settings, hold_out
from .run import Run, stage, torch_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kava_core.distill.match import Match
    from kava_core.models.latent import LatentReasoner
    from kava_core.settings import Student
    from kava_core.store import TargetsStore


@dataclass(frozen=True)
class DistillJob:
    """The training of one student, into `work`; what each of its processes runs.

    start: folder or Hub id of the model it starts from. fingerprints: of the teacher and of what
    it is taught from, already checked.
    """

    run: Run
    student: str
    start: str
    work: Path
    fingerprints: dict[str, str]

    @property
    def settings(self) -> Student:
        return self.run.settings.students[self.student]

    @property
    def output(self) -> Path:
        return self.work / "output"

    @property
    def checkpoints(self) -> Path:
        return self.work / "checkpoints"

    def __call__(self) -> None:
        from kava_core.distill.fit import fit
        from kava_core.distill.match import Match
        from kava_core.distill.projectors import add_projectors, drop_projectors
        from kava_core.distill.student import add_lora, merge_lora, student_terms
        from kava_core.models.loading import load_model, load_tokenizer, save_model
        from kava_core.parallel import group
        from kava_core.store.sampler import ShardShuffleSampler
        from kava_core.targets.online import OnlineTargets
        from kava_core.targets.rounding import fake_quantisation

        settings, training = self.settings, self.settings.training
        teacher = str(self.run.path("teacher"))
        tokenizer = load_tokenizer(teacher)
        store, dataset, sizes, traces = self._data(tokenizer)
        taught, held_out = hold_out(sizes, training, f"students.{self.student}.training")
        with torch_threads(training.threads):
            model = _build(settings, load_model(self.start), tokenizer, store)
            _check_context(model, store, dataset, chains=settings.w_cot > 0)
            match = online = rounding = adapters = None
            if store is not None:
                kv, codi = settings.alpha_kv > 0, settings.alpha_codi > 0
                match = Match.between(model, store, settings.layer_map, kv=kv, codi=codi)
            if store is not None and settings.targets == "online":
                online = OnlineTargets.of(store, Path(teacher))
            if store is not None and settings.fake_quantise:
                rounding = fake_quantisation(store)
            if training.lora is not None:
                adapters = add_lora(model, **training.lora.model_dump(), seed=training.seed)
            projected = match is not None and settings.model is not None and settings.alpha_kv > 0
            if match is not None and projected:
                add_projectors(model, match)
            fit(
                model,
                student_terms(
                    _objective(settings, store, match),
                    match,
                    online,
                    rounding,
                ),
                dataset,
                ShardShuffleSampler(taught, seed=training.seed, window=settings.shard_window),
                fit_settings(training, self.run.settings.cadence),
                folder=self.checkpoints,
                live_folder=self.output / "live",
                title=self.student,
                loader_workers=self.run.settings.resources.loader_workers,
                shares_every=self.run.settings.cadence.gradient_share_every if store else 0,
                held_out=held_out,
            )
            if group.rank() > 0:
                return
            if projected:
                drop_projectors(model)
            if adapters is not None:
                merge_lora(model, adapters)
            save_model(self.output, model, tokenizer)
            write_json(
                self.output / "student.json",
                {
                    "name": self.student,
                    "settings": settings.model_dump(mode="json", by_alias=True),
                    "fingerprints": self.fingerprints,
                    "traces": traces,
                },
            )

    def _data(self, tokenizer: Any) -> tuple[TargetsStore | None, Any, list[int], str]:
        """The store, the dataset, how many records each of its shards has, and the traces' kind."""
        from kava_core.distill.batches import AnswerDataset, TargetsDataset
        from kava_core.problems.folder import open_problems
        from kava_core.problems.traces import TraceEncoder
        from kava_core.store import TargetsStore

        settings, chains = self.settings, self.settings.w_cot > 0
        if settings.reads == "kv_targets":
            store = TargetsStore.open(self.run.path("kv_targets"))
            dataset = TargetsDataset(store, chains, online=settings.targets == "online")
            return store, dataset, list(store.sizes), str(store.manifest.settings["traces"])
        problems = open_problems(self.run.path("problems"))
        encoded = TraceEncoder(tokenizer, problems.traces).encode_all(problems.load("train"))
        return None, AnswerDataset(encoded, chains), [len(encoded)], problems.traces


@stage
@click.argument("student")
def distill(run: Run, student: str) -> None:
    """Train the student called STUDENT in the pipeline's `students`.

    Reads kv_targets/ and the teacher's weights and tokenizer, nothing else (a student without
    latents reads problems/ instead; one with a `model` starts from its weights). Writes
    students/STUDENT/: a model for `LatentReasoner.from_pretrained`, its tokenizer, student.json and
    loss curves. Killed and run again, it goes on from its last checkpoint and ends with the same
    weights.
    """
    from kava_core.models.loading import (
        load_tokenizer,
        model_fingerprint,
        tokenizer_fingerprint,
    )
    from kava_core.problems.folder import open_problems
    from kava_core.store import Expectation, TargetsStore

    if student not in run.settings.students:
        raise KavaError(
            f"pipeline {run.name} has no student {student!r}. There are: "
            f"{', '.join(run.settings.students)}."
        )
    settings = run.settings.students[student]
    teacher = str(run.path("teacher"))
    inputs = {
        "teacher": model_fingerprint(teacher),
        "tokenizer": tokenizer_fingerprint(load_tokenizer(teacher)),
    }
    start = settings.model or teacher
    if settings.model is not None:
        if Path(start).is_dir():  # its processes may start in another folder
            start = str(Path(start).absolute())
        inputs["model"] = model_fingerprint(start)
        found = tokenizer_fingerprint(load_tokenizer(start))
        if found != inputs["tokenizer"]:
            raise KavaError(
                f"the tokenizer of {start} is {found}, and the teacher's is {inputs['tokenizer']}: "
                f"they must be the same. Choose another students.{student}.model."
            )
    if settings.reads == "kv_targets":
        expected = Expectation(teacher=inputs["teacher"], tokenizer=inputs["tokenizer"])
        store = TargetsStore.open(run.path("kv_targets"), expected)
        _check_budget(run, store)
        inputs["kv_targets"] = store.manifest.digest
    else:
        inputs["problems"] = open_problems(run.path("problems")).fingerprint("train")
    plain = settings.model_dump(mode="json", by_alias=True)
    output = run.path("students", student)
    work = work_folder(output, "distill", {"settings": plain, "inputs": inputs})
    # Its processes may start in another folder.
    job = DistillJob(replace(run, data=run.data.absolute()), student, start, work, inputs)
    job.output.mkdir(exist_ok=True)
    if settings.processes == 1:
        job()
    else:
        from kava_core.distill.fit import STOP_FILE, following
        from kava_core.parallel.processes import run_processes

        resources = run.settings.resources
        with following(job.output / "live", student, settings.training.steps):
            run_processes(
                job,
                settings.processes,
                folder=work / "ray",
                stop_file=job.checkpoints / STOP_FILE,
                threads=settings.training.threads,
                cpus=resources.cpus_per_worker,
                gpus=resources.gpus_per_worker,
            )
    publish((job.output, output))


def _check_budget(run: Run, store: TargetsStore) -> None:
    """KavaError if the targets have another number of slots than `evict` makes now."""
    from kava_core.targets.plan import Plan

    slots = Plan.of(run.settings.evict, store.geometry).geometry.slots
    if slots != store.geometry.slots:
        raise KavaError(
            f"{store.path} has {store.geometry.slots} slots per layer and head, and evict.budget "
            f"{run.settings.evict.budget} makes {slots}. Run `kava evict`, or set evict.budget to "
            "what the targets have."
        )


def _build(
    settings: Student, start: PreTrainedModel, tokenizer: Any, store: TargetsStore | None
) -> LatentReasoner:
    from kava_core.distill.batches import writes_rest
    from kava_core.models.latent import LatentReasoner
    from kava_core.problems.traces import TraceEncoder

    encoder = TraceEncoder(tokenizer)
    known = cast(Any, start.get_input_embeddings()).num_embeddings
    if known < len(tokenizer):
        raise KavaError(
            f"the tokenizer has {len(tokenizer)} tokens, and {settings.model} has embeddings for "
            f"{known}. Choose a model that knows all of them."
        )
    return LatentReasoner.from_teacher(
        start,
        latents=store.geometry.slots if store else 0,
        iterations=settings.iterations,
        reasoning=settings.reasoning,
        projection=settings.projection,
        per_position=settings.per_position,
        answer_prompt_ids=[] if store and writes_rest(store) else encoder.answer_prompt_ids,
        eos_token_id=encoder.eos,
        seed=settings.training.seed,
    )


def _check_context(
    model: LatentReasoner, store: TargetsStore | None, dataset: Any, chains: bool
) -> None:
    """KavaError naming the longest record if the student cannot hold it.

    chains: whether it reads the written chain of thought as well.
    """
    import numpy as np

    context = getattr(model.decoder.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return
    if store is not None:
        index, shards = store.index, range(len(store.sizes))
        question, cot = index.column("n_question"), index.column("n_cot")
        prompts = [np.diff(index.shard(k)["answer_prompt_ids"][0]) for k in shards]
        answer = np.concatenate(prompts) + index.column("n_answer")
        latents = store.geometry.slots + 2  # and <bot>, <eot>
    else:
        lengths = [
            (len(t.question_ids), len(t.cot_ids), len(t.answer_prompt_ids) + len(t.answer_ids))
            for t in dataset.traces
        ]
        question, cot, answer = np.array(lengths).T
        latents = 0
    needed = question + (np.maximum(cot, latents) if chains else latents) + answer
    longest = int(needed.argmax())
    if needed[longest] > context:
        name = store.index.record(longest).id if store is not None else dataset.traces[longest].id
        raise KavaError(
            f"record {name} takes {needed[longest]} positions with all that the student reads and "
            f"writes ({question[longest]} of them the question), and its model's context is "
            f"{context}. Leave long problems out in `prepare`, or use a model with a longer one."
        )


def _objective(settings: Student, store: TargetsStore | None, match: Match | None) -> Any:
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
        match=match,
    )
