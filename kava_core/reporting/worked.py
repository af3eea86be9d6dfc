"""One problem from its question over the decoded latents to the answer."""

from __future__ import annotations

from dataclasses import dataclass

from kava_core.findings.evaluation import Prediction
from kava_core.findings.latents import DecodedProblem, Insight
from kava_core.reporting.inputs import PipelineFindings
from kava_core.reporting.systems import Headline


@dataclass(frozen=True)
class Thought:
    """How one student came to its answer; answer: None where it was not asked this problem.

    kept: places of the trace's tokens that stand beside a latent.
    """

    student: str
    decoded: DecodedProblem
    kept: set[int]
    answer: Prediction | None


def work_through(findings: PipelineFindings, headline: Headline | None) -> list[Thought]:
    """The same problem as every latent student solves it, the best student first.

    The problem is the first decoded one that the best student gets right, else the first. Empty
    where nobody looked into the latents.
    """
    looked = in_order(findings, headline)
    decoded = {name: {d.id: d for d in insight.decoded} for name, insight in looked.items()}
    best = next(iter(decoded), "")
    if not decoded.get(best):
        return []
    asked = {(p.system, p.id): p for p in findings.predictions}

    def right(id_: str) -> bool:
        answer = asked.get((best, id_))
        return answer is not None and answer.correct

    ids = list(decoded[best])
    chosen = next(filter(right, ids), ids[0])
    return [
        Thought(name, shown, _kept(shown), asked.get((name, chosen)))
        for name, problems in decoded.items()
        if (shown := problems.get(chosen)) is not None
    ]


def in_order(findings: PipelineFindings, headline: Headline | None) -> dict[str, Insight]:
    """The students whose latents were looked into, the best first."""
    names = sorted(
        findings.students, key=lambda name: headline is None or name != headline.best.name
    )
    return {name: findings.insights[name] for name in names if name in findings.insights}


def visible(token: str) -> str:
    """A token as one can see it: blanks and line ends as signs."""
    for blank, sign in ((" ", "␣"), ("Ġ", "␣"), ("▁", "␣"), ("\n", "↵"), ("Ċ", "↵"), ("\t", "⇥")):
        token = token.replace(blank, sign)
    return token or "∅"


def _kept(decoded: DecodedProblem) -> set[int]:
    slots = decoded.iterations[-1].slots if decoded.iterations else []
    return {s.teacher_position for s in slots if s.teacher_position is not None}
