"""A handful of worked problems, chosen by rule and not by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kava_core.findings.evaluation import Prediction
from kava_core.reporting.systems import Headline

LONGEST = 600


@dataclass(frozen=True)
class Answer:
    """What one system wrote (`text`, shortened to a screenful) and what was read from it."""

    system: str
    answer: str
    correct: bool
    text: str
    passes: int


@dataclass(frozen=True)
class Example:
    """One problem with the answers of all systems; `why` says what it is an example of."""

    id: str
    question: str
    gold: str
    n_steps: int
    why: str
    answers: list[Answer]


def choose_examples(
    predictions: Sequence[Prediction],
    order: Sequence[str],
    headline: Headline | None,
    count: int = 5,
) -> list[Example]:
    """Up to `count` problems of one test set, each with another set of systems that solve it.

    First come problems on which the best latent student and its baseline, or it and the teacher,
    disagree, then what most problems look like. Of the problems that look alike the first by id is
    taken. order: the systems, as they are to be shown.
    """
    problems: dict[str, dict[str, Prediction]] = {}
    for prediction in predictions:
        problems.setdefault(prediction.id, {})[prediction.system] = prediction
    systems = [name for name in order if any(name in given for given in problems.values())]
    patterns: dict[tuple[bool, ...], str] = {}
    sizes: Counter[tuple[bool, ...]] = Counter()
    for id_, given in sorted(problems.items()):
        if not all(name in given for name in systems):
            continue  # a problem that some system was not asked shows no comparison
        pattern = tuple(given[name].correct for name in systems)
        patterns.setdefault(pattern, id_)
        sizes[pattern] += 1

    def rank(pattern: tuple[bool, ...]) -> tuple[int, int, str]:
        return (_interest(pattern, systems, headline), -sizes[pattern], patterns[pattern])

    chosen: list[tuple[bool, ...]] = []
    ranked = sorted(patterns, key=rank)
    for interest in range(4):  # one of every kind first
        chosen += [p for p in ranked if rank(p)[0] == interest][:1]
    chosen += [p for p in ranked if p not in chosen]
    return [
        _example(problems[patterns[p]], systems, _why(p, systems, headline), sizes[p])
        for p in chosen[:count]
    ]


def _interest(pattern: Sequence[bool], systems: Sequence[str], headline: Headline | None) -> int:
    right = dict(zip(systems, pattern, strict=True))
    if headline is not None:
        best = right.get(headline.best.name, False)
        if best and not right.get(headline.baseline.name, False):
            return 0
        if not best and right.get(headline.ceiling.name, False):
            return 1
    return 3 if all(pattern) or not any(pattern) else 2


def _why(pattern: Sequence[bool], systems: Sequence[str], headline: Headline | None) -> str:
    if all(pattern):
        return "every system is right"
    if not any(pattern):
        return "no system is right"
    interest = _interest(pattern, systems, headline)
    if headline is not None and interest == 0:
        return f"{headline.best.name} is right, {headline.baseline.name} is not"
    if headline is not None and interest == 1:
        return f"{headline.ceiling.name} is right, {headline.best.name} is not"
    return f"{sum(pattern)} of {len(pattern)} systems are right"


def _example(given: dict[str, Prediction], systems: Sequence[str], why: str, alike: int) -> Example:
    first = given[systems[0]]
    answers = [
        Answer(p.system, p.answer, p.correct, _shorten(p.text.strip()), p.passes)
        for p in (given[name] for name in systems)
    ]
    others = "the only problem of its kind" if alike == 1 else f"one of {alike} such problems"
    return Example(first.id, first.question, first.gold, first.n_steps, f"{why}; {others}", answers)


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
