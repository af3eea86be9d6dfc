"""The words of the synthetic problems: scenarios, and the two styles that tell a chain in them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, Protocol

Style = Literal["compact", "prose"]


@dataclass(frozen=True)
class Scenario:
    """A topic: the things counted (one, many) and what makes them more or fewer in prose.

    `more` and `fewer` are predicates with the number as `{n}`; `place` begins a sentence about
    where it happens.
    """

    name: str
    things: tuple[tuple[str, str], ...]
    more: tuple[str, ...]
    fewer: tuple[str, ...]
    place: str


SCENARIOS = (
    Scenario(
        "shop",
        (("apple", "apples"), ("lamp", "lamps")),
        ("buys {n} more", "takes in {n} more from a supplier", "finds {n} more in the back room"),
        ("sells {n} of them", "throws away {n} broken ones", "sends {n} back to the supplier"),
        "The shop",
    ),
    Scenario(
        "garden",
        (("rose", "roses"), ("seed", "seeds")),
        ("plants {n} more", "gets {n} more from a neighbour", "brings {n} more from the nursery"),
        ("loses {n} to the frost", "digs up {n} of them", "gives {n} of them to a neighbour"),
        "The garden",
    ),
    Scenario(
        "school",
        (("pencil", "pencils"), ("sticker", "stickers")),
        ("wins {n} more", "gets {n} more from the teacher", "picks up {n} more in the hall"),
        ("lends {n} to a classmate", "uses up {n} of them", "loses {n} on the way home"),
        "The school",
    ),
    Scenario(
        "farm",
        (("egg", "eggs"), ("pear", "pears")),
        ("collects {n} more", "adds {n} more from the barn", "receives {n} more from an uncle"),
        ("sells {n} at the market", "drops and breaks {n} of them", "eats {n} of them"),
        "The farm",
    ),
    Scenario(
        "savings",
        (("coin", "coins"), ("ticket", "tickets")),
        ("earns {n} more", "is given {n} more by an aunt", "finds {n} more in a drawer"),
        ("spends {n} of them", "pays {n} for a snack", "puts {n} in a charity box"),
        "The bank",
    ),
    Scenario(
        "library",
        (("book", "books"), ("card", "cards")),
        ("borrows {n} more", "orders {n} more", "is handed {n} more by a friend"),
        ("returns {n} of them", "trades away {n} of them", "gives {n} to a younger child"),
        "The library",
    ),
)

_PEOPLE = (
    ("Ian", "he", "his"),
    ("Mia", "she", "her"),
    ("Tom", "he", "his"),
    ("Ada", "she", "her"),
    ("Leo", "he", "his"),
    ("Eva", "she", "her"),
    ("Sam", "he", "his"),
    ("Zoe", "she", "her"),
)
_TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times", 6: "six times"} | {
    7: "seven times",
    8: "eight times",
    9: "nine times",
}
_PART = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 6: "a sixth", 7: "a seventh"} | {
    8: "an eighth",
    9: "a ninth",
}


class Teller(Protocol):
    """Tells one problem: the sentences of its question, and of its trace."""

    def opening(self, start: int) -> str: ...
    def event(self, operation: str, operand: int) -> str: ...
    def aside(self, number: int) -> str: ...
    def closing(self) -> str: ...
    def result(self, expression: str, value: int) -> str: ...


class Wording(Protocol):
    """Makes the teller of a problem: chooses its person and its things."""

    def __call__(self, rng: random.Random, scenario: Scenario) -> Teller: ...


_COMPACT_EVENTS = {
    "add": ("gets {n} extra .", "finds {n} ."),
    "subtract": ("sells {n} .", "gives {n} away ."),
    "multiply": ("makes it {n} times as many .",),
    "divide": ("keeps 1 part in {n} .",),
}
_COMPACT_BY_FACTOR = {
    ("multiply", 2): ("doubles them .",),
    ("multiply", 3): ("triples them .",),
    ("divide", 2): ("keeps half of them .",),
    ("divide", 3): ("keeps a third of them .",),
}


class CompactTeller:
    """Lower-case clauses of few different words: "sells 9 ." """

    def __init__(self, rng: random.Random, scenario: Scenario) -> None:
        self._rng = rng
        self._name = rng.choice(_PEOPLE)[0].lower()
        self._many = rng.choice(scenario.things)[1]

    def opening(self, start: int) -> str:
        return f"{self._name} has {start} {self._many} ."

    def event(self, operation: str, operand: int) -> str:
        forms = _COMPACT_BY_FACTOR.get((operation, operand), _COMPACT_EVENTS[operation])
        return self._rng.choice(forms).format(n=operand)

    def aside(self, number: int) -> str:
        return self._rng.choice(("it is day {n} .", "a bag costs {n} .")).format(n=number)

    def closing(self) -> str:
        return self._rng.choice(("how many now ?", "how many are there ?"))

    def result(self, expression: str, value: int) -> str:
        return f"{self._name} has {expression} = {value} {self._many} ."


class ProseTeller:
    """Ordinary sentences with varied subjects, links and verbs."""

    def __init__(self, rng: random.Random, scenario: Scenario) -> None:
        self._rng = rng
        self._scenario = scenario
        self._name, self._they, self._their = rng.choice(_PEOPLE)
        self._one, self._many = rng.choice(scenario.things)
        # Chosen here even where no sentence is asked for, so that a seed gives the same questions
        # whatever the form of the traces.
        self._has = rng.choice(("has", "now has"))

    def _things(self, count: int) -> str:
        return self._one if count == 1 else self._many

    def opening(self, start: int) -> str:
        amount = f"{start} {self._things(start)}"
        return self._rng.choice(
            (
                f"{self._name} has {amount}.",
                f"{self._name} starts the week with {amount}.",
                f"At first, {self._name} has {amount}.",
                f"On Monday {self._name} counts {amount}.",
            )
        )

    def event(self, operation: str, operand: int) -> str:
        link = self._rng.choice(("", "Then ", "Next, ", "After that, ", "Later, "))
        subject = self._rng.choice((self._name, self._they, self._they))
        sentence = f"{link}{subject} {self._predicate(operation, operand)}."
        return sentence[0].upper() + sentence[1:]

    def _predicate(self, operation: str, operand: int) -> str:
        many = self._many
        if operation == "add":
            return self._rng.choice(self._scenario.more).format(n=operand)
        if operation == "subtract":
            return self._rng.choice(self._scenario.fewer).format(n=operand)
        if operation == "multiply":
            forms = [
                f"manages to have {_TIMES[operand]} as many {many}",
                f"ends the day with {_TIMES[operand]} as many as before",
            ]
            forms += {
                2: [f"doubles {self._their} number of {many}"],
                3: [f"triples {self._their} number of {many}"],
            }.get(operand, [])
            return self._rng.choice(forms)
        forms = [
            f"keeps only {_PART[operand]} of the {many}",
            f"splits the {many} into {operand} equal piles and keeps one pile",
        ]
        if operand == 2:
            forms.append("gives half of them away")
        return self._rng.choice(forms)

    def aside(self, number: int) -> str:
        they = self._their.capitalize()
        return self._rng.choice(
            (
                f"{they} cousin is {number} years old.",
                f"{self._scenario.place} is {number} minutes away on foot.",
                f"{they} house has the number {number}.",
            )
        )

    def closing(self) -> str:
        return self._rng.choice(
            (
                f"How many {self._many} does {self._name} have now?",
                f"How many {self._many} does {self._name} have in the end?",
                f"What number of {self._many} does {self._name} end up with?",
            )
        )

    def result(self, expression: str, value: int) -> str:
        return f"{self._name} {self._has} {expression} = {value} {self._things(value)}."


STYLES: dict[str, Wording] = {"compact": CompactTeller, "prose": ProseTeller}
