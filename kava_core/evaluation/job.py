"""What a worker does with a part of an evaluation. One system is open at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kava_core.artefacts import disk_errors
from kava_core.evaluation.examination import Examiner
from kava_core.evaluation.parts import Asked, Material, Memory, Part, Plan, Scored
from kava_core.evaluation.perplexity import Forced
from kava_core.evaluation.systems import Systems
from kava_core.findings.base import Finding, write_finding
from kava_core.hardware import hardware
from kava_core.latents.interpret import interpret
from kava_core.latents.similarity import slot_similarity
from kava_core.latents.teacher import TeacherView, Truncation, read_teacher, readable
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import DTYPES, load_config, load_model
from kava_core.models.placing import place_frozen
from kava_core.problems.traces import TraceEncoder
from kava_core.record import Record
from kava_core.settings import Evaluate
from kava_core.store import TargetsStore
from kava_core.targets.plan import Plan as TargetsPlan
from kava_core.targets.specs import latent_fraction


@dataclass(frozen=True)
class EvaluateJob:
    """Part k of a plan, written to its file. problems, test_sets, targets: their folders."""

    systems: Systems
    plan: Plan
    problems: Path
    test_sets: Path
    targets: Path
    settings: Evaluate

    @property
    def threads(self) -> int:
        return self.settings.threads

    def material(self) -> Material:
        """What is asked."""
        return Material.open(self.systems.teacher, self.problems, self.test_sets, self.settings)

    def traces(self, material: Material) -> list[Record]:
        """What latents are looked into over; KavaError if the teacher can hold none of it."""
        encoder, settings = material.encoder, self.settings
        fraction = latent_fraction(TargetsStore.open(self.targets))
        thinking = TraceEncoder(encoder.tokenizer, encoder.traces, fraction, encoder.prompt)
        traces = thinking.encode_all([p for p in material.own.problems if p.steps])
        config = load_config(str(self.systems.teacher))
        return readable(traces, config, settings.interpret_records)

    def open(self) -> Callable[[int], int]:
        bench = _Bench(self)

        def work(number: int) -> int:
            part = self.plan.parts[number]
            made = bench.make(part)
            with disk_errors(part.file):
                write_finding(part.file, made, spaced=False)
            return number

        return work


class _Bench:
    """A worker's material, the system that is open, and what has been made for it."""

    def __init__(self, job: EvaluateJob) -> None:
        self.job = job
        self.settings = job.settings
        self.material = job.material()
        self.name = ""
        self.system: LatentReasoner
        self.encoder: TraceEncoder  # of the open system
        self.examiners: dict[str, Examiner] = {}
        self.forced: dict[str, Forced] = {}

    def make(self, part: Part) -> Finding:
        """What goes into the part's file."""
        if part.system != self.name:
            self._open(part.system)
        settings, own = self.settings, self.material.own
        if part.kind == "similarity":
            return slot_similarity(
                self.system,
                TargetsStore.open(self.job.targets),
                records=settings.similarity_records,
                batch_size=settings.batch_size,
            )
        if part.kind == "latents":
            return interpret(
                self.system,
                self.view,
                self.material.encoder,
                {problem.id: problem for problem in own.problems},
                own.problems[: settings.intervention_problems],
                batch_size=settings.batch_size,
                max_new_tokens=settings.max_new_tokens,
            )
        examiner = self._examiner(part.test_set)
        if part.kind == "memory":
            return Memory(peak_bytes=examiner.peak_bytes(), hardware=dict(hardware()))
        if part.kind == "answers":
            return Asked(replies=examiner.ask(part.number))
        forced = self._forced(part.test_set)
        chosen = forced.batches(settings.batch_size)[part.number]
        return Scored(nll=dict(zip(chosen, forced.nll(self.system, chosen), strict=True)))

    @cached_property
    def view(self) -> TeacherView:
        """The teacher over the traces that latents are looked into over."""
        dtype = DTYPES[self.settings.model_dtype]
        model = place_frozen(load_model(str(self.job.systems.teacher), dtype))
        return read_teacher(
            model,
            self.job.traces(self.material),
            self.material.encoder.tokenizer,
            Truncation.of(TargetsPlan.of_store(TargetsStore.open(self.job.targets))),
            batch_size=self.settings.batch_size,
        )

    def _open(self, name: str) -> None:
        self.examiners, self.forced = {}, {}
        self.system = None  # type: ignore[assignment]  # gone before the next one is there
        dtype = DTYPES[self.settings.model_dtype]
        self.system = self.job.systems.open(name, self.material.encoder, dtype)
        self.name = name
        self.encoder = self.job.systems.encoder(name, self.material.encoder)
        self._examiner(self.material.own.name).warm_up()

    def _examiner(self, test_set: str) -> Examiner:
        if test_set not in self.examiners:
            self.examiners[test_set] = Examiner(
                self.system,
                self.encoder,
                self.material.test_sets[test_set],
                batch_size=self.settings.batch_size,
                max_new_tokens=self.settings.max_new_tokens,
            )
        return self.examiners[test_set]

    def _forced(self, test_set: str) -> Forced:
        if test_set not in self.forced:
            replies = self.job.plan.replies(
                self.name,
                self.material.test_sets[test_set],
                self.encoder,
                self.settings.batch_size,
            )
            self.forced[test_set] = self._examiner(test_set).forced(replies)
        return self.forced[test_set]
