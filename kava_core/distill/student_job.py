"""The training of one student, in one process or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kava_core.artefacts import ensure_folder, fresh_folder, work_folder, write_json
from kava_core.distill.adapters import add_lora, end_lora
from kava_core.distill.balance import Balance
from kava_core.distill.batches import AnswerDataset, TargetsDataset, what_is_read
from kava_core.distill.curriculum import Stages
from kava_core.distill.exact_match import Questions
from kava_core.distill.fit import fit
from kava_core.distill.held_out import hold_out
from kava_core.distill.inputs import StudentInputs
from kava_core.distill.job import run_training
from kava_core.distill.match import Match
from kava_core.distill.objective import objective_of
from kava_core.distill.projectors import add_projectors, drop_projectors
from kava_core.distill.start import check_records, start_student
from kava_core.distill.terms import Terms, student_terms
from kava_core.distill.traces import encoded_traces
from kava_core.distill.tracking import Tracking
from kava_core.models.adapted import Base
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import load_model, load_tokenizer
from kava_core.parallel import group
from kava_core.parallel.threads import torch_threads
from kava_core.problems.folder import open_problems
from kava_core.problems.prompt import Prompt, read_prompt
from kava_core.problems.traces import TraceEncoder
from kava_core.settings import Cadence, Resources, Student, Training
from kava_core.store import ShardShuffleSampler, TargetsStore
from kava_core.targets.online import JointTargets, OnlineTargets
from kava_core.targets.rounding import fake_quantisation


@dataclass(frozen=True)
class StudentJob:
    """The training of the student called `name`, in `work`; what each of its processes runs."""

    name: str
    settings: Student
    inputs: StudentInputs
    work: Path
    cadence: Cadence
    loader_workers: int = 0
    tracking: Tracking | None = None

    @property
    def folder(self) -> Path:
        """Where the student is built."""
        return self.work / "student"

    @property
    def curves(self) -> Path:
        """Where its loss curves are."""
        return self.work / "curves"

    @property
    def checkpoints(self) -> Path:
        return self.work / "checkpoints"

    def __call__(self) -> None:
        settings, training = self.settings, self.settings.training
        tokenizer = load_tokenizer(str(self.inputs.teacher))
        material = _Material.of(settings, self.inputs, tokenizer, self.work)
        taught, held_out = hold_out(material.sizes, training, f"students.{self.name}.training")
        with torch_threads(training.threads):
            model = load_model(self.inputs.model, revision=settings.revision)
            student = start_student(settings, model, tokenizer, material.store, material.prompt)
            check_records(student, material.dataset)
            match = _match(student, settings, material.store)
            latents = student.config.latents
            stages = Stages.of(settings, latents, sum(taught), f"students.{self.name}")
            terms = self._terms(student.decoder, match, material.store, stages)
            adapters = None
            if training.lora is not None:
                path = f"students.{self.name}.training"
                adapters = add_lora(student.decoder, training.lora, seed=training.seed, path=path)
            projected = (
                match is not None and settings.model is not None and settings.taught("alpha_kv")
            )
            if match is not None and projected:
                add_projectors(student, match)
            sampler = ShardShuffleSampler(
                taught,
                seed=training.seed,
                window=settings.shard_window,
                ahead=material.ahead,
            )
            fit(
                student,
                terms,
                material.dataset,
                sampler,
                training,
                self.cadence,
                folder=self.checkpoints,
                curves=self.curves,
                title=self.name,
                loader_workers=self.loader_workers,
                held_out=held_out,
                balance=Balance.of(settings),
                questions=material.questions(training, held_out, tokenizer),
                tracking=self.tracking,
                stages=stages,
            )
            if group.rank() > 0:
                return
            fresh_folder(self.folder)
            if projected:
                drop_projectors(student)
            if adapters is not None and training.lora is not None:
                student.decoder = end_lora(adapters, training.lora, self.folder, self._base())
            self._save(student, tokenizer, material, training.total_steps(len(sampler)))

    def _terms(
        self,
        decoder: PreTrainedModel,
        match: Match | None,
        store: TargetsStore | None,
        stages: Stages | None,
    ) -> Terms:
        online: OnlineTargets | JointTargets | None = None
        rounding = None
        if store is not None and self.settings.targets == "online":
            online = OnlineTargets.of(store, self.inputs.teacher)
        if store is not None and self.settings.targets == "joint":
            online = JointTargets(store, decoder)
        if store is not None and self.settings.fake_quantise:
            rounding = fake_quantisation(store)
        objective, cut = objective_of(self.settings, store, match), stages.cut if stages else None
        return student_terms(objective, match, online, rounding, cut)

    def _base(self) -> Base:
        """What adapters of this student belong on; a folder of this project by its path in it."""
        model, project = self.inputs.model, self.work.parents[2]
        if Path(model).is_dir() and Path(model).is_relative_to(project):
            model = Path(model).relative_to(project).as_posix()
        fingerprints = self.inputs.fingerprints
        found = fingerprints.get("model", fingerprints["teacher"])
        return Base(model=model, commit=self.inputs.commit, fingerprint=found)

    def _save(
        self,
        student: LatentReasoner,
        tokenizer: PreTrainedTokenizerBase,
        material: _Material,
        steps: int,
    ) -> None:
        ensure_folder(self.folder)
        # Questions of a batch end where their latents begin.
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
        student.save_pretrained(self.folder, whole=self.settings.training.keeps_weights)
        tokenizer.save_pretrained(self.folder)
        write_json(
            self.folder / "student.json",
            {
                "name": self.name,
                "settings": self.settings.model_dump(mode="json", by_alias=True),
                "fingerprints": self.inputs.fingerprints,
                "commit": self.inputs.commit,
                "traces": material.traces,
                "steps": steps,
                **material.prompt.kept(),
            },
        )


@dataclass(frozen=True)
class _Material:
    """What a student learns from; sizes: records per shard; traces: how their steps are written;
    prompt: how their questions are put."""

    store: TargetsStore | None
    dataset: AnswerDataset | TargetsDataset
    sizes: list[int]
    traces: str
    prompt: Prompt

    @property
    def ahead(self) -> Callable[[Sequence[int], Sequence[int]], None] | None:
        """What is told which shards come next, where any is read."""
        reads = isinstance(self.dataset, TargetsDataset) and self.dataset.reads != "none"
        return self.store.fetch_ahead if self.store is not None and reads else None

    @classmethod
    def of(
        cls,
        settings: Student,
        inputs: StudentInputs,
        tokenizer: PreTrainedTokenizerBase,
        work: Path,
    ) -> _Material:
        chains, source = settings.taught("w_cot"), inputs.source
        if settings.reads == "kv_targets":
            store = TargetsStore.open(source)
            dataset = TargetsDataset(
                store,
                chains,
                online=settings.targets != "store",
                records=settings.curriculum is not None,
                reads=what_is_read(settings),
            )
            made = store.manifest.settings
            prompt = read_prompt(made, source)
            return cls(store, dataset, list(store.sizes), str(made["traces"]), prompt)
        problems = open_problems(source)
        encoder = TraceEncoder(tokenizer, problems.traces, prompt=problems.prompt)
        records = encoded_traces(work, encoder, problems, left_out=inputs.left_out)
        dataset_of_answers = AnswerDataset(records, chains)
        return cls(None, dataset_of_answers, [len(records)], problems.traces, problems.prompt)

    def questions(
        self, training: Training, held_out: range, tokenizer: PreTrainedTokenizerBase
    ) -> Questions | None:
        """What is asked while it learns."""
        if training.exact_match is None:
            return None
        records = [self.dataset.record(i) for i in held_out[: training.exact_match.records]]
        return Questions(records, tokenizer, self.prompt.answer)


def train_student(
    name: str,
    settings: Student,
    inputs: StudentInputs,
    output: Path,
    cadence: Cadence,
    resources: Resources,
) -> StudentJob:
    """Train a student to its end, in the work of `output`; what it was built in is the job's.

    Repeated after a kill, it goes on from its last checkpoint. KavaErrors are those of `fit` and
    of what it starts from.
    """
    tracking = Tracking.of(cadence, output)
    plain = settings.model_dump(mode="json", by_alias=True)
    key = {"settings": plain, "inputs": inputs.fingerprints}
    work = work_folder(output, "distill", key)
    job = StudentJob(name, settings, inputs, work, cadence, resources.loader_workers, tracking)
    run_training(
        job,
        name,
        settings.training,
        settings.processes,
        resources,
        steps=partial(_steps, settings, inputs),
    )
    return job


def _steps(settings: Student, inputs: StudentInputs) -> int:
    """Steps that the training takes."""
    if settings.reads == "kv_targets":
        records = len(TargetsStore.open(inputs.source, checksums=False))
    else:
        records = open_problems(inputs.source).count("train") - len(inputs.left_out)
    return settings.training.total_steps(settings.training.taught(records))


def _match(student: LatentReasoner, settings: Student, store: TargetsStore | None) -> Match | None:
    if store is None:
        return None
    kv, codi = settings.taught("alpha_kv"), settings.taught("alpha_codi")
    return Match.between(student, store, settings.layer_map, kv=kv, codi=codi)
