"""Seeded grade-school word problems: a quantity that changes step by step.

A problem is a chain: a start value and 2 to 8 operations, each on the result of the one before, so
that no step can be taken early. All values are positive integers up to a largest one, and a
division always comes out even. A scenario (the problem's topic) and sentence forms put the chain
into words, either `compact` (few different words, about 25 tokens, for small models trained from
nothing) or `prose` (ordinary English).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from kava_core.errors import KavaError
from kava_core.problems.records import Problem, TraceForm, question_digest
from kava_core.problems.sources.base import GeneratedSource, equations_as
from kava_core.problems.sources.scenarios import SCENARIOS, STYLES, Scenario, Style, Wording
from kava_core.problems.splits import ProblemSplits

Operation = Literal["add", "subtract", "multiply", "divide"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
_SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
_SHORTEST, _LONGEST = 2, 8
_ATTEMPTS = 2000  # draws without a new problem after which the space counts as exhausted


@dataclass(frozen=True, slots=True)
class Step:
    """`left operation right = result`; `left` is the result of the step before."""

    operation: str
    left: int
    right: int
    result: int

    @property
    def expression(self) -> str:
        """The left side of the equation with spaces: "10 - 9"."""
        return f"{self.left} {_SIGNS[self.operation]} {self.right}"

    @property
    def equation(self) -> str:
        """The equation as a calculator note: "<<10-9=1>>"."""
        return f"<<{self.left}{_SIGNS[self.operation]}{self.right}={self.result}>>"


@dataclass(frozen=True)
class Synthetic(GeneratedSource):
    """What the problems look like.

    steps: the least and the greatest number of steps (each length is equally likely). operations:
    those to draw from. max_value: bounds every value of the chain. max_operand: bounds what is
    added or subtracted. factors: those of multiplications and divisions. style: `compact`, few
    different words, or `prose`. distractors: the probability that a problem has one sentence with a
    number that does not matter.

    KavaError for settings that no problem can meet, or that would change none.
    """

    name = "synthetic"
    forms = ("equations", "sentences")

    steps: tuple[int, int] = (2, 4)
    operations: tuple[Operation, ...] = OPERATIONS
    max_value: int = 99
    max_operand: int = 20
    factors: tuple[int, ...] = (2, 3)
    style: Style = "compact"
    distractors: float = 0.0

    def __post_init__(self) -> None:
        least, greatest = self.steps
        scales = {"multiply", "divide"} & set(self.operations)
        shifts = {"add", "subtract"} & set(self.operations)
        checks = [
            (
                _SHORTEST <= least <= greatest <= _LONGEST,
                f"`steps` to be two numbers from {_SHORTEST} to {_LONGEST}, the smaller first",
                list(self.steps),
            ),
            (
                bool(self.operations) and set(self.operations) <= set(OPERATIONS),
                f"`operations` to name some of {', '.join(OPERATIONS)}",
                list(self.operations),
            ),
            (self.max_value >= 4, "`max_value` to be at least 4", self.max_value),
            (self.max_operand >= 1, "`max_operand` to be at least 1", self.max_operand),
            (
                bool(shifts) or self.max_operand == Synthetic.max_operand,
                "`max_operand` only beside the operations add or subtract",
                self.max_operand,
            ),
            (
                bool(self.factors) and all(2 <= factor <= 9 for factor in self.factors),
                "`factors` to be numbers from 2 to 9",
                list(self.factors),
            ),
            (
                bool(scales) or self.factors == Synthetic.factors,
                "`factors` only beside the operations multiply or divide",
                list(self.factors),
            ),
            (self.style in STYLES, f"`style` to be one of {', '.join(STYLES)}", self.style),
            (
                0 <= self.distractors <= 1,
                "`distractors` to be a probability from 0 to 1",
                self.distractors,
            ),
        ]
        for holds, expected, found in checks:
            if not holds:
                raise KavaError(f"Expected {expected}, found {found}. Correct the setting.")

    def splits(
        self, train: int, validation: int, test: int, *, seed: int, traces: TraceForm = "equations"
    ) -> ProblemSplits:
        """Draw the three splits; equal arguments give equal problems on every machine.

        No question stands in two splits, and none in one split twice. Nor does a chain (start and
        operations) of a held-out problem occur in another split under other names. Test is drawn
        first, then validation, each from its own random stream, so that asking for more training
        problems leaves them as they were. KavaError if there are not that many different problems.
        """
        questions: set[bytes] = set()
        held_out: set[tuple[Step, ...]] = set()
        drawn = {}
        for split, count in (("test", test), ("validation", validation), ("train", train)):
            if count < 0:
                raise KavaError(f"Expected a number of {split} problems, found {count}.")
            rng = random.Random(f"{seed}-synthetic-{split}")
            chains: set[tuple[Step, ...]] = set()  # of what is held out: the others are too many
            problems = []
            for row in range(count):
                name = f"{self.name}-{split}-{row:06d}"
                problem, chain = self._new(rng, questions, held_out, name, traces)
                problems.append(problem)
                if split != "train":
                    chains.add(chain)
            held_out |= chains
            drawn[split] = problems
        return ProblemSplits(drawn["train"], drawn["validation"], drawn["test"])

    def _new(
        self,
        rng: random.Random,
        questions: set[bytes],
        held_out: set[tuple[Step, ...]],
        name: str,
        traces: TraceForm,
    ) -> tuple[Problem, tuple[Step, ...]]:
        # The length is drawn once, outside the retries: the share of each length stays even when
        # short problems, of which there are fewer, must be drawn again more often.
        length = rng.randint(*self.steps)
        for _ in range(_ATTEMPTS):
            chain = self._chain(rng, length)
            if chain is None or chain in held_out:
                continue
            problem = self._tell(rng, chain, name, traces)
            key = question_digest(problem.question)
            if key not in questions:
                questions.add(key)
                return problem, chain
        raise KavaError(
            f"Expected more different problems of {length} steps than these settings have: "
            f"{_ATTEMPTS} draws gave none that was new, after {len(questions)} problems. "
            "Ask for fewer problems, or raise `max_value`, `max_operand` or the number of steps."
        )

    def _chain(self, rng: random.Random, length: int) -> tuple[Step, ...] | None:
        """A start and `length` steps; None where a value leaves no operation to go on with."""
        value = rng.randint(1, self.max_value)
        steps = []
        for _ in range(length):
            choices = []
            for operation in self.operations:
                operands = self._operands(operation, value)
                if operands:
                    choices.append((operation, operands))
            if not choices:
                return None
            operation, operands = rng.choice(choices)
            right = rng.choice(operands)
            result = _APPLY[operation](value, right)
            steps.append(Step(operation, value, right, result))
            value = result
        return tuple(steps)

    def _operands(self, operation: str, value: int) -> range | list[int]:
        if operation == "add":
            return range(1, min(self.max_operand, self.max_value - value) + 1)
        if operation == "subtract":
            return range(1, min(self.max_operand, value - 1) + 1)
        if operation == "multiply":
            return [factor for factor in self.factors if value * factor <= self.max_value]
        return [factor for factor in self.factors if value % factor == 0]

    def _tell(
        self, rng: random.Random, chain: tuple[Step, ...], name: str, traces: TraceForm
    ) -> Problem:
        scenario: Scenario = rng.choice(SCENARIOS)
        wording: Wording = STYLES[self.style]
        teller = wording(rng, scenario)
        sentences = [teller.opening(chain[0].left)]
        sentences += [teller.event(step.operation, step.right) for step in chain]
        if rng.random() < self.distractors:
            aside = teller.aside(rng.randint(2, self.max_value))
            sentences.insert(rng.randint(1, len(sentences)), aside)
        sentences.append(teller.closing())
        if traces == "sentences":
            steps = [teller.result(step.expression, step.result) for step in chain]
        else:
            steps = equations_as([step.equation for step in chain], traces)
        return Problem(
            id=name,
            question=" ".join(sentences),
            steps=tuple(steps),
            answer=str(chain[-1].result),
            source=self.name,
            topic=scenario.name,
        )


_APPLY: dict[str, Callable[[int, int], int]] = {
    "add": lambda left, right: left + right,
    "subtract": lambda left, right: left - right,
    "multiply": lambda left, right: left * right,
    "divide": lambda left, right: left // right,
}
