"""From a source's rows to train, validation and test sets; all that is left out is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kava_core.errors import KavaError
from kava_core.problems.files import Row, read_source
from kava_core.problems.records import Problem, TraceForm, normalise_question, trace_characters
from kava_core.problems.sources import Source
from kava_core.problems.sources.base import Draft, UnusableRow
from kava_core.problems.splits import ProblemSplits, cut_splits


@dataclass(frozen=True)
class Limits:
    """What is too long; None is no limit.

    Questions are limited everywhere, since a model cannot hold a longer one; traces only where they
    are taught: in train and validation.
    """

    max_question_characters: int | None = None
    max_trace_characters: int | None = None
    max_steps: int | None = None

    def broken(self, problem: Problem, taught: bool) -> str | None:
        """The first limit that a problem breaks, in words, or None."""
        question, trace, steps = (
            self.max_question_characters,
            self.max_trace_characters,
            self.max_steps,
        )
        if question is not None and len(problem.question) > question:
            return f"question longer than {question} characters"
        if taught and steps is not None and len(problem.steps) > steps:
            return f"more than {steps} steps"
        if taught and trace is not None and trace_characters(problem.steps) > trace:
            return f"trace longer than {trace} characters"
        return None


@dataclass(frozen=True)
class Reading:
    """How rows become problems: the form of the steps, whether the last is left out, limits."""

    traces: TraceForm
    drop_last_step: bool = False
    limits: Limits = Limits()

    def problems(
        self, source: Source, rows: Iterable[Row], split: str, *, taught: bool
    ) -> tuple[list[Problem], Counter[str]]:
        """The usable rows, and how many of the others there were, by reason.

        taught: a problem without steps is left out. KavaError for a malformed row, with its place.
        """
        found: list[Problem] = []
        reasons: Counter[str] = Counter()
        for row in rows:
            try:
                draft = source.read(row, self.traces)
            except UnusableRow as unusable:
                reasons[str(unusable)] += 1
                continue
            if taught and not draft.steps:
                reasons["no steps"] += 1
                continue
            problem = self._problem(source, draft, f"{source.name}-{split}-{row.number:06d}")
            if taught and not problem.steps:
                reasons["no step but the last"] += 1
                continue
            broken = self.limits.broken(problem, taught)
            if broken:
                reasons[broken] += 1
                continue
            found.append(problem)
        return found, reasons

    def _problem(self, source: Source, draft: Draft, name: str) -> Problem:
        return Problem(
            id=name,
            question=" ".join(draft.question.split()),
            steps=draft.steps[:-1] if self.drop_last_step else draft.steps,
            answer=draft.answer,
            source=source.name,
            topic=" ".join(draft.topic.split()),
        )


def load_splits(
    source: Source,
    location: str,
    reading: Reading,
    *,
    hub_config: str | None = None,
    train: int | None = None,
    validation: int = 500,
    test: int | None = None,
    seed: int = 0,
    deduplicate: bool = False,
    test_sets: Mapping[str, Sequence[Problem]] | None = None,
) -> ProblemSplits:
    """Train, validation and test problems of a source; see `cut_splits` for the sizes.

    `location` is a file, a folder or a Hub name (`read_source`). With `deduplicate`, what is asked
    in test or in `test_sets` is left out of train and validation. KavaError for a malformed row
    (with its place), a split without a usable row, and too few rows.
    """
    if reading.traces not in source.forms:
        forms = " or ".join(source.forms)
        raise KavaError(
            f"prepare.traces: {source.name} has {forms}, found {reading.traces}. Correct it."
            if forms
            else f"prepare.source: {source.name} has no traces to teach. Make it a test set."
        )
    problems: dict[str, list[Problem]] = {"train": [], "validation": [], "test": []}
    dropped: dict[str, dict[str, int]] = {}
    splits = read_source(location, hub_config or source.hub_config)
    if "train" not in splits:
        raise KavaError(f"{location}: expected a split `train`, found {sorted(splits)}.")
    for split, rows in splits.items():
        taught = split != "test"
        problems[split], reasons = reading.problems(source, rows, split, taught=taught)
        _require(source, location, split, problems[split], reasons)
        if reasons:
            dropped[split] = dict(reasons)
    return cut_splits(
        problems["train"],
        problems["validation"],
        problems["test"],
        train_size=train,
        validation_size=validation,
        test_size=test,
        seed=seed,
        elsewhere={
            normalise_question(problem.question)
            for asked in (test_sets or {}).values()
            for problem in asked
        },
        deduplicate=deduplicate,
        dropped=dropped,
    )


def load_test_set(
    name: str,
    source: Source,
    location: str,
    reading: Reading,
    *,
    hub_config: str | None = None,
    split: str | None = None,
) -> tuple[list[Problem], dict[str, int]]:
    """The problems of a test set called `name`, and how many rows were left out, by reason.

    `split` of None is `test`, or the only split there is. Steps are those of `reading`, or of the
    one form that the source has; a problem may have none. KavaError for a malformed row (with its
    place), a split that is not there, and a split without a usable row.
    """
    splits = read_source(location, hub_config or source.hub_config)
    chosen = split or ("test" if "test" in splits or len(splits) > 1 else next(iter(splits)))
    if chosen not in splits:
        raise KavaError(
            f"prepare.test_sets.{name}: expected a split `{chosen}` in {location}, found "
            f"{', '.join(splits)}. Set `split`."
        )
    if reading.traces not in source.forms and source.forms:
        reading = Reading(source.forms[0], reading.drop_last_step, reading.limits)
    problems, reasons = reading.problems(source, splits[chosen], chosen, taught=False)
    _require(source, location, chosen, problems, reasons)
    renamed = [
        Problem(
            id=f"{name}-{problem.id.rpartition('-')[2]}",
            question=problem.question,
            steps=problem.steps,
            answer=problem.answer,
            source=problem.source,
            topic=problem.topic,
        )
        for problem in problems
    ]
    return renamed, dict(sorted(reasons.items()))


def _require(
    source: Source,
    location: str,
    split: str,
    problems: Sequence[Problem],
    reasons: Counter[str],
) -> None:
    if not problems:
        why = ", ".join(f"{count} with {reason}" for reason, count in sorted(reasons.items()))
        raise KavaError(
            f"No usable {split} row in {location}: {why or 'it has no rows'}. Check that it is "
            f"{source.name}, and the settings of `prepare`."
        )
