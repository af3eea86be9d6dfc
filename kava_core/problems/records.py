"""The problem record: what every source produces."""

from __future__ import annotations

import math
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

TraceForm = Literal["equations", "sentences", "results", "checked"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One word problem with its reasoning.

    `steps` are the sentences or equations of the trace exactly as they are taught, none where a
    test problem has no trace; `answer` is the bare final answer ("42"); `topic` groups problems
    within a `source`.
    """

    id: str
    question: str
    steps: tuple[str, ...]
    answer: str
    source: str
    topic: str


def normalise_question(question: str) -> str:
    """The question without what does not make it another one: case, punctuation and spacing."""
    text = unicodedata.normalize("NFKC", question).casefold()
    return " ".join(re.findall(r"\w+", text))


def question_digest(question: str) -> bytes:
    """Of what `normalise_question` leaves: to tell many questions apart in little memory."""
    return blake2b(normalise_question(question).encode(), digest_size=16).digest()


def describe(problems: Iterable[Problem]) -> dict[str, Any]:
    """Counts and length histograms, ready for JSON (all keys are strings).

    `by_steps`, `by_topic` and `by_source` count problems; `question_words` and `trace_words` map a
    number of whitespace-separated words to the number of problems that have it;
    `question_characters` and `trace_characters` are the lengths that limits are set in.
    """
    lengths = {"question_characters": array("q"), "trace_characters": array("q")}
    numbers: dict[str, Counter[int]] = {
        "by_steps": Counter(),
        "question_words": Counter(),
        "trace_words": Counter(),
    }
    names: dict[str, Counter[str]] = {"by_topic": Counter(), "by_source": Counter()}
    for problem in problems:
        lengths["question_characters"].append(len(problem.question))
        lengths["trace_characters"].append(trace_characters(problem.steps))
        numbers["by_steps"][len(problem.steps)] += 1
        numbers["question_words"][len(problem.question.split())] += 1
        numbers["trace_words"][len(" ".join(problem.steps).split())] += 1
        names["by_topic"][problem.topic] += 1
        names["by_source"][problem.source] += 1
    return {
        "problems": sum(numbers["by_steps"].values()),
        **{key: {str(value): of[value] for value in sorted(of)} for key, of in numbers.items()},
        **{key: {value: of[value] for value in sorted(of)} for key, of in names.items()},
        **{key: _quantiles(of) for key, of in lengths.items()},
    }


def describe_tokens(questions: Sequence[int], traces: Sequence[int]) -> dict[str, Any]:
    """The same quantiles of N_Q and N_C, the lengths that limits in tokens are set in."""
    return {"question_tokens": _quantiles(questions), "trace_tokens": _quantiles(traces)}


def trace_characters(steps: Sequence[str]) -> int:
    """The length of a trace: the characters of all its steps."""
    return sum(map(len, steps))


def _quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """The least number that so many per cent of `lengths` do not exceed."""
    ordered = sorted(lengths)
    return {
        name: ordered[max(0, math.ceil(share * len(ordered)) - 1)]
        for name, share in (("min", 0.0), ("median", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1))
        if ordered
    }
