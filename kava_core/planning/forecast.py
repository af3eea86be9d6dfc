"""The plan of a pipeline: what it will make, compute and take, and what would make it cheaper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kava_core.distill.curriculum import Stages
from kava_core.errors import KavaError
from kava_core.planning.architecture import (
    Architecture,
    model_architecture,
    teacher_architecture,
)
from kava_core.planning.calibrate import Clock
from kava_core.planning.costs import (
    Call,
    answering_calls,
    batches,
    flops,
    parts,
    read_batch,
    student_step,
    teacher_step,
)
from kava_core.planning.lengths import Lengths, lengths_of, longest
from kava_core.planning.memory import generate_bytes, trainer_bytes
from kava_core.planning.room import free_bytes
from kava_core.planning.sizes import (
    StoreSize,
    checkpoint_bytes,
    checkpoint_count,
    kv_targets_size,
    model_bytes,
    run_bytes,
    teacher_kv_size,
)
from kava_core.settings import EveryLayer, Pipeline, Student, Traces, Training
from kava_core.targets.plan import Plan

_PROMPT = 4  # tokens of "The answer is:"
_WORTH = 0.01  # the share of all bytes that a suggestion has to save


@dataclass(frozen=True)
class StageCost:
    """What a stage takes. calls: of a decoder; memory: peak of one of its processes, None where
    nothing is estimated; seconds: None without a clock."""

    stage: str
    calls: int
    flops: float
    memory: int | None
    seconds: float | None


@dataclass(frozen=True)
class Saving:
    """A change of settings that would make the pipeline cheaper. bytes: what it would then take on
    the disk; costs: what is given up."""

    settings: dict[str, Any]
    bytes: int
    saves: int
    costs: str


@dataclass(frozen=True)
class Forecast:
    """A pipeline before it runs. disk: bytes by artefact; free: of the disk that they will lie on.

    cheaper: what saves bytes, the most first.
    """

    pipeline: str
    model: str
    parameters: int
    problems: int
    tokens: dict[str, float]
    lengths_from: str
    teacher_kv: StoreSize | None
    kv_targets: StoreSize
    disk: dict[str, int]
    free: int
    stages: tuple[StageCost, ...]
    cheaper: tuple[Saving, ...]

    @property
    def bytes(self) -> int:
        """Of all artefacts together."""
        return sum(self.disk.values())

    @property
    def fits(self) -> bool:
        return self.bytes <= self.free

    @property
    def seconds(self) -> float | None:
        """Of all stages that are estimated, one after the other; None without a clock."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if known else None


def forecast(
    name: str,
    settings: Pipeline,
    folder: Path,
    make_clock: Callable[[Lengths], Clock] | None = None,
) -> Forecast:
    """The plan of the pipeline called `name`, whose artefacts are, or will be, in `folder`.

    make_clock: how long things take, given the lengths of the problems; None: no times. KavaError
    for what is not known here (the model's shapes, the problems), and for a setting that this
    teacher cannot meet.
    """
    given = lengths_of(settings, folder)
    lengths = _taught(given, settings.traces)
    shapes = Shapes.of(settings, lengths)
    caches, targets = _stores(settings, shapes.teacher, lengths)
    for student_name, student in settings.students.items():
        records = student.training.taught(lengths.problems)
        Stages.of(student, targets.slots, records, f"students.{student_name}")
    run = _largest_run(settings, shapes, given, lengths)
    disk = _disk(settings, shapes, caches, targets, run)
    clock = make_clock(lengths) if make_clock else None
    return Forecast(
        pipeline=name,
        model=shapes.teacher.source,
        parameters=shapes.teacher.parameters,
        problems=lengths.problems,
        tokens={
            part: round(float(getattr(lengths, part).mean()), 1)
            for part in ("question", "trace", "prompt", "answer")
        },
        lengths_from=lengths.origin,
        teacher_kv=caches,
        kv_targets=targets,
        disk=disk,
        free=free_bytes(folder),
        stages=tuple(_Stages(settings, shapes, given, lengths, caches, targets, clock).all()),
        cheaper=_cheaper(settings, shapes, lengths, disk),
    )


