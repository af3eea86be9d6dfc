"""Train, validation and test, and what must hold between them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kava_core.errors import KavaError
from kava_core.problems.records import Problem, normalise_question

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class ProblemSplits:
    """The problems of a source, and how many rows were left out.

    `dropped` maps a split of the source to {reason: rows}; `leaked` is the number of test questions
    that also stand in train or validation (0 unless leakage was allowed).
    """

    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    leaked: int = 0

    def named(self) -> dict[str, list[Problem]]:
        """The three lists by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def cut_splits(
    train: Sequence[Problem],
    test: Sequence[Problem],
    *,
    train_size: int | None,
    validation_size: int,
    test_size: int | None,
    seed: int,
    allow_leakage: bool = False,
    dropped: dict[str, dict[str, int]] | None = None,
) -> ProblemSplits:
    """Cut validation (and test, if the source has none) from train and check for leakage.

    Train rows are shuffled by `seed`; validation comes first, so that it does not depend on
    `train_size`. A size of None takes all there is. Later repetitions of a question within train
    are dropped and counted, as are rows beyond the sizes asked for. A given test set keeps its
    order. KavaError if there are too few rows, if nothing is left, or if test questions appear in
    train or validation and `allow_leakage` is false.
    """
    counts = {name: Counter(reasons) for name, reasons in (dropped or {}).items()}
    unique: dict[str, Problem] = {}
    for problem in train:
        unique.setdefault(normalise_question(problem.question), problem)
    repeated = len(train) - len(unique)
    if repeated:
        counts.setdefault("train", Counter())["repeated question"] += repeated

    pool = list(unique.values())
    random.Random(f"{seed}-splits").shuffle(pool)
    if not test and test_size is None:
        raise KavaError("The source has no test problems. Say how many to cut from train.")
    cut_test = 0 if test else test_size or 0
    needed = validation_size + cut_test + (1 if train_size is None else train_size)
    if needed > len(pool):
        raise KavaError(
            f"Expected at least {needed} usable training rows ({validation_size} for validation, "
            f"{cut_test} for test, the rest for train), found {len(pool)}. Ask for fewer."
        )
    chosen_test = list(test) if test else pool[:cut_test]
    chosen_validation = pool[cut_test : cut_test + validation_size]
    rest = pool[cut_test + validation_size :]
    chosen_train = rest if train_size is None else rest[:train_size]
    if len(rest) > len(chosen_train):
        counts.setdefault("train", Counter())["beyond the number asked for"] += len(rest) - len(
            chosen_train
        )
    if test and test_size is not None:
        if test_size > len(test):
            raise KavaError(
                f"Expected {test_size} test problems, found {len(test)}. Ask for fewer."
            )
        chosen_test = chosen_test[:test_size]
        if len(test) > test_size:
            counts.setdefault("test", Counter())["beyond the number asked for"] += (
                len(test) - test_size
            )

    learnt = {normalise_question(problem.question) for problem in chosen_train + chosen_validation}
    leaked = [p for p in chosen_test if normalise_question(p.question) in learnt]
    if leaked and not allow_leakage:
        raise KavaError(
            f"{len(leaked)} test questions also stand in train or validation, the first is "
            f"{leaked[0].id}. Remove them, or set `allow_leakage`."
        )
    return ProblemSplits(
        train=_renamed(chosen_train, "train"),
        validation=_renamed(chosen_validation, "validation"),
        test=_renamed(chosen_test, "test"),
        dropped={name: dict(sorted(reasons.items())) for name, reasons in sorted(counts.items())},
        leaked=len(leaked),
    )


def _renamed(problems: Sequence[Problem], split: str) -> list[Problem]:
    """Problems whose ids say which split they ended in; the last part stays the source's row."""
    return [
        replace(problem, id=f"{problem.source}-{split}-{problem.id.rpartition('-')[2]}")
        for problem in problems
    ]
