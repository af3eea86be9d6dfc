"""What `kava evaluate` found in the latents: similarity.json and interpretability.json.

L layers, M latents, H key/value heads; L' layers have targets. I counts iterations: the T + 1
passes of Jacobi reasoning, 1 of sequential reasoning. In interpretability.json keys are compared in
the phase of the targets store, and everything but interventions comes from teacher-forced forwards,
so that the answer's rows belong to the same tokens in all systems.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from kava_core.findings.base import Finding
from kava_core.findings.scores import Percent

Token = tuple[str, float]  # and its probability
Grid = list[list[float | None]]  # null where no record has a number


class Maps(Finding):
    """A number for K and for V per layer and latent slot, or place along the trace."""

    keys: Grid
    values: Grid


class LayerMaps(Maps):
    """Maps [layers][slots] that name their layers."""

    layers: list[int]

    @model_validator(mode="after")
    def _rectangular(self) -> LayerMaps:
        for cells in (self.keys, self.values):
            if len(cells) != len(self.layers) or len({len(row) for row in cells}) > 1:
                raise ValueError(f"expected one row of slots for each of {len(self.layers)} layers")
        return self


class SlotSimilarity(LayerMaps):
    """Cosine of a student's latents to its targets, [L'][M]; mean over `records` and heads."""

    records: int


Similarities = dict[str, SlotSimilarity]  # by student


class DecodedSlot(Finding):
    """What one latent decodes to, beside the trace token that eviction kept in this slot.

    student: the LM head on the last hidden state at the latent, likeliest first; teacher: the same
    for the teacher's next token behind the kept one, [] where there is none. teacher_position:
    which token of the trace that is, from 0, the one that most layers and heads keep in this slot,
    the earliest of several; null where none is kept. teacher_share: of the layers and heads with a
    token there, those that keep it.
    """

    student: list[Token]
    teacher: list[Token]
    teacher_position: int | None
    teacher_share: float


class Iteration(Finding):
    """The M latents after one pass."""

    slots: list[DecodedSlot]


class DecodedProblem(Finding):
    """One problem's latents along the iterations; trace: the tokens of the reference chain."""

    id: str
    question: str
    trace: list[str]
    answer: str
    iterations: Annotated[list[Iteration], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> DecodedProblem:
        if len({len(iteration.slots) for iteration in self.iterations}) > 1:
            raise ValueError("expected as many slots in every iteration")
        kept = [s.teacher_position for i in self.iterations for s in i.slots]
        if any(place is not None and not 0 <= place < len(self.trace) for place in kept):
            raise ValueError(f"expected teacher positions within the {len(self.trace)} tokens")
        return self


class AttentionFlow(Finding):
    """Shares of attention, mean over layers, query heads and records; a row adds up to 1.

    sources [M+1]: the latents, and the answer, which is the mean over the places that predict its
    tokens. targets [P]: the parts of the question, <bot>, latents, answer prompt (with <eot>, and
    the steps before it that latents do not stand for), answer. iterations [I][M+1][P]: the answer
    is read in the last one only. teacher_full [P]: the teacher's answer reading its whole cache;
    what it sees of the trace stands under `latents`. teacher_truncated: budget → [P], reading a
    truncated one.
    """

    sources: list[str]
    targets: list[str]
    iterations: Annotated[list[Grid], Field(min_length=1)]
    teacher_full: list[float]
    teacher_truncated: dict[int, list[float]]

    @model_validator(mode="after")
    def _fits(self) -> AttentionFlow:
        wanted = [len(self.targets)] * len(self.sources)
        if any([len(row) for row in grid] != wanted for grid in self.iterations):
            raise ValueError("expected a row per source and a column per target in every iteration")
        return self


class CacheNorms(Finding):
    """L2 norms of keys and values, mean over records and heads.

    iterations: [I] of [L][M]. teacher_full: [L][bins], along the trace in bins of equal share of
    its tokens; teacher_truncated: budget → [L][budget], along the kept slots.
    """

    iterations: list[Maps]
    teacher_full: Maps
    teacher_truncated: dict[int, Maps]


class InterventionScores(Finding):
    """Exact match in % on n problems: untouched, and with latent i changed, [M].

    The change is to the input embedding of that latent when it is fed for the last time: to zero,
    to its mean over the problems, or to that of the next problem in their order (the last problem
    takes that of the first). Its keys and values follow, and what later latents and the answer
    read.
    """

    n: int
    none: Percent
    zero: list[Percent]
    mean: list[Percent]
    shuffle: list[Percent]


class Insight(Finding):
    """What one student's latents hold, over `records` test problems.

    The problems are the first whose trace the teacher can hold. question_parts: names of the parts
    that a question's tokens are sorted into: numbers (tokens with a digit), words (others with a
    letter), other. decoded: of the first few. similarity_evicted [L'][M]: cosine of each latent to
    the token kept in the same slot, mean over records and heads; similarity_full [L][M]: to the
    most similar token of the whole trace, per record and head, then mean; similarity_truncated:
    budget → the same, to the most similar of the tokens kept. interventions: None where none was
    made. Numbers have 5 significant digits.
    """

    records: int
    question_parts: list[str]
    decoded: list[DecodedProblem]
    similarity_evicted: LayerMaps
    similarity_full: LayerMaps
    similarity_truncated: dict[int, LayerMaps]
    attention: AttentionFlow
    magnitudes: CacheNorms
    interventions: InterventionScores | None = None


Insights = dict[str, Insight]  # by student
