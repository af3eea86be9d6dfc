"""From a source's rows to train, validation and test sets; all that is left out is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kava_core.errors import KavaError
from kava_core.problems.readers import Location, read_source
from kava_core.problems.records import Problem, TraceForm, normalise_question, trace_characters
from kava_core.problems.rows import Row
from kava_core.problems.sources import RowSource, Source
from kava_core.problems.sources.base import FROM_EQUATIONS, Draft, UnusableRow, equations_as
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
        self, source: RowSource, rows: Iterable[Row], split: str, *, taught: bool
    ) -> tuple[list[Problem], Counter[str]]:
        """The usable rows, and how many of the others there were, by reason.

        taught: a problem without steps is left out. KavaError for a malformed row, with its place.
        """
        found: list[Problem] = []
        reasons: Counter[str] = Counter()
        for row in rows:
            try:
                draft = self._draft(source, row)
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

    def _draft(self, source: RowSource, row: Row) -> Draft:
        if self.traces not in FROM_EQUATIONS:
            return source.read(row, self.traces)
        draft = source.read(row, "equations" if source.forms else self.traces)
        return replace(draft, steps=tuple(equations_as(draft.steps, self.traces)))

    def _problem(self, source: RowSource, draft: Draft, name: str) -> Problem:
        return Problem(
            id=name,
            question=" ".join(draft.question.split()),
            steps=draft.steps[:-1] if self.drop_last_step else draft.steps,
            answer=draft.answer,
            source=source.name,
            topic=" ".join(draft.topic.split()),
        )


@dataclass(frozen=True)
class ReadSet:
    """Problems that were read, how many rows were left out, by reason, and from what."""

    problems: list[Problem]
    dropped: dict[str, int]
    origin: dict[str, Any]


def load_splits(
    source: RowSource,
    location: Location,
    reading: Reading,
    *,
    train: int | None = None,
    validation: int = 500,
    test: int | None = None,
    seed: int = 0,
    deduplicate: bool = False,
    test_sets: Mapping[str, Sequence[Problem]] | None = None,
) -> ProblemSplits:
    """Train, validation and test problems of a source; see `cut_splits` for the sizes.

    With `deduplicate`, what is asked in test or in `test_sets` is left out of train and validation.
    KavaError for a malformed row (with its place), a split without a usable row, and too few rows.
    """
    check_form(source, reading.traces)
    problems: dict[str, list[Problem]] = {"train": [], "validation": [], "test": []}
    dropped: dict[str, dict[str, int]] = {}
    splits = read_source(location, source.hub_config)
    if "train" not in splits:
        raise KavaError(f"{location.path}: expected a split `train`, found {sorted(splits)}.")
    for split, found in splits.items():
        taught = split != "test"
        problems[split], reasons = reading.problems(source, found.rows, split, taught=taught)
        _require(source, location, split, problems[split], reasons)
        if reasons:
            dropped[split] = dict(reasons)
    cut = cut_splits(
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
    origins = {split: splits.get(split, splits["train"]).origin() for split in problems}
    return replace(cut, origins=origins)


def check_form(source: Source, traces: TraceForm) -> None:
    """KavaError if the source cannot be taught from, or not in the form `traces`."""
    if not source.gives(traces):
        forms = " or ".join(source.forms)
        raise KavaError(
            f"prepare.traces: {source.name} has {forms}, found {traces}. Correct it."
            if forms
            else f"prepare.source: {source.name} has no traces to teach. Make it a test set."
        )


def load_test_set(
    name: str,
    source: RowSource,
    location: Location,
    reading: Reading,
    *,
    split: str | None = None,
) -> ReadSet:
    """The problems of a test set called `name`.

    `split` of None is `test`, or the only split there is. Steps are those of `reading`, or of the
    one form that the source has; a problem may have none. KavaError for a malformed row (with its
    place), a split that is not there, and a split without a usable row.
    """
    splits = read_source(location, source.hub_config)
    chosen = split or ("test" if "test" in splits or len(splits) > 1 else next(iter(splits)))
    if chosen not in splits:
        raise KavaError(
            f"prepare.test_sets.{name}: expected a split `{chosen}` in {location.path}, found "
            f"{', '.join(splits)}. Set `split`."
        )
    if not source.gives(reading.traces) and source.forms:
        reading = Reading(source.forms[0], reading.drop_last_step, reading.limits)
    problems, reasons = reading.problems(source, splits[chosen].rows, chosen, taught=False)
    _require(source, location, chosen, problems, reasons)
    renamed = [replace(p, id=f"{name}-{p.id.rpartition('-')[2]}") for p in problems]
    return ReadSet(renamed, dict(sorted(reasons.items())), splits[chosen].origin())


def _require(
    source: RowSource,
    location: Location,
    split: str,
    problems: Sequence[Problem],
    reasons: Counter[str],
) -> None:
    if not problems:
        why = ", ".join(f"{count} with {reason}" for reason, count in sorted(reasons.items()))
        raise KavaError(
            f"No usable {split} row in {location.path}: {why or 'it has no rows'}. Check that it "
            f"is {source.name}, and the settings of `prepare`."
        )
