"""What `kava evaluate` found in the latents: similarity.json and interpretability.json.

L layers, M latents, H key/value heads; L' layers have targets. I counts iterations: the T + 1
passes of Jacobi reasoning, 1 of sequential reasoning. In interpretability.json keys are compared in
the phase of the targets store, and everything but interventions comes from teacher-forced forwards,
so that the answer's rows belong to the same tokens in all systems.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, computed_field, model_validator

from kava_core.findings.base import Finding
from kava_core.findings.evaluation import Difference
from kava_core.findings.scores import Percent

Token = tuple[str, float]  # and its probability
Grid = list[list[float | None]]  # null where no record has a number
Interval = tuple[Percent, Percent]

INERT_PERCENT = 5.0  # the most answers that an intervention may change and be called inert


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


class Changed(Finding):
    """Answers given with changed latents, held against the untouched ones on the same problems.

    exact_match, ci95: in %, with the Wilson interval; difference: exact match less the untouched,
    paired; changed: % of problems with another answer than the untouched one.
    """

    exact_match: Percent
    ci95: Interval
    difference: Difference
    changed: Percent

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated properties
    @property
    def inert(self) -> bool:
        """It changes nothing: no difference is clear, and hardly an answer is another."""
        return not self.difference.clear and self.changed <= INERT_PERCENT


class Following(Finding):
    """How often (%, Wilson interval) an answer is the donor's gold one.

    n: the problems that count, whose own gold answer is another one. untouched: the same share of
    the untouched answers, which know nothing of a donor.
    """

    share: Percent
    ci95: Interval
    n: Annotated[int, Field(gt=0)]
    untouched: Percent


class Donated(Changed):
    """Answers given with a donor's latents; follows: None where all share their gold answers."""

    follows: Following | None


class TogetherScores(Finding):
    """All latents changed at once.

    removed: to zero; mean: each to its slot's mean over the problems; shuffled: each to one of
    another slot of the same problem, None where there is one slot; donor: each to that of its slot
    in another problem, None where there is one problem.
    """

    removed: Changed
    mean: Changed
    shuffled: Changed | None
    donor: Donated | None


class AloneScores(Finding):
    """One latent changed and the others let be, [M]: as in `TogetherScores`."""

    removed: list[Changed]
    mean: list[Changed]
    donor: list[Donated] | None


class InterventionScores(Finding):
    """Answers to n problems with the latents untouched and changed; none, ci95: untouched (%).

    The change is to the input embedding of a latent when it is fed for the last time. Its keys and
    values follow, and what later latents and the answer read. iterations [T]: the answer reads the
    latents of iteration 0 … T − 1 in place of those of T; [] for sequential reasoning.
    """

    n: int
    none: Percent
    ci95: Interval
    together: TogetherScores
    alone: AloneScores
    iterations: list[Changed]

    @model_validator(mode="after")
    def _fits(self) -> InterventionScores:
        alone = (self.alone.removed, self.alone.mean, self.alone.donor or self.alone.mean)
        if not self.alone.removed or len({len(slots) for slots in alone}) > 1:
            raise ValueError("expected as many latents removed, mean-filled and taken from donors")
        if (self.alone.donor is None) != (self.together.donor is None):
            raise ValueError("expected donors for all latents and for each, or for neither")
        return self


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
