"""What a study found: every cell's answers, and what they say together."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, computed_field

from kava_core.findings.base import Finding
from kava_core.findings.scores import CommonestAnswer, Percent

RESULTS, ANSWERS, SUMMARY, ASKED = "results.csv", "answers.parquet", "summary.json", "asked.jsonl"
INTERVENTIONS, FIDELITY = "interventions.csv", "fidelity.csv"


class CellAnswers(Finding):
    """One system's answers: per problem its id, whether it was right, and calls of the decoder.

    commonest_answer: None where nothing was answered, and in cells of before it was written.
    """

    ids: list[str]
    correct: list[bool]
    passes: list[int]
    commonest_answer: CommonestAnswer | None = None


class CellAnswer(Finding):
    """One answer in a study, a row of answers.parquet. variant: "" where there is no grid."""

    variant: str
    system: str
    seed: int | None
    id: str
    correct: bool


Kind = Literal["answers", "interventions"]


class Asking(Finding):
    """When a cell was asked test problems, a line of asked.jsonl, written just before. kind: as
    they are, or again with its latents changed; key: of the cell."""

    at: str
    kind: Kind = "answers"  # lines of before it was written say nothing of it
    system: str
    variant: str
    seed: int | None
    problems: int
    key: str


class Carried(Finding):
    """What the latents of a student carry, of each seed, in their order.

    n: problems; untouched, removed, mean, donor: exact match with the latents as they are, set to
    zero, to their mean over the problems, and to another problem's. followed: % of answers with
    another problem's latents that are that problem's, of those whose own is another one. None where
    there is no other problem, or none with another answer. All as in `InterventionScores`.
    """

    n: int
    untouched: list[Percent]
    removed: list[Percent]
    mean: list[Percent]
    donor: list[Percent | None]
    followed: list[Percent | None]


class StoreFidelity(Finding):
    """What the teacher answers to n validation problems from the slots of a store.

    exact_match: in %, and full and none that with its whole cache and without the chain; kl: to the
    full cache, nats per answer token. All as in `CacheScore`.
    """

    n: int
    exact_match: Percent
    kl: float
    full: Percent
    none: Percent


class GroupFidelity(Finding):
    """The same over a group's seeds, in their order; equal where they share a teacher."""

    n: int
    exact_match: list[Percent]
    kl: list[float]


class RankCorrelation(Finding):
    """Spearman's, of two orders of the same settings; p_value: two-sided, by permutations."""

    rho: Annotated[float, Field(ge=-1, le=1)]
    p_value: float


class Foretold(Finding):
    """Whether fidelity ranks n settings of a student as the student's exact match does.

    exact_match: by what the teacher answers from the slots; kl: by how little it departs there.
    None where that, or the student's exact match, is the same for all of them.
    """

    system: str
    n: int
    exact_match: RankCorrelation | None
    kl: RankCorrelation | None


class Group(Finding):
    """A system at one point of the grid, over its seeds.

    exact_match: of each seed, in their order; mean and standard deviation (n − 1; None for one
    seed) of these; forward_passes: per problem, mean; n: problems; commonest_answers: of each seed.
    """

    variant: str
    system: str
    seeds: list[int | None]
    exact_match: list[Percent]
    mean: Percent
    deviation: float | None
    forward_passes: float
    n: int
    # Not written where no cell knows its own.
    commonest_answers: Annotated[
        list[CommonestAnswer | None],
        Field(default_factory=list, exclude_if=lambda value: not value),
    ]
    # Not written where nobody was asked with changed latents.
    carried: Annotated[Carried | None, Field(exclude_if=lambda value: value is None)] = None
    fidelity: Annotated[GroupFidelity | None, Field(exclude_if=lambda value: value is None)] = None


class SeededDifference(Finding):
    """Exact match of one system minus that of another over the same seeds and problems, in points.

    p_bootstrap: two-sided, of a paired bootstrap over seeds and problems; p_seeds: of a paired
    t-test over the seeds' differences, None with one seed. ci95: from the lower of the lower ends
    to the higher of the higher ends of the two 95 % intervals.
    """

    difference: float
    ci95: tuple[float, float]
    p_bootstrap: float
    p_seeds: float | None

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated properties
    @property
    def p_value(self) -> float:
        """The larger of the two."""
        return max(self.p_bootstrap, self.p_seeds or 0.0)


class Compared(Finding):
    """A student minus the baseline. p_holm: the p-value corrected for all that a study compares."""

    variant: str
    system: str
    baseline_variant: str
    baseline: str
    difference: SeededDifference
    p_holm: float


class StudySummary(Finding):
    """A study, in the order of its grid and its students; missing_…: what a whole one has beyond
    this, whose stages failed."""

    study: str
    pipeline: str
    split: Literal["validation", "test"]
    groups: list[Group]
    compared: list[Compared]
    foretold: Annotated[
        list[Foretold], Field(default_factory=list, exclude_if=lambda value: not value)
    ]
    missing_cells: Annotated[int, Field(exclude_if=lambda value: not value)] = 0
    missing_comparisons: Annotated[int, Field(exclude_if=lambda value: not value)] = 0
