"""The training of a teacher, from scratch or from a model that is there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kava_core.artefacts import ensure_folder, fresh_folder, work_folder, write_json
from kava_core.distill.adapters import add_lora, end_lora
from kava_core.distill.batches import ChainDataset
from kava_core.distill.exact_match import Questions
from kava_core.distill.fit import fit
from kava_core.distill.forgetting import check_forgets, forgetful_terms, steps_of
from kava_core.distill.held_out import hold_out
from kava_core.distill.job import run_training
from kava_core.distill.start import check_teacher, start_teacher
from kava_core.distill.terms import chain_terms
from kava_core.distill.traces import encoded_traces
from kava_core.distill.tracking import Tracking
from kava_core.models.adapted import Base
from kava_core.models.head import check_head
from kava_core.models.loading import (
    commit_of,
    model_fingerprint,
    save_model,
    tokenizer_fingerprint,
)
from kava_core.parallel import group
from kava_core.parallel.threads import torch_threads
from kava_core.problems.folder import ProblemFolder, open_problems
from kava_core.problems.traces import TraceEncoder
from kava_core.settings import Cadence, Resources, Teacher, Training
from kava_core.store import ShardShuffleSampler


@dataclass(frozen=True)
class TeacherJob:
    """The training of a teacher in `work`, and what each of its processes runs.

    problems: their folder, absolute since processes may start in another one. about: what the
    teacher is made from.
    """

    settings: Teacher
    problems: Path
    work: Path
    about: dict[str, Any]
    cadence: Cadence
    loader_workers: int
    tracking: Tracking | None = None

    @property
    def folder(self) -> Path:
        """Where the teacher is built."""
        return self.work / "teacher"

    @property
    def curves(self) -> Path:
        """Where its loss curves are."""
        return self.work / "curves"

    @property
    def checkpoints(self) -> Path:
        return self.work / "checkpoints"

    def __call__(self) -> None:
        settings, training = self.settings, self.settings.training
        problems = open_problems(self.problems)
        model, tokenizer = start_teacher(settings, problems)
        problems.check_tokenizer(tokenizer_fingerprint(tokenizer))
        encoder = TraceEncoder(tokenizer, problems.traces, prompt=problems.prompt)
        check_teacher(settings, model, encoder, problems.load("validation")[: settings.validate_on])
        if training is not None:
            with torch_threads(training.threads):
                model = self._trained(model, training, encoder, problems)
        if group.rank() > 0:
            return
        whole = training is None or training.keeps_weights
        save_model(self.folder, model, tokenizer, weights=whole)

    def _trained(
        self,
        model: PreTrainedModel,
        training: Training,
        encoder: TraceEncoder,
        problems: ProblemFolder,
    ) -> PreTrainedModel:
        remedy = "It cannot be trained; set `training: null` to take it as it is."
        check_head(model, remedy)
        if self.settings.forgets is not None:
            check_forgets(model.config.get_text_config())
        adapters = None
        if training.lora is not None:
            adapters = add_lora(model, training.lora, seed=training.seed, path="teacher.training")
        traces = encoded_traces(self.work, encoder, problems, model.config.get_text_config())
        taught, held_out = hold_out([len(traces)], training, "teacher.training")
        forgets = self.settings.forgets
        more = partial(steps_of, keeps=forgets.keeps) if forgets else None
        fit(
            model,
            forgetful_terms(forgets) if forgets else chain_terms,
            ChainDataset(traces, more),
            ShardShuffleSampler(taught, seed=training.seed),
            training,
            self.cadence,
            folder=self.checkpoints,
            curves=self.curves,
            title="teacher",
            loader_workers=self.loader_workers,
            held_out=held_out,
            questions=None
            if training.exact_match is None
            else Questions(
                [traces[i] for i in held_out[: training.exact_match.records]],
                encoder.tokenizer,
                encoder.prompt.answer,
            ),
            tracking=self.tracking,
        )
        if adapters is None or training.lora is None or group.rank() > 0:
            return model
        made_from = self.about["fingerprints"]["model"]
        base = Base(model=self.settings.model, commit=self.about["commit"], fingerprint=made_from)
        return end_lora(adapters, training.lora, self.folder, base)


@dataclass(frozen=True)
class TrainedTeacher:
    """A teacher that has learnt, in the folder where it is built.

    about: what it was made from. steps: how many it was trained for.
    curves: the folder of its loss curves, empty for a model that is taken as it is.
    """

    about: dict[str, Any]
    steps: int
    folder: Path
    curves: Path

    def save(self, metrics: dict[str, float]) -> None:
        """Complete the folder, which holds weights and tokenizer: metrics.json, teacher.json."""
        write_json(self.folder / "metrics.json", metrics)
        write_json(self.folder / "teacher.json", {**self.about, "steps": self.steps})


def train_teacher(
    settings: Teacher,
    problems: ProblemFolder,
    output: Path,
    cadence: Cadence,
    resources: Resources,
) -> TrainedTeacher:
    """Train the teacher of `settings` on chains of thought, in the work of `output`.

    Repeated after a kill, it goes on from its last checkpoint. KavaErrors are those of
    `run_training`, and name, before anything is trained, what the model cannot do and a problem
    that it cannot hold.
    """
    about = _made_from(settings, problems)
    work = work_folder(output, "teacher", about)
    job = TeacherJob(
        settings,
        problems.path.absolute(),
        work,
        about,
        cadence,
        resources.loader_workers,
        None if settings.training is None else Tracking.of(cadence, output),
    )
    fresh_folder(job.folder)
    ensure_folder(job.curves)
    training, steps = settings.training, 0
    if training is None:
        job()
    else:
        steps = training.total_steps(training.taught(problems.count("train")))
        run_training(job, "teacher", training, settings.processes, resources, steps=lambda: steps)
    return TrainedTeacher(about, steps, job.folder, job.curves)


def _made_from(settings: Teacher, problems: ProblemFolder) -> dict[str, Any]:
    """What determines a teacher; commit: of a model on the Hub."""
    fingerprints = {"problems": problems.fingerprint("train", "validation")}
    commit = None
    if settings.model != "scratch":
        fingerprints["model"] = model_fingerprint(settings.model, settings.revision)
        commit = commit_of(settings.model, settings.revision)
    return {
        "settings": settings.model_dump(mode="json"),
        "fingerprints": fingerprints,
        "commit": commit,
        # How steps of the examples in its prompt are written.
        **({"traces": problems.traces} if problems.prompt.examples else {}),
        **problems.prompt.kept(),
    }
