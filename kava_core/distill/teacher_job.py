"""The training of a teacher, from scratch or from a model that is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kava_core.artefacts import ensure_folder, fresh_folder, work_folder, write_json
from kava_core.distill.adapters import add_lora, end_lora
from kava_core.distill.batches import ChainDataset
from kava_core.distill.fit import fit
from kava_core.distill.held_out import hold_out
from kava_core.distill.start import check_teacher, start_teacher
from kava_core.distill.terms import chain_terms
from kava_core.models.adapted import Base
from kava_core.models.head import check_head
from kava_core.models.loading import (
    commit_of,
    model_fingerprint,
    save_model,
    to_device,
    tokenizer_fingerprint,
)
from kava_core.models.teacher_pass import check_lengths
from kava_core.problems.folder import ProblemFolder
from kava_core.problems.traces import TraceEncoder
from kava_core.settings import Cadence, Resources, Teacher
from kava_core.store import ShardShuffleSampler


@dataclass(frozen=True)
class TrainedTeacher:
    """A teacher that has learnt, on its device, and where it is built.

    encoder: with its tokenizer. settings, about: what it was made from. steps: how many it was
    trained for. folder: holds the adapters already, if they are kept. curves: the folder of its
    loss curves, empty for a model that is taken as it is.
    """

    model: PreTrainedModel
    encoder: TraceEncoder
    settings: Teacher
    about: dict[str, Any]
    steps: int
    folder: Path
    curves: Path

    def save(self, metrics: dict[str, float]) -> None:
        """Complete the folder: weights, configuration, tokenizer, metrics.json, teacher.json."""
        ensure_folder(self.folder)
        training = self.settings.training
        whole = training is None or training.keeps_weights
        save_model(self.folder, self.model, self.encoder.tokenizer, weights=whole)
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

    Repeated after a kill, it goes on from its last checkpoint. KavaErrors are those of `fit`, and
    name, before anything is trained, what the model cannot do and a problem that it cannot hold.
    """
    about = _made_from(settings, problems)
    work = work_folder(output, "teacher", about)
    folder, curves = fresh_folder(work / "teacher"), ensure_folder(work / "curves")
    training, steps = settings.training, 0
    model, tokenizer = start_teacher(settings, problems)
    problems.check_tokenizer(tokenizer_fingerprint(tokenizer))
    encoder = TraceEncoder(tokenizer, problems.traces, prompt=problems.prompt)
    check_teacher(settings, model, encoder, problems.load("validation")[: settings.validate_on])
    if training is not None:
        check_head(model)
        adapters = None
        if training.lora is not None:
            adapters = add_lora(model, training.lora, seed=training.seed, path="teacher.training")
        traces = encoder.encode_all(problems.load("train"))
        check_lengths(traces, model.config.get_text_config())
        taught, held_out = hold_out([len(traces)], training, "teacher.training")
        sampler = ShardShuffleSampler(taught, seed=training.seed)
        steps = training.total_steps(len(sampler))
        fit(
            model,
            chain_terms,
            ChainDataset(traces),
            sampler,
            training,
            cadence,
            folder=work / "checkpoints",
            curves=curves,
            title="teacher",
            loader_workers=resources.loader_workers,
            held_out=held_out,
        )
        if adapters is not None and training.lora is not None:
            made_from = about["fingerprints"]["model"]
            base = Base(model=settings.model, commit=about["commit"], fingerprint=made_from)
            model = end_lora(adapters, training.lora, folder, base)
    return TrainedTeacher(to_device(model), encoder, settings, about, steps, folder, curves)


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
        **problems.prompt.kept(),
    }
