"""Last-digit chains: a counter that shows one digit, through operations that can be undone.

Every step maps the ten digits one to one, so no part of a chain says anything about where it ends,
and the answer alone says nothing about the states between: what has to be reasoned out is reasoned
out step by step, or not at all.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from kava_core.errors import KavaError
from kava_core.problems.records import Problem, TraceForm
from kava_core.problems.sources.base import GeneratedSource, equations_as
from kava_core.problems.splits import ProblemSplits

_ATTEMPTS = 1000
_MULTIPLIERS = (3, 7, 9)  # those with an inverse modulo 10, but 1
_WORDS = {"+": "plus", "*": "times"}


@dataclass(frozen=True)
class LastDigit(GeneratedSource):
    """`counter at 3 plus 4 times 7 shows ?`: <<3+4=7>><<7*7=9>>, 9.

    steps: fewest and most operations; half of them add 1 to 9, half multiply by 3, 7 or 9.
    """

    steps: tuple[int, int] = (4, 4)

    name: ClassVar[str] = "last-digit"
    forms: ClassVar[tuple[TraceForm, ...]] = ("equations",)

    def __post_init__(self) -> None:
        if not 1 <= self.steps[0] <= self.steps[1]:
            raise KavaError(
                f"Expected `steps` to be two ascending numbers from 1, found {list(self.steps)}. "
                "Correct the setting."
            )

    def splits(
        self, train: int, validation: int, test: int, *, seed: int, traces: TraceForm = "equations"
    ) -> ProblemSplits:
        """Test is drawn first, then validation, each from its own random stream."""
        questions: set[str] = set()
        drawn = {}
        for split, count in (("test", test), ("validation", validation), ("train", train)):
            if count < 0:
                raise KavaError(f"Expected a number of {split} problems, found {count}.")
            rng = random.Random(f"{seed}-{self.name}-{split}")
            drawn[split] = [
                self._new(rng, questions, f"{self.name}-{split}-{row:06d}", traces)
                for row in range(count)
            ]
        return ProblemSplits(drawn["train"], drawn["validation"], drawn["test"])

    def _new(
        self, rng: random.Random, questions: set[str], name: str, traces: TraceForm
    ) -> Problem:
        length = rng.randint(*self.steps)  # outside the retries, so that lengths stay even
        for _ in range(_ATTEMPTS):
            problem = self._tell(rng, length, name, traces)
            if problem.question not in questions:
                questions.add(problem.question)
                return problem
        raise KavaError(
            f"Expected more different problems of {length} steps than there are: {_ATTEMPTS} draws "
            f"gave none that was new, after {len(questions)} problems. Ask for fewer problems, or "
            "raise `steps`."
        )

    def _tell(self, rng: random.Random, length: int, name: str, traces: TraceForm) -> Problem:
        value = rng.randrange(10)
        told, equations = [f"counter at {value}"], []
        for _ in range(length):
            sign = rng.choice("+*")
            operand = rng.randint(1, 9) if sign == "+" else rng.choice(_MULTIPLIERS)
            result = (value + operand if sign == "+" else value * operand) % 10
            told.append(f"{_WORDS[sign]} {operand}")
            equations.append(f"<<{value}{sign}{operand}={result}>>")
            value = result
        return Problem(
            id=name,
            question=" ".join([*told, "shows ?"]),
            steps=tuple(equations_as(equations, traces)),
            answer=str(value),
            source=self.name,
            topic="counter",
        )
