"""From a source to all problems of a pipeline: what is taught, and what is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from kava_core.answers import has_value
from kava_core.errors import KavaError
from kava_core.problems.bad import BadRecords
from kava_core.problems.load import (
    Problems,
    Reading,
    ReadSet,
    check_form,
    load_splits,
    load_test_set,
)
from kava_core.problems.readers import Location
from kava_core.problems.records import Problem, TraceForm
from kava_core.problems.rows import BadRow
from kava_core.problems.sources import REGISTRY, GeneratedSource, RowSource, Source
from kava_core.problems.splits import ProblemSplits, count_leaks
from kava_core.wording import shown

T = TypeVar("T")


@dataclass(frozen=True)
class FurtherSet:
    """A test set beside the source's own: read from `location`, or, of `size`, drawn.

    split None: its `test`, or the only one it has.
    """

    source: Source
    location: Location | None = None
    split: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class Sizes:
    """How many problems there shall be of each split; None takes all there is."""

    train: int | None
    validation: int
    test: int | None


def prepare_problems(
    source: Source,
    location: Location | None,
    reading: Reading,
    sizes: Sizes,
    *,
    seed: int = 0,
    deduplicate: bool = False,
    allow_leakage: bool = False,
    test_sets: Mapping[str, FurtherSet] | None = None,
) -> ProblemSplits:
    """The problems of a source, generated or read from `location`, and its further test sets.

    KavaError for bad rows (`BadRecords`: those of all splits and test sets at once, unless they are
    to be left out), too few rows, a question that is taught and asked (unless one of `deduplicate`
    and `allow_leakage` is set), and a split none of whose answers is a number or a mathematical
    expression.
    """
    wrong = _Wrong()
    further = {}
    for name, asked in (test_sets or {}).items():
        asked_set = wrong.of(partial(_further, name, asked, reading, seed))
        if asked_set is not None:
            further[name] = asked_set
    problems = {name: found.read.problems for name, found in further.items()}
    splits: ProblemSplits | None
    if isinstance(source, GeneratedSource):
        splits = _generated(source, reading, sizes, seed)
    elif isinstance(source, RowSource) and location is not None:
        splits = wrong.of(
            partial(
                load_splits,
                source,
                location,
                reading,
                train=sizes.train,
                validation=sizes.validation,
                test=sizes.test,
                seed=seed,
                deduplicate=deduplicate,
                test_sets=problems,
            )
        )
    else:
        raise KavaError(f"Expected a path to read {source.name} from, found none. Set `path`.")
    if splits is None or wrong.bad:
        raise BadRecords(wrong.bad, wrong.rows)
    splits = _joined(splits, further)
    for name, found in {**splits.taught(), **splits.asked()}.items():
        _check_answers(name, found)
    return replace(splits, leaked=count_leaks(splits, allow_leakage))


def _further(name: str, asked: FurtherSet, reading: Reading, seed: int) -> ReadSet:
    source = asked.source
    if isinstance(source, RowSource) and asked.location is not None:
        return load_test_set(name, source, asked.location, reading, split=asked.split)
    if not isinstance(source, GeneratedSource) or asked.size is None:
        raise KavaError(
            f"test_sets.{name}: expected a source to read from a path, or one to draw a size from, "
            f"found {source.name}. Set `path` or `size`."
        )
    check_form(source, reading.traces)
    drawn = _draw(source, Sizes(0, 0, asked.size), seed, reading.traces).test
    problems = [replace(p, id=f"{name}-{p.id.rpartition('-')[2]}") for p in drawn]
    return ReadSet(Problems(len(problems), problems, Counter(), []), {})


class _Wrong:
    """The bad rows of several readings, gathered."""

    def __init__(self) -> None:
        self.bad: dict[str, list[BadRow]] = {}
        self.rows: dict[str, int] = {}

    def of(self, read: Callable[[], T]) -> T | None:
        """What `read` gives; None, and its bad rows remembered, if it has some."""
        try:
            return read()
        except BadRecords as found:
            self.bad |= found.bad
            self.rows |= found.rows
            return None


def _generated(source: GeneratedSource, reading: Reading, sizes: Sizes, seed: int) -> ProblemSplits:
    check_form(source, reading.traces)
    if sizes.train is None or sizes.test is None:
        raise KavaError(
            f"Expected numbers of train and test problems to generate {source.name}, found none: "
            "there is no end to them. Set `train` and `test`."
        )
    return _draw(source, sizes, seed, reading.traces)


def _draw(source: GeneratedSource, sizes: Sizes, seed: int, traces: TraceForm) -> ProblemSplits:
    train, validation, test = sizes.train or 0, sizes.validation, sizes.test or 0
    with REGISTRY.guarded(type(source), "to draw problems"):
        drawn: object = source.splits(train, validation, test, seed=seed, traces=traces)
    if not isinstance(drawn, ProblemSplits):
        raise KavaError(
            f"{REGISTRY.whose(type(source))}: expected ProblemSplits from `splits`, found "
            f"{shown(drawn)}. Mend that package."
        )
    return drawn


def _joined(splits: ProblemSplits, further: Mapping[str, ReadSet]) -> ProblemSplits:
    return replace(
        splits,
        test_sets={name: found.read.problems for name, found in further.items()},
        rows=splits.rows | {name: found.read.rows for name, found in further.items()},
        dropped=splits.dropped
        | {name: found.read.counts() for name, found in further.items() if found.read.counts()},
        bad=splits.bad | {name: found.read.bad for name, found in further.items()},
        origins=splits.origins
        | {name: found.origin for name, found in further.items() if found.origin},
    )


def _check_answers(name: str, problems: Sequence[Problem]) -> None:
    """An answer that is mere text can only be compared letter by letter: not all of them may be."""
    if not any(has_value(problem.answer) for problem in problems):
        raise KavaError(
            f"{name}: expected numbers or mathematical expressions as answers, found none in "
            f"{len(problems)} problems (the first, {problems[0].id}, has "
            f"{problems[0].answer!r:.60}). Correct what is read as the answer."
        )
