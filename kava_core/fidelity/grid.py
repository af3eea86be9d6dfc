"""Every kind of cache that the teacher answers from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kava_core.eviction import Policy, make_budgets
from kava_core.eviction.budgets import BudgetShape
from kava_core.fidelity.examiner import Layers
from kava_core.store import Codec


@dataclass(frozen=True)
class Cell:
    """One kind of cache: `full`, `none`, or a policy with a budget and bits."""

    policy: str
    budget: int | None = None
    keys_bits: int | None = None
    values_bits: int | None = None

    @property
    def bits(self) -> str:
        """`8`, or `8/4` where keys and values differ."""
        if self.keys_bits == self.values_bits:
            return str(self.keys_bits)
        return f"{self.keys_bits}/{self.values_bits}"

    @property
    def series(self) -> str:
        """What cells that differ in nothing but the budget have in common."""
        return self.policy if self.budget is None else f"{self.policy}, {self.bits} bits"


@dataclass(frozen=True)
class Grid:
    """All cells against the teacher's layers.

    policies: by label; budgets: M → slots per layer, or per group of layers that share; codecs: by
    the bits of keys and values.
    """

    cells: list[Cell]
    policies: Mapping[str, Policy]
    layers: Layers
    budgets: Mapping[int, list[int]]
    codecs: Mapping[tuple[int, int], Codec]

    @classmethod
    def of(
        cls,
        policies: Sequence[Policy],
        budgets: Sequence[int],
        bits: Sequence[tuple[int, int]],
        layers: Layers,
        *,
        budget_shape: BudgetShape,
        half: str,
    ) -> Grid:
        """Every policy with every budget, ascending, and all bits (of keys, of values), descending.

        half: the dtype of 16 bits. KavaError names what cannot be met.
        """
        ascending = sorted(budgets)
        descending = sorted(bits, key=lambda pair: (-sum(pair), pair))
        by_label = {policy.label: policy for policy in policies}
        return cls(
            cells=[
                Cell("full"),
                Cell("none"),
                *(
                    Cell(policy, budget, *pair)
                    for policy in by_label
                    for budget in ascending
                    for pair in descending
                ),
            ],
            policies=by_label,
            layers=layers,
            budgets={m: make_budgets(budget_shape, len(layers.groups), m) for m in ascending},
            codecs={
                (keys, values): Codec.from_bits(keys=keys, values=values, half=half)
                for keys, values in descending
            },
        )
