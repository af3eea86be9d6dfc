"""From a source's rows to train, validation and test sets; all that is left out is counted."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kava_core.errors import KavaError
from kava_core.problems.bad import BadRecords, OnBadRecord
from kava_core.problems.readers import Location, read_source
from kava_core.problems.records import Problem, TraceForm, normalise_question, trace_characters
from kava_core.problems.rows import BadRow, Row
from kava_core.problems.sources import REGISTRY, RowSource, Source, sources_of
from kava_core.problems.sources.base import FROM_EQUATIONS, Draft, UnusableRow, equations_as
from kava_core.problems.splits import ProblemSplits, cut_splits
from kava_core.problems.tokens import TokenRules
from kava_core.wording import shown


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
class Problems:
    """What became of the rows of one split: `rows` in all, each in one of the other three.

    problems: kept; dropped: well-formed and left out, by reason; bad: malformed, or nothing that
    the tokenizer can write.
    """

    rows: int
    problems: list[Problem]
    dropped: Counter[str]
    bad: list[BadRow]

    def counts(self) -> dict[str, int]:
        """Everything left out by reason; bad rows with "bad: " before it."""
        return dict(sorted((self.dropped + Counter(f"bad: {b.reason}" for b in self.bad)).items()))


@dataclass(frozen=True)
class Reading:
    """How rows become problems: the form of the steps, whether the last is left out, limits.

    tokens: the rules of a tokenizer, where one is known. on_bad_record: whether bad rows are an
    error, which names all of them, or left out and counted.
    """

    traces: TraceForm
    drop_last_step: bool = False
    limits: Limits = Limits()
    tokens: TokenRules | None = None
    on_bad_record: OnBadRecord = "fail"

    def problems(
        self, source: RowSource, rows: Iterable[Row | BadRow], split: str, *, taught: bool
    ) -> Problems:
        """Read all rows; taught: a problem without steps is left out."""
        found: list[Problem] = []
        places: list[str] = []
        dropped: Counter[str] = Counter()
        bad: list[BadRow] = []
        number = 0
        for row in rows:
            number += 1
            if isinstance(row, BadRow):
                bad.append(row)
                continue
            try:
                draft = self._draft(source, row)
                problem = self._problem(source, draft, f"{source.name}-{split}-{row.number:06d}")
            except UnusableRow as unusable:
                dropped[str(unusable)] += 1
                continue
            except BadRow as error:
                bad.append(_with_hint(error, source, row))
                continue
            except UnicodeEncodeError as error:
                bad.append(BadRow(row.place, "Unicode text", f"half of a character ({error})"))
                continue
            if taught and not problem.steps:
                dropped["no step but the last" if draft.steps else "no steps"] += 1
                continue
            broken = self.limits.broken(problem, taught)
            if broken:
                dropped[broken] += 1
                continue
            found.append(problem)
            places.append(row.place)
        if self.tokens is None:
            return Problems(number, found, dropped, bad)
        kept = []
        for problem, wrong in zip(found, self.tokens.broken(found, places, taught), strict=True):
            if wrong is None:
                kept.append(problem)
            elif isinstance(wrong, BadRow):
                bad.append(wrong)
            else:
                dropped[wrong] += 1
        return Problems(number, kept, dropped, bad)

    def _draft(self, source: RowSource, row: Row) -> Draft:
        if self.traces not in FROM_EQUATIONS:
            return _read(source, row, self.traces)
        draft = _read(source, row, "equations" if source.forms else self.traces)
        return replace(draft, steps=tuple(equations_as(draft.steps, self.traces)))

    def _problem(self, source: RowSource, draft: Draft, name: str) -> Problem:
        steps = draft.steps[:-1] if self.drop_last_step else draft.steps
        return Problem(
            id=name,
            question=_composed(" ".join(draft.question.split())),
            steps=tuple(map(_composed, steps)),
            answer=_composed(draft.answer),
            source=source.name,
            topic=_composed(" ".join(draft.topic.split())),
        )


def _read(source: RowSource, row: Row, traces: TraceForm) -> Draft:
    """What a source makes of a row: texts, or BadRow; KavaError if its code fails."""
    kind = type(source)
    with REGISTRY.guarded(kind, f"to read {row.place}", passing=(UnusableRow, UnicodeEncodeError)):
        draft: object = source.read(row, traces)
    if not isinstance(draft, Draft):
        raise KavaError(
            f"{REGISTRY.whose(kind)}: expected a Draft of {row.place}, found {shown(draft)}. Mend "
            "that package."
        )
    for name in ("question", "answer", "topic"):
        if not isinstance(getattr(draft, name), str):
            raise _wrong(kind, row, "a text", name, draft)
    steps: object = draft.steps
    if not isinstance(steps, tuple | list) or not all(isinstance(step, str) for step in steps):
        raise _wrong(kind, row, "a tuple of texts", "steps", draft)
    return draft


def _wrong(kind: type, row: Row, expected: str, name: str, draft: Draft) -> BadRow:
    return BadRow(
        row.place,
        f"{expected} as `{name}` of {REGISTRY.whose(kind)}",
        shown(getattr(draft, name)),
        "Mend the row, or that package.",
    )


def _composed(text: str) -> str:
    """The text in NFC, as the tokenizers of many models write it; UnicodeEncodeError for one that
    no file could hold."""
    text.encode("utf-8")
    return unicodedata.normalize("NFC", text)


def _with_hint(bad: BadRow, source: RowSource, row: Row) -> BadRow:
    """The same, with the sources that have rows of these fields, if this one has not."""
    fitting = sources_of(row.fields)
    if source.name in fitting or not source.layouts:
        return bad
    hint = (
        f"Its fields are those of source {' or '.join(fitting)}."
        if fitting
        else "Source table takes any fields by their names."
    )
    return BadRow(bad.place, bad.expected, bad.found, f"{bad.remedy} {hint}")


@dataclass(frozen=True)
class ReadSet:
    """A test set: what became of its rows, and from what it was read, {} if it was drawn."""

    read: Problems
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
    KavaError for bad rows (`BadRecords`, unless they are to be left out), a split without a usable
    row, and too few rows.
    """
    check_form(source, reading.traces)
    splits = read_source(location, source.hub_config)
    if "train" not in splits:
        raise KavaError(f"{location.path}: expected a split `train`, found {sorted(splits)}.")
    read = {
        split: reading.problems(source, found.rows, split, taught=split != "test")
        for split, found in splits.items()
    }
    _refuse_bad(read, reading)
    for split, found in read.items():
        _require(source, location, split, found)
    problems = {
        split: read[split].problems if split in read else []
        for split in ("train", "validation", "test")
    }
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
        rows={split: found.rows for split, found in read.items()},
        dropped={split: found.counts() for split, found in read.items()},
    )
    origins = {split: splits.get(split, splits["train"]).origin() for split in problems}
    return replace(cut, origins=origins, bad={split: found.bad for split, found in read.items()})


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
    one form that the source has; a problem may have none. KavaError for bad rows (`BadRecords`,
    unless they are to be left out), a split that is not there, and one without a usable row.
    """
    splits = read_source(location, source.hub_config)
    chosen = split or ("test" if "test" in splits or len(splits) > 1 else next(iter(splits)))
    if chosen not in splits:
        raise KavaError(
            f"prepare.test_sets.{name}: expected a split `{chosen}` in {location.path}, found "
            f"{', '.join(splits)}. Set `split`."
        )
    if not source.gives(reading.traces) and source.forms:
        reading = replace(reading, traces=source.forms[0])
    read = reading.problems(source, splits[chosen].rows, chosen, taught=False)
    _refuse_bad({name: read}, reading)
    _require(source, location, chosen, read)
    renamed = [replace(p, id=f"{name}-{p.id.rpartition('-')[2]}") for p in read.problems]
    return ReadSet(replace(read, problems=renamed), splits[chosen].origin())


def _refuse_bad(read: Mapping[str, Problems], reading: Reading) -> None:
    if reading.on_bad_record == "fail" and any(found.bad for found in read.values()):
        raise BadRecords(
            {name: found.bad for name, found in read.items()},
            {name: found.rows for name, found in read.items()},
        )


def _require(source: RowSource, location: Location, split: str, read: Problems) -> None:
    if not read.problems:
        why = ", ".join(f"{count} with {reason}" for reason, count in read.counts().items())
        first = f" The first: {read.bad[0]}" if read.bad else ""
        raise KavaError(
            f"No usable {split} row in {location.path}: {why or 'it has no rows'}. Check that it "
            f"is {source.name}, and the settings of `prepare`.{first}"
        )