def _taught(given: Lengths, traces: Traces | None) -> Lengths:
    """Of what is stored and taught; how many chains of the teacher's are kept nobody knows yet."""
    if traces is None:
        return given
    origin = f"{given.origin}; as many as `traces` keeps at most"
    return replace(given, problems=given.problems * traces.samples, origin=origin)


@dataclass(frozen=True)
class Shapes:
    """The models of a pipeline: its teacher, and by name what each student begins as."""

    teacher: Architecture
    students: dict[str, Architecture]

    @classmethod
    def of(cls, settings: Pipeline, lengths: Lengths) -> Shapes:
        """KavaError names the setting of a model that is not known, of layers that are not there,
        of adapters that fit nothing, and of a context that is too short."""
        teacher = teacher_architecture(settings.teacher, lengths.vocabulary)
        students = {
            name: teacher
            if student.model is None
            else model_architecture(student.model, student.revision, f"students.{name}.model")
            for name, student in settings.students.items()
        }
        _check_layers(settings, teacher, students)
        _check_context(teacher, lengths)
        if settings.teacher.training is not None:
            teacher.trainable(settings.teacher.training, "teacher.training")
        for name, student in settings.students.items():
            students[name].trainable(student.training, f"students.{name}.training")
        return cls(teacher, students)


def _check_layers(
    settings: Pipeline, teacher: Architecture, students: dict[str, Architecture]
) -> None:
    Plan.of(settings.evict, teacher.geometry)
    for name, student in settings.students.items():
        chosen = student.layer_map
        if chosen == "uniform":
            continue
        own = students[name].layers
        if len(chosen) != own or max(chosen) >= teacher.layers:
            raise KavaError(
                f"students.{name}.layer_map: expected {own} layers of the teacher, numbered from 0 "
                f"to {teacher.layers - 1}, found {list(chosen)}."
            )


def _check_context(teacher: Architecture, lengths: Lengths) -> None:
    context = getattr(teacher.config, "max_position_embeddings", None)
    needed = int(lengths.whole.max())
    if context is not None and needed > context:
        raise KavaError(
            f"problems take up to {needed} positions with trace and answer ({lengths.origin}), and "
            f"the context of {teacher.source} is {context}. Leave long ones out in `prepare`, or "
            "take another model."
        )


def _stores(
    settings: Pipeline, teacher: Architecture, lengths: Lengths
) -> tuple[StoreSize | None, StoreSize]:
    caches = None
    if settings.generate.keep == "caches":
        caches = teacher_kv_size(settings, teacher, lengths)
    return caches, kv_targets_size(settings, teacher, lengths)


def _largest_run(settings: Pipeline, shapes: Shapes, given: Lengths, lengths: Lengths) -> int:
    """Bytes of the checkpoints of the run that has the largest ones."""

    def run(a: Architecture, training: Training, where: str, problems: int) -> int:
        return run_bytes(a, training, where, checkpoint_count(training, settings.cadence, problems))

    runs = [
        run(shapes.students[name], each.training, f"students.{name}.training", lengths.problems)
        for name, each in settings.students.items()
    ]
    training = settings.teacher.training
    if training is not None:
        runs.append(run(shapes.teacher, training, "teacher.training", given.problems))
    return max(runs)


def _disk(
    settings: Pipeline,
    shapes: Shapes,
    caches: StoreSize | None,
    targets: StoreSize,
    checkpoints: int,
) -> dict[str, int]:
    """Bytes by artefact. checkpoints: of the largest run, which go when it is done."""
    resources = settings.resources
    return {
        **({"teacher_kv": caches.bytes} if caches and resources.caches_to is None else {}),
        **({"kv_targets": targets.bytes} if resources.targets_to is None else {}),
        "teacher": model_bytes(shapes.teacher, settings.teacher.training, "teacher.training"),
        "students": sum(
            model_bytes(shapes.students[name], student.training, f"students.{name}.training")
            for name, student in settings.students.items()
        ),
        "checkpoints": checkpoints,
    }


