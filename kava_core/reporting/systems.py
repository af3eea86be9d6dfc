"""The systems of a comparison: their order, how each of them reasons, and the gap in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kava_core.reporting.inputs import Findings, Score, Student, Training

Kind = Literal["teacher-cot", "teacher-no-cot", "latent", "direct", "other"]


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
    training: Training | None


@dataclass(frozen=True)
class Headline:
    """How far the best latent student is up the gap from `baseline` to `ceiling`.

    share: of the gap, 1 = at the ceiling, below 0 = under the baseline; None where there is no gap.
    """

    best: System
    baseline: System
    ceiling: System
    share: float | None
    sentence: str


def systems_of(findings: Findings, test_set: str, teacher: Training | None) -> list[System]:
    """The systems measured on `test_set`, in the order they are shown in.

    The teacher with its chain of thought comes first, then the students from best to worst, last
    the teacher asked for the answer at once. teacher: how it was trained, None if it was taken as
    it is.
    """
    slots = findings.targets.manifest.geometry.slots
    systems = [
        _system(name, score, findings.students.get(name), slots, teacher)
        for name, score in findings.scores[test_set].items()
    ]
    place = {"teacher-cot": 0, "teacher-no-cot": 2}
    return sorted(systems, key=lambda s: (place.get(s.kind, 1), -s.score.exact_match, s.name))


def _system(
    name: str, score: Score, student: Student | None, slots: int, teacher: Training | None
) -> System:
    if student is None:
        if name == "teacher-cot":
            how = "writes its chain of thought"
            return System(name, score, "teacher-cot", how, "chain and answer", teacher)
        if name == "teacher-no-cot":
            how = "answers at once"
            return System(name, score, "teacher-no-cot", how, "chain and answer", teacher)
        return System(name, score, "other", "", "", None)
    settings = student.settings
    terms = {"KV": settings.alpha_kv, "CODI": settings.alpha_codi, "chain": settings.w_cot}
    taught = " + ".join(["answer", *(f"{w:g} × {term}" for term, w in terms.items() if w)])
    if settings.reasoning == "none":
        return System(name, score, "direct", "answers at once", taught, settings.training)
    how = f"{slots} latents, one after the other"
    if settings.reasoning == "jacobi":
        how = f"{slots} latents, {settings.iterations} Jacobi iterations"
    return System(name, score, "latent", how, taught, settings.training)


def headline(systems: list[System]) -> Headline | None:
    """The gap from No-CoT to the written chain of thought, and the best latent student in it.

    The baseline is the student `no-cot`, else the best student without latents, else the teacher
    asked at once. None where a teacher with a chain of thought, a latent student or a baseline is
    missing.
    """
    by_kind: dict[str, list[System]] = {}
    for system in systems:
        by_kind.setdefault(system.kind, []).append(system)
    direct = by_kind.get("direct", [])
    baselines = [s for s in direct if s.name == "no-cot"] or direct
    baselines = baselines or by_kind.get("teacher-no-cot", [])
    if not (by_kind.get("teacher-cot") and by_kind.get("latent") and baselines):
        return None
    best, baseline, ceiling = by_kind["latent"][0], baselines[0], by_kind["teacher-cot"][0]
    low, top, reached = (s.score.exact_match for s in (baseline, ceiling, best))
    share = (reached - low) / (top - low) if top > low else None
    return Headline(best, baseline, ceiling, share, _sentence(best, baseline, ceiling, share))


def _sentence(best: System, baseline: System, ceiling: System, share: float | None) -> str:
    low, top, reached = (s.score for s in (baseline, ceiling, best))
    ends = f"{baseline.name} ({low.exact_match:.1f} %) to {ceiling.name} ({top.exact_match:.1f} %)"
    if share is None:
        where = f"there is no way up from {ends}"
    elif share < 0:
        where = f"that is below the start of the way from {ends}"
    else:
        where = f"{100 * share:.0f} % of the way from {ends}"
    overlaps = reached.ci95[0] <= low.ci95[1] and low.ci95[0] <= reached.ci95[1]
    return (
        f"The best latent student, {best.name}, answers {reached.exact_match:.1f} % of the "
        f"problems: {where}. It takes {reached.forward_passes:.1f} forward passes per problem, "
        f"{ceiling.name} {top.forward_passes:.1f}."
        + (f" Its 95 % interval overlaps that of {baseline.name}." if overlaps else "")
    )
