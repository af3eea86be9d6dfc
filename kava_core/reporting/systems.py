"""The systems of a comparison: their order, how each of them reasons, and the gap in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kava_core.findings.evaluation import Difference, Score
from kava_core.reporting.collapse import collapse_of
from kava_core.reporting.inputs import PipelineFindings, RunLength, TrainedStudent
from kava_core.settings.evaluate import writer_of
from kava_core.settings.student import Share

Kind = Literal["teacher-cot", "teacher-no-cot", "latent", "direct", "writer", "other"]

WRITES = "writes its chain of thought"


@dataclass(frozen=True)
class System:
    """One row of the comparison.

    how: how it comes to its answer; taught: the terms of its loss; training: None where unknown.
    """

    name: str
    score: Score
    kind: Kind
    how: str
    taught: str
    training: RunLength | None

    @property
    def collapse(self) -> str:
        """What it answers to most problems, in words; "" where it answers this and that."""
        return collapse_of(self.score.commonest_answer)


@dataclass(frozen=True)
class Duel:
    """The best latent student against a student without latents, on the same problems.

    points: exact match of the latent student minus that of `rival`; difference: the same with its
    interval, None where they were not compared. equal_steps: they saw as many training examples.
    """

    rival: System
    difference: Difference | None
    points: float
    equal_steps: bool

    @property
    def outcome(self) -> str:
        """`is 3.0 points ahead (95 % interval 1.0 to 5.0)`, said of the rival."""
        if self.even:
            return "cannot be told apart from it"
        where = "behind" if self.points > 0 else "ahead"
        said = f"is {abs(self.points):.1f} points {where}"
        if self.difference is None:
            return said
        low, high = sorted(abs(end) for end in self.difference.ci95)
        return f"{said} (95 % interval {low:.1f} to {high:.1f})"

    @property
    def even(self) -> bool:
        return self.points == 0 or (self.difference is not None and not self.difference.clear)

    @property
    def latents_lead(self) -> bool:
        return not self.even and self.points > 0

    @property
    def rival_leads(self) -> bool:
        return not self.even and self.points < 0


@dataclass(frozen=True)
class Headline:
    """The best latent student against every student without latents, and up the gap.

    share: of the gap from `baseline` to `ceiling`, 1 = at the ceiling, below 0 = under the
    baseline; None where there is no gap. lead: who is ahead, in a sentence; sentence: the same,
    with every duel and the gap. ahead: the name of the system that is ahead, None where it is
    even or there is nothing without latents to compare with.
    """

    best: System
    baseline: System
    ceiling: System
    duels: list[Duel]
    share: float | None
    lead: str
    sentence: str
    ahead: str | None


def systems_of(findings: PipelineFindings, test_set: str) -> list[System]:
    """The systems measured on `test_set`, in the order they are shown in.

    The teacher with its chain of thought comes first, then the students from best to worst, last
    the teacher asked for the answer at once.
    """
    slots = findings.targets.manifest.geometry.slots
    writers = {writer_of(name): findings.students[name] for name in findings.write_steps}
    systems = [
        _writer(name, score, writers[name])
        if name in writers
        else _system(name, score, findings.students.get(name), slots, findings.teacher_training)
        for name, score in findings.scores[test_set].items()
    ]
    place = {"teacher-cot": 0, "teacher-no-cot": 2}
    return sorted(systems, key=lambda s: (place.get(s.kind, 1), -s.score.exact_match, s.name))


def _system(
    name: str,
    score: Score,
    student: TrainedStudent | None,
    slots: int,
    teacher: RunLength | None,
) -> System:
    if student is None:
        if name == "teacher-cot":
            return System(name, score, "teacher-cot", WRITES, "chain and answer", teacher)
        if name == "teacher-no-cot":
            how = "answers at once"
            return System(name, score, "teacher-no-cot", how, "chain and answer", teacher)
        return System(name, score, "other", "", "", None)
    settings = student.settings
    taught = _taught(student)
    if settings.reads == "problems":
        return System(name, score, "direct", "answers at once", taught, settings.training)
    how = f"{slots} latents, one after the other"
    if settings.reasoning == "jacobi":
        how = f"{slots} latents, {settings.iterations} Jacobi iterations"
    return System(name, score, "latent", how, taught, settings.training)


def _writer(name: str, score: Score, student: TrainedStudent) -> System:
    return System(name, score, "writer", WRITES, _taught(student), student.settings.training)


def _taught(student: TrainedStudent) -> str:
    """The terms of its loss, in words."""
    settings = student.settings
    terms = {
        "KV" if settings.kv_parts == "both" else settings.kv_parts: settings.alpha_kv,
        "CODI": settings.alpha_codi,
        "readout": settings.alpha_readout,
        "chain": settings.w_cot,
    }
    answer = "answer" if settings.curriculum is None else "what is still written, then the answer"
    return " + ".join([answer, *(_weighed(term, w) for term, w in terms.items() if w)])


def _weighed(term: str, weight: float | Share) -> str:
    if isinstance(weight, Share):
        return f"{term} at {weight.share:.0%} of the gradient"
    return f"{weight:g} × {term}"


def headline(
    systems: Sequence[System], differences: Mapping[str, Mapping[str, Difference]]
) -> Headline | None:
    """Who is ahead: the best latent student, or a student without latents.

    differences: student → other system, of this test set. The baseline of the gap is the student
    without latents that was trained for as many examples as the best latent student, else the best
    without latents, else the teacher asked at once. None where a teacher with a chain of thought, a
    latent student or a baseline is missing.
    """
    by_kind: dict[str, list[System]] = {}
    for system in systems:
        by_kind.setdefault(system.kind, []).append(system)
    direct = by_kind.get("direct", [])
    rest = direct or by_kind.get("teacher-no-cot", [])
    if not (by_kind.get("teacher-cot") and by_kind.get("latent") and rest):
        return None
    best, ceiling = by_kind["latent"][0], by_kind["teacher-cot"][0]
    duels = [_duel(best, rival, differences.get(best.name, {})) for rival in direct]
    duels.sort(key=lambda duel: not duel.equal_steps)
    baseline = next((duel.rival for duel in duels if duel.equal_steps), rest[0])
    low, top, reached = (s.score.exact_match for s in (baseline, ceiling, best))
    share = (reached - low) / (top - low) if top > low else None
    lead, ahead = _lead(best, duels)
    gap = _gap(best, baseline, ceiling, share)
    sentence = " ".join([lead, *(_against(best, duel) for duel in duels), gap])
    return Headline(best, baseline, ceiling, duels, share, lead, sentence, ahead)


def _duel(best: System, rival: System, differences: Mapping[str, Difference]) -> Duel:
    found = differences.get(rival.name)
    points = best.score.exact_match - rival.score.exact_match
    ours, theirs = best.training, rival.training
    equal = ours is not None and theirs is not None and ours.examples == theirs.examples
    return Duel(rival, found, points, equal)


def _against(best: System, duel: Duel) -> str:
    rival = duel.rival
    when = "Trained otherwise"
    if duel.equal_steps:
        when = "In equal steps"
    elif best.training is not None and rival.training is not None:
        steps = f"{rival.training.steps:,} steps, and {best.name} for {best.training.steps:,}"
        when = f"Trained for {steps}"
    return f"{when}, {rival.name} ({rival.score.exact_match:.1f} %) {duel.outcome}."


def _lead(best: System, duels: Sequence[Duel]) -> tuple[str, str | None]:
    """Who is ahead, in a sentence and by name."""
    reached = f"{best.score.exact_match:.1f} %"
    if not duels:
        words = f"The best latent student, {best.name}, answers {reached} of the problems; "
        return words + "no student was trained without latents.", None
    rival = max((duel.rival for duel in duels), key=lambda system: system.score.exact_match)
    theirs = f"{rival.score.exact_match:.1f} %"
    if any(duel.rival_leads for duel in duels):
        return (
            f"No-CoT is ahead: {rival.name} answers {theirs} of the problems without a latent, "
            f"{best.name}, the best latent student, {reached}."
        ), rival.name
    if all(duel.latents_lead for duel in duels):
        return (
            f"Latents are ahead: {best.name} answers {reached} of the problems, {rival.name}, the "
            f"best student without latents, {theirs}."
        ), best.name
    return (
        f"Latents and No-CoT cannot be told apart: {best.name}, the best latent student, answers "
        f"{reached} of the problems, {rival.name} {theirs} without a latent."
    ), None


def _gap(best: System, baseline: System, ceiling: System, share: float | None) -> str:
    low, top = baseline.score, ceiling.score
    ends = f"{baseline.name} ({low.exact_match:.1f} %) to {ceiling.name} ({top.exact_match:.1f} %)"
    if share is None:
        where = f"There is no way up from {ends}"
    elif share < 0:
        where = f"{best.name} is below the start of the way from {ends}"
    else:
        where = f"{best.name} is {100 * share:.0f} % of the way from {ends}"
    return (
        f"{where}, with {best.score.forward_passes:.1f} forward passes per problem for "
        f"{top.forward_passes:.1f}."
    )
