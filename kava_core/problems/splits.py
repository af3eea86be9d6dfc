"""Train, validation and test, and what must hold between them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from kava_core.errors import KavaError
from kava_core.problems.records import Problem, normalise_question, question_digest
from kava_core.problems.rows import BadRow

# A split by the names that files and datasets give it.
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class ProblemSplits:
    """The problems of a source, and what became of all its rows.

    `test_sets` are further problems to be asked, by name. `rows` maps a split or a test set to the
    rows that it had: a row that was cut from train is one of the split that it went to. Each is one
    of its problems, or counted in `dropped`, which maps the same to {reason: rows}. `bad` are the
    bad rows among those, by the source's splits and the test sets. `leaked` maps `test` and every
    test set to the number of its questions that also stand in train or validation (0 unless leakage
    was allowed); `origins` maps a split or test set to what it was read from (`SplitRows.origin`),
    if it was read.
    """

    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]
    test_sets: dict[str, list[Problem]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    bad: dict[str, list[BadRow]] = field(default_factory=dict)
    leaked: dict[str, int] = field(default_factory=dict)
    origins: dict[str, dict[str, Any]] = field(default_factory=dict)

    def taught(self) -> dict[str, list[Problem]]:
        """Train and validation by name."""
        return {"train": self.train, "validation": self.validation}

    def asked(self) -> dict[str, list[Problem]]:
        """`test` and the further test sets by name."""
        return {"test": self.test, **self.test_sets}

    def counts(self, name: str) -> dict[str, Any]:
        """{"in", "kept", "dropped": {reason: rows}} of a split or test set; the first is the sum
        of all others."""
        kept = len({**self.taught(), **self.asked()}[name])
        # What is generated was never anything else than kept.
        return {
            "in": self.rows.get(name, kept),
            "kept": kept,
            "dropped": self.dropped.get(name, {}),
        }


def cut_splits(
    train: Sequence[Problem],
    validation: Sequence[Problem],
    test: Sequence[Problem],
    *,
    train_size: int | None,
    validation_size: int,
    test_size: int | None,
    seed: int,
    rows: Mapping[str, int],
    dropped: Mapping[str, Mapping[str, int]],
    elsewhere: Set[str] = frozenset(),
    deduplicate: bool = False,
) -> ProblemSplits:
    """Cut what the source does not have (validation, test) from train.

    Train rows are shuffled by `seed`; test comes first and validation next, so that neither depends
    on `train_size`. A size of None takes all there is. Given validation and test sets keep their
    order. Left out and counted are later repetitions of a question within train, training questions
    of a given validation set, rows beyond the sizes asked for, and, with `deduplicate`, rows of
    train and validation whose question is one of the test set or of `elsewhere` (normalised
    questions). rows, dropped: how many rows each split of the source had, and how many of them were
    left out before. KavaError if there are too few rows, or if nothing is left.
    """
    counts: dict[str, Counter[str]] = {name: Counter(reasons) for name, reasons in dropped.items()}

    def drop(split: str, reason: str, left_out: int) -> None:
        if left_out:
            counts.setdefault(split, Counter())[reason] += left_out

    unique: dict[str, Problem] = {}
    for problem in train:
        unique.setdefault(normalise_question(problem.question), problem)
    drop("train", "repeated question", len(train) - len(unique))
    chosen_test = _first("test", test, test_size, drop) if test else []
    if deduplicate:
        asked = elsewhere | {normalise_question(problem.question) for problem in chosen_test}
        kept = [p for p in validation if normalise_question(p.question) not in asked]
        drop("validation", "question of a test set", len(validation) - len(kept))
        drop("train", "question of a test set", len(asked & unique.keys()))
        unique = {question: p for question, p in unique.items() if question not in asked}
        validation = kept
    chosen_validation = (
        _first("validation", validation, validation_size, drop) if validation else []
    )
    held_out = {normalise_question(problem.question) for problem in chosen_validation}
    drop("train", "question of the validation set", len(held_out & unique.keys()))

    pool = [problem for question, problem in unique.items() if question not in held_out]
    random.Random(f"{seed}-splits").shuffle(pool)
    if not test and test_size is None:
        raise KavaError("The source has no test problems. Say how many to cut from train.")
    cut_test = 0 if test else test_size or 0
    cut_validation = 0 if validation else validation_size
    needed = cut_validation + cut_test + (1 if train_size is None else train_size)
    if needed > len(pool):
        raise KavaError(
            f"Expected at least {needed} usable training rows ({cut_validation} for validation, "
            f"{cut_test} for test, the rest for train), found {len(pool)}. Ask for fewer."
        )
    if not test:
        chosen_test = pool[:cut_test]
    if not validation:
        chosen_validation = pool[cut_test : cut_test + cut_validation]
    rest = pool[cut_test + cut_validation :]
    chosen_train = rest if train_size is None else rest[:train_size]
    drop("train", _BEYOND, len(rest) - len(chosen_train))
    moved = {"train": -cut_test - cut_validation, "validation": cut_validation, "test": cut_test}
    return ProblemSplits(
        train=_renamed(chosen_train, "train"),
        validation=_renamed(chosen_validation, "validation"),
        test=_renamed(chosen_test, "test"),
        rows={name: rows.get(name, 0) + number for name, number in moved.items()},
        dropped={
            name: dict(sorted(reasons.items()))
            for name, reasons in sorted(counts.items())
            if reasons
        },
    )


def count_leaks(splits: ProblemSplits, allow: bool) -> dict[str, int]:
    """How many questions of `test` and of each test set stand in train or validation.

    KavaError, with the numbers and an example, if there are any and `allow` is false.
    """
    asked = {question_digest(p.question) for each in splits.asked().values() for p in each}
    taught = (question_digest(p.question) for each in splits.taught().values() for p in each)
    learnt = {digest for digest in taught if digest in asked}
    leaked = {
        name: [p for p in problems if question_digest(p.question) in learnt]
        for name, problems in splits.asked().items()
    }
    found = [f"{len(problems)} of {name}" for name, problems in leaked.items() if problems]
    if found and not allow:
        first = next(problems[0] for problems in leaked.values() if problems)
        raise KavaError(
            f"Test questions also stand in train or validation: {', '.join(found)}; the first is "
            f"{first.id}. Remove them, or set `deduplicate` (leaves them out of train and "
            "validation) or `allow_leakage`."
        )
    return {name: len(problems) for name, problems in leaked.items()}


_BEYOND = "beyond the number asked for"


def _first(
    name: str, problems: Sequence[Problem], size: int | None, drop: Callable[[str, str, int], None]
) -> list[Problem]:
    """The first `size` of a given split, all if it is None."""
    if size is not None and size > len(problems):
        raise KavaError(f"Expected {size} {name} problems, found {len(problems)}. Ask for fewer.")
    chosen = list(problems[:size])
    drop(name, _BEYOND, len(problems) - len(chosen))
    return chosen


def _renamed(problems: Sequence[Problem], split: str) -> list[Problem]:
    """Problems whose ids say which split they ended in; the last part stays the source's row."""
    return [
        replace(problem, id=f"{problem.source}-{split}-{problem.id.rpartition('-')[2]}")
        for problem in problems
    ]
