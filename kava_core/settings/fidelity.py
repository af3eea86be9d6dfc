"""Answers from compressed caches."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from kava_core.eviction.policies.attention import Attention
from kava_core.eviction.policies.base import Selection
from kava_core.eviction.policies.crop import Crop
from kava_core.eviction.policies.random import Random
from kava_core.eviction.policies.redundancy import Redundancy
from kava_core.eviction.policies.rkv import RKV
from kava_core.eviction.policies.uniform import Uniform
from kava_core.eviction.policies.value_norm import ValueNorm
from kava_core.settings.base import Bits, Dtype, Half, Positive, Section, Weight, check_half
from kava_core.settings.evict import BudgetShape, Layers, PolicyChoice, check_select


class FidelityBits(Section):
    """Bits of keys and of values; one number stands for both.

    keys, values: their bits; one number in place of the mapping stands for both.
    """

    keys: Bits
    values: Bits

    @model_validator(mode="before")
    @classmethod
    def _both(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"keys": value, "values": value}

    @property
    def label(self) -> str:
        """`8`, or `8/4` where keys and values differ."""
        return str(self.keys) if self.keys == self.values else f"{self.keys}/{self.values}"


class Fidelity(Section):
    """The teacher answers held-out problems from its compressed cache, for a grid of settings:
    every policy with every budget and every bit width.

    split: whose problems are asked. limit: how many of them; null: all. policies, budgets, bits:
    the grid, each as in `evict`. budget_shape, select, half, layers, share, share_size: as in
    `evict`, for the whole grid. within: how many points of exact match below the full cache the
    recommended budget may lie. batch_size: problems asked at once. max_new_tokens: most that may be
    written to answer one. model_dtype: dtype of the teacher's weights. threads: CPU threads of a
    worker.
    """

    split: Literal["validation", "test"] = "validation"
    limit: Positive | None = 200
    policies: tuple[PolicyChoice, ...] = (
        RKV(),
        Attention(),
        Redundancy(),
        Crop(),
        Uniform(),
        Random(),
        ValueNorm(),
    )
    budgets: tuple[Positive, ...] = (2, 4, 8, 16, 24, 32, 64, 128, 256)
    budget_shape: BudgetShape = "uniform"
    select: Selection = "head"
    bits: tuple[FidelityBits, ...] = tuple(FidelityBits(keys=n, values=n) for n in (16, 8, 4))
    half: Half = "bfloat16"
    layers: Layers = "all"
    share: Literal["none", "selection", "merged"] = "none"
    share_size: Positive = 2
    within: Weight = 2.0
    batch_size: Positive = 64
    max_new_tokens: Positive = 32
    model_dtype: Dtype = "float32"
    threads: Positive = 1

    @model_validator(mode="after")
    def _each_once(self) -> Fidelity:
        for name, found in (
            ("policies", [policy.label for policy in self.policies]),
            ("budgets", list(self.budgets)),
            ("bits", [bits.label for bits in self.bits]),
        ):
            if not found or len(found) != len(set(found)):
                raise ValueError(f"{name} must name at least one, and none twice")
        if self.share == "none" and self.changed("share_size"):
            raise ValueError("share_size means nothing where nothing is shared: set `share` too")
        check_select(self)
        check_half(self, {n for bits in self.bits for n in (bits.keys, bits.values)})
        return self
