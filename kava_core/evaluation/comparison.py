"""Every system of a pipeline on every test set, and what the latents of its students hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kava_core.console import progress, say
from kava_core.evaluation.examination import Examination
from kava_core.evaluation.job import EvaluateJob
from kava_core.evaluation.parts import Material, Part
from kava_core.findings.latents import Insight, Insights, Similarities, SlotSimilarity
from kava_core.parallel.shards import run_shards
from kava_core.settings import Resources


@dataclass(frozen=True)
class Comparison:
    """examinations: test set → system; similarity, insights: of the students with latents."""

    examinations: dict[str, dict[str, Examination]]
    similarity: Similarities = field(default_factory=dict)
    insights: Insights = field(default_factory=dict)


def compare_systems(job: EvaluateJob, material: Material, resources: Resources) -> Comparison:
    """Make the parts of an evaluation that no run made before, and put all together.

    resources: where they are made; nothing of what is found depends on them, but seconds do.
    KavaError names a problem that does not fit a model's context, and a teacher that can hold none
    of the problems that latents are looked into over.
    """
    if any(part.kind == "latents" for part in job.plan.parts):
        job.traces(material)  # says so before hours of work
    finished = _finished(job.plan.parts)
    if finished:
        say(f"evaluate: {len(finished)} of {len(job.plan.parts)} parts are finished already")
    with progress() as display:
        total = len(job.plan.parts)
        task = display.add_task("evaluate (parts)", total=total, completed=len(finished), note="")
        missing = _Missing(job.plan.parts, finished)
        for number, _ in run_shards(
            job,
            missing.ready,
            resources,
            folder=job.plan.parts[0].file.parent,
            examples=lambda number, _: _problems(job.plan.parts[number], job, material),
            then=missing.after,
        ):
            part = job.plan.parts[number]
            display.update(task, advance=1, note=f"{part.system}, {part.test_set or part.kind}")
    return _together(job, material)


def _problems(part: Part, job: EvaluateJob, material: Material) -> int:
    """How many problems a part asks, or scores the answers of."""
    if part.kind not in ("answers", "scores"):
        return 0
    size = job.settings.batch_size
    return min(size, len(material.test_sets[part.test_set].problems) - part.number * size)


def _finished(parts: Sequence[Part]) -> set[int]:
    """Numbers of parts that are there; scores are of the answers that are there with them."""
    found = {number for number, part in enumerate(parts) if part.is_finished}
    unanswered = {
        (part.system, part.test_set)
        for number, part in enumerate(parts)
        if part.kind == "answers" and number not in found
    }
    return {
        number
        for number in found
        if parts[number].kind != "scores"
        or (parts[number].system, parts[number].test_set) not in unanswered
    }


class _Missing:
    """Which parts can be made: scores only when all answers of their system to their test set are
    there."""

    def __init__(self, parts: Sequence[Part], finished: set[int]) -> None:
        self.parts = parts
        self.missing = [number for number in range(len(parts)) if number not in finished]
        self.unanswered: dict[tuple[str, str], int] = {}
        for number in self.missing:
            if parts[number].kind == "answers":
                self.unanswered[self._key(number)] = self.unanswered.get(self._key(number), 0) + 1
        self.ready = [number for number in self.missing if not self._waits(number)]

    def after(self, number: int) -> list[int]:
        """What can be made now that part `number` is there."""
        if self.parts[number].kind != "answers":
            return []
        key = self._key(number)
        self.unanswered[key] -= 1
        if self.unanswered[key]:
            return []
        return [i for i in self.missing if self.parts[i].kind == "scores" and self._key(i) == key]

    def _key(self, number: int) -> tuple[str, str]:
        return self.parts[number].system, self.parts[number].test_set

    def _waits(self, number: int) -> bool:
        return self.parts[number].kind == "scores" and bool(self.unanswered.get(self._key(number)))


def _together(job: EvaluateJob, material: Material) -> Comparison:
    found = Comparison({name: {} for name in material.test_sets})
    for name, test_set in material.test_sets.items():
        for system in job.systems.names:
            found.examinations[name][system] = job.plan.examination(
                system,
                test_set,
                job.systems.encoder(system, material.encoder),
                job.settings.batch_size,
            )
    for part in job.plan.parts:
        if part.kind == "similarity":
            found.similarity[part.system] = part.read(SlotSimilarity)
        elif part.kind == "latents":
            found.insights[part.system] = part.read(Insight)
    return found