@dataclass(frozen=True)
class _Stages:
    """The cost of every stage that computes something. given: of the problems; lengths: of what is
    stored and taught."""

    settings: Pipeline
    shapes: Shapes
    given: Lengths
    lengths: Lengths
    caches: StoreSize | None
    targets: StoreSize
    clock: Clock | None

    def all(self) -> Iterator[StageCost]:
        if self.settings.teacher.training is not None:
            given = replace(self, lengths=self.given)
            yield given._teacher(self.settings.teacher.training)
        if self.settings.traces is not None:
            yield self._traces(self.settings.traces)
        yield self._generate()
        if self.caches is not None:
            yield self._evict(self.caches)
        if self.settings.fidelity is not None:
            yield self._fidelity()
        for name, student in self.settings.students.items():
            yield self._distill(name, student)
        yield self._evaluate()

    def _teacher(self, training: Training) -> StageCost:
        settings, a = self.settings, self.shapes.teacher
        processes = parts(settings.teacher.processes)
        share = training.model_copy(update={"batch_size": training.batch_size // processes})
        learn = teacher_step(share, self.lengths)
        taken = training.total_steps(training.taught(self.lengths.problems)) * training.accumulation
        asked = batches(
            min(settings.teacher.validate_on, settings.prepare.validation),
            settings.teacher.batch_size,
        )
        answers = [
            self._written(None, settings.teacher.batch_size, chain) for chain in (True, False)
        ]
        threads = training.threads
        seconds = None
        if self.clock is not None:
            seconds = taken * self.clock.teacher_step(a, share, self.lengths, learn)
            seconds += self._saving(a, training, "teacher.training")
            seconds += asked * sum(
                self.clock.answer(a, calls, settings.teacher.batch_size, threads)
                for calls in answers
            )
            seconds += self.clock.start(processes > 1)
        work = processes * taken * flops(a, learn, training)
        work += asked * sum(flops(a, calls, None) for calls in answers)
        calls = taken * len(learn) + asked * sum(map(len, answers))
        memory = trainer_bytes(a, share, learn, "teacher.training")
        return StageCost("teacher", calls, work, memory, seconds)

    def _traces(self, traces: Traces) -> StageCost:
        a, rows = self.shapes.teacher, min(traces.batch_size, self.lengths.problems)
        whole = self.lengths.trace + self.lengths.prompt + self.lengths.answer
        tokens = min(traces.max_new_tokens, math.ceil(longest(whole, rows)))
        answers = answering_calls(None, self.targets.slots, self.lengths, rows, tokens)
        rounds = batches(self.lengths.problems, rows)
        seconds = None
        if self.clock is not None:
            each = self.clock.answer(a, answers, rows, traces.threads)
            shards = math.ceil(self.lengths.problems / traces.shard_size)
            seconds = rounds * each / self.clock.workers(self.settings.resources, shards)
            seconds += self.clock.start(self.settings.resources.workers != 0)
        calls, work = rounds * len(answers), rounds * flops(a, answers, None)
        return StageCost("traces", calls, work, None, seconds)

    def _generate(self) -> StageCost:
        settings, a = self.settings, self.shapes.teacher
        generate, evict = settings.generate, settings.evict
        size = min(generate.rows, generate.shard_size)
        read = read_batch(self.lengths, size)
        passes = batches(self.lengths.problems, size)
        seconds = None
        if self.clock is not None:
            seconds = passes * self.clock.read(a, generate, read)
            if self.caches is None:
                seconds += self.lengths.problems * self.clock.cut(a, generate, evict)
            seconds /= self.clock.workers(settings.resources, self.targets.shards)
            # A shard is written while the next is computed, and workers share the disk.
            seconds = max(seconds, self.clock.written((self.caches or self.targets).bytes))
            seconds += self.clock.start(settings.resources.workers != 0)
        memory = generate_bytes(settings, a, self.lengths)
        return StageCost("generate", passes, passes * flops(a, read, None), memory, seconds)

    def _evict(self, caches: StoreSize) -> StageCost:
        settings, a = self.settings, self.shapes.teacher
        seconds = None
        if self.clock is not None:
            cut = self.clock.cut(a, settings.generate, settings.evict)
            seconds = self.lengths.problems * cut
            seconds /= self.clock.workers(settings.resources, self.targets.shards)
            seconds = max(seconds, self.clock.written(caches.bytes + self.targets.bytes))
            seconds += self.clock.start(settings.resources.workers != 0)
        shard = 2 * round(caches.bytes / caches.shards + self.targets.bytes / caches.shards)
        return StageCost("evict", 0, 0.0, shard, seconds)

    def _fidelity(self) -> StageCost:
        fidelity, a = self.settings.fidelity, self.shapes.teacher
        assert fidelity is not None
        known = self.settings.prepare.validation if fidelity.split == "validation" else None
        problems = known or self.lengths.test or 1
        asked = batches(min(problems, fidelity.limit or problems), fidelity.batch_size)
        cells = 2 + len(fidelity.policies) * len(fidelity.budgets) * len(fidelity.bits)
        tokens = min(fidelity.max_new_tokens, self._answer(fidelity.batch_size))
        past = longest(self.lengths.question + self.lengths.trace, fidelity.batch_size)
        rows = fidelity.batch_size
        cell = [Call(rows, _PROMPT, past, logits=1)]
        cell += [Call(rows, 1, past + _PROMPT + i, logits=1) for i in range(tokens)]
        read = [Call(rows, past), Call(rows, past + _PROMPT + tokens)]
        seconds = None
        if self.clock is not None:
            answer = self.clock.answer(a, cell, rows, fidelity.threads)
            whole = self.clock.answer(a, read, rows, fidelity.threads)
            seconds = asked * (cells * answer + whole)
            seconds /= self.clock.workers(self.settings.resources, asked * cells)
            seconds += self.clock.start(self.settings.resources.workers != 0)
        work = asked * (cells * flops(a, cell, None) + flops(a, read, None))
        return StageCost("fidelity", asked * (cells * len(cell) + 2), work, None, seconds)

    def _distill(self, name: str, student: Student) -> StageCost:
        a, training = self.shapes.students[name], student.training
        processes = parts(student.processes)
        rows = training.batch_size / processes
        learn = student_step(student, self.targets.slots, _PROMPT, self.lengths, rows)
        calls, work, seconds = len(learn), processes * flops(a, learn, training), None
        online = student.targets != "store" and student.reads == "kv_targets"
        read = read_batch(self.lengths, max(1, int(rows)))
        if online:
            calls, work = calls + 1, work + flops(self.shapes.teacher, read, None)
        taken = training.total_steps(training.taught(self.lengths.problems)) * training.accumulation
        if self.clock is not None:
            seconds = taken * self.clock.student_step(a, student, self.targets.slots, learn)
            if online:
                generate = self.settings.generate.model_copy(update={"batch_size": int(rows)})
                seconds += taken * self.clock.read(self.shapes.teacher, generate, read)
            elif student.reads == "kv_targets":
                size = self.targets.per_record * training.batch_size
                seconds += taken * self.clock.written(size)
            seconds += self._saving(a, training, f"students.{name}.training")
            seconds += self.clock.start(processes > 1)
        where = f"students.{name}.training"
        memory = trainer_bytes(a, training, learn, where)
        if online:
            memory += generate_bytes(self.settings, self.shapes.teacher, self.lengths)
        return StageCost(f"distill {name}", taken * calls, taken * work, memory, seconds)

    def _evaluate(self) -> StageCost:
        settings = self.settings.evaluate
        asked = batches(self.lengths.test, settings.batch_size)
        calls, work, seconds = 0, 0.0, 0.0
        systems: list[tuple[Architecture, Student | None, bool]] = [
            (self.shapes.teacher, None, True),
            (self.shapes.teacher, None, False),
            *(
                (self.shapes.students[name], student, False)
                for name, student in self.settings.students.items()
            ),
            *((self.shapes.students[name], None, True) for name in settings.write_steps),
        ]
        for a, student, chain in systems:
            answers = self._written(student, settings.batch_size, chain)
            # Warmed up and watched for memory before (three times as slow), scored after.
            rounds = asked + 3 + self._interventions(student)
            calls += rounds * len(answers) + asked
            work += rounds * flops(a, answers, None)
            if self.clock is not None:
                each = self.clock.answer(a, answers, settings.batch_size, settings.threads)
                seconds += rounds * each
        if self.clock is None:
            return StageCost("evaluate", calls, work, None, None)
        seconds /= self.clock.workers(self.settings.resources, asked * len(systems))
        seconds += self.clock.start(self.settings.resources.workers != 0)
        return StageCost("evaluate", calls, work, None, seconds)

    def _interventions(self, student: Student | None) -> int:
        """Batches that are asked again with changed latents: each slot in three ways, all of them
        in four, and after every iteration."""
        settings = self.settings.evaluate
        if student is None or student.reads != "kv_targets" or student.model is not None:
            return 0
        if not settings.interpret_records or not settings.intervention_problems:
            return 0
        rounds = 4 + 3 * self.targets.slots + student.iterations * (student.reasoning == "jacobi")
        asked = min(settings.intervention_problems, self.lengths.test)
        return rounds * batches(asked, settings.batch_size)

    def _written(self, student: Student | None, batch: int, chain: bool) -> list[Call]:
        """A batch answered; chain: with a written chain of thought before it."""
        limit = self.settings.evaluate.max_new_tokens
        tokens = self._answer(batch)
        if chain:
            whole = self.lengths.trace + self.lengths.prompt + self.lengths.answer
            tokens = math.ceil(longest(whole, batch))
        slots = self.targets.slots
        return answering_calls(student, slots, self.lengths, batch, min(limit, tokens))

    def _answer(self, batch: int) -> int:
        return math.ceil(longest(self.lengths.answer, batch))

    def _saving(self, a: Architecture, training: Training, where: str) -> float:
        assert self.clock is not None
        saves = checkpoint_count(training, self.settings.cadence, self.lengths.problems)
        return saves * self.clock.written(checkpoint_bytes(a, training, where))


def _cheaper(
    settings: Pipeline, shapes: Shapes, lengths: Lengths, disk: dict[str, int]
) -> tuple[Saving, ...]:
    """disk: bytes by artefact, as it is now."""
    found, now = [], sum(disk.values())
    for changes, costs in _changes(settings):
        changed = settings
        for key, value in changes.items():
            section, _, field = key.partition(".")
            part = getattr(changed, section).model_copy(update={field: value})
            changed = changed.model_copy(update={section: part})
        stores = _stores(changed, shapes.teacher, lengths)
        size = sum(_disk(changed, shapes, *stores, disk["checkpoints"]).values())
        if now - size > _WORTH * now:
            found.append(Saving(_plain(changes), size, now - size, costs))
    return tuple(sorted(found, key=lambda saving: -saving.saves))


def _plain(changes: dict[str, Any]) -> dict[str, Any]:
    """As it stands in the settings."""
    return {
        key: value.model_dump() if isinstance(value, EveryLayer) else value
        for key, value in changes.items()
    }


def _changes(settings: Pipeline) -> Iterator[tuple[dict[str, Any], str]]:
    """What could be changed, and what that gives up."""
    generate, evict = settings.generate, settings.evict
    if generate.keep == "caches":
        yield (
            {"generate.keep": "targets"},
            "no teacher's caches: another budget, policy or bits runs the teacher again",
        )
        yield from _fewer_bits("generate", (generate.keys_bits, generate.values_bits))
    yield from _fewer_bits("evict", (evict.keys_bits, evict.values_bits))
    for section, bits in (("generate", generate.endpoint_bits), ("evict", evict.endpoint_bits)):
        if bits > 8 and not (section == "generate" and generate.keep == "targets"):
            yield {f"{section}.endpoint_bits": 8}, "CODI's endpoint is rounded"
    if evict.layers == "all" and evict.share == "none":
        yield {"evict.layers": EveryLayer(every=2)}, "half of the layers are not supervised"
    if evict.budget > 1:
        yield {"evict.budget": evict.budget // 2}, "half of the latents, and of the slots"


def _fewer_bits(section: str, bits: Sequence[int]) -> Iterator[tuple[dict[str, Any], str]]:
    for fewer in (8, 4):
        if max(bits) > fewer:
            changes = {f"{section}.{name}_bits": fewer for name in ("keys", "values")}
            yield changes, "keys and values are rounded: `kava store inspect` shows the drift"
