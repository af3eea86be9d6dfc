"""From caches to targets."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import (
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from kava_core.eviction.policies import REGISTRY, Policy
from kava_core.eviction.policies.base import RotaryPhase, Selection
from kava_core.eviction.policies.rkv import RKV
from kava_core.settings.base import (
    Bits,
    EndpointBits,
    Half,
    NotNegative,
    Positive,
    Real,
    Section,
    check_half,
)
from kava_core.settings.choice import choice_of

BudgetShape = Literal["uniform", "pyramid"]
PolicyChoice = Annotated[Policy, *choice_of(REGISTRY)]


class LastLayers(Section):
    """The deepest n layers.

    last: how many.
    """

    last: Positive


class EveryLayer(Section):
    """Every n-th layer.

    every: one in so many.
    """

    every: Positive


def _one_layer_choice(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    try:
        return read(value)
    except ValidationError:  # which would speak of every form in turn
        raise ValueError(
            "should be `all`, {last: n}, {every: n} or a list of layer numbers from 0"
        ) from None


Layers = Annotated[
    Literal["all"]
    | LastLayers
    | EveryLayer
    | Annotated[tuple[NotNegative, ...], Field(min_length=1)],
    WrapValidator(_one_layer_choice),
]


class Selecting(Protocol):
    """A section that says who chooses, and how layers differ."""

    @property
    def select(self) -> Selection: ...
    @property
    def budget_shape(self) -> BudgetShape: ...
    @property
    def share(self) -> str: ...


def check_select(section: Selecting) -> None:
    """ValueError for settings of layers where one choice serves all of them."""
    if section.select == "record" and section.budget_shape != "uniform":
        raise ValueError("select: record chooses once for all layers: set budget_shape: uniform")
    if section.select == "record" and section.share == "selection":
        raise ValueError("share: selection means nothing at select: record, which all layers share")


class Evict(Section):
    """From N_C tokens to M slots per layer and head.

    policy: what is kept, by name or with its settings (`kava_core.eviction.policies`,
    docs/eviction.md, or another package's). budget: slots per layer and head, on average over the
    layers. budget_shape: the same in all layers, or a pyramid (M is the widest layer's). select:
    each layer and `head` chooses for itself, or the `record` once for all, so that a slot is one
    token everywhere. phase: keys are stored before or after the rotary embedding. layers: those
    whose caches are kept: all, the deepest n, every n-th, or their numbers. share: what
    `share_size` adjacent layers have in common: the tokens that they keep (`selection`) or one
    `merged` cache. share_size: layers of a group. keys_bits, values_bits, endpoint_bits: how
    targets are kept; 16 bits are the `half` dtype, 8 and 4 (8 for the endpoint) are codes. half:
    what 16 bits are. granularity: what has a range of codes to itself: a token, or in the whole
    store a `channel` or `tensor`. calibration_records: how many records a `channel` or `tensor`
    takes its range from. calibration_percentile: where that range is clipped, in per cent of the
    numbers. threads: CPU threads of a worker.
    """

    policy: PolicyChoice = RKV()
    budget: Positive
    budget_shape: BudgetShape = "uniform"
    select: Selection = "head"
    phase: RotaryPhase = "pre_rope"
    layers: Layers = "all"
    share: Literal["none", "selection", "merged"] = "none"
    share_size: Positive = 2
    keys_bits: Bits = 16
    values_bits: Bits = 16
    endpoint_bits: EndpointBits = 16
    half: Half = "bfloat16"
    granularity: Literal["token", "channel", "tensor"] = "token"
    calibration_records: Positive = 256
    calibration_percentile: Annotated[Real, Field(gt=50, le=100)] = 99.9
    threads: Positive = 1

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if self.share == "none" and self.changed("share_size"):
            raise ValueError("share_size means nothing where nothing is shared: set `share` too")
        ranges = self.changed("calibration_records", "calibration_percentile")
        if self.granularity == "token" and ranges:
            raise ValueError(
                f"{', '.join(ranges)}: means nothing at `granularity: token`, where every token "
                "has its own range. Set `granularity`, or leave it out"
            )
        check_select(self)
        check_half(self, {self.keys_bits, self.values_bits, self.endpoint_bits})
        return self
