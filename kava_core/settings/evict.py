"""From caches to targets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from kava_core.settings.base import (
    Bits,
    EndpointBits,
    Fraction,
    Half,
    NotNegative,
    Positive,
    Real,
    Section,
)

Phase = Literal["pre_rope", "post_rope"]


# Those of kava_core.eviction, which takes seconds to import.
Policy = Literal[
    "rkv",
    "attention",
    "redundancy",
    "crop",
    "uniform",
    "random",
    "key_norm",
    "value_norm",
    "streaming",
]


class LastLayers(Section):
    """The deepest n layers."""

    last: Positive


class EveryLayer(Section):
    """Every n-th layer."""

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


class Evict(Section):
    """From N_C tokens to `budget` slots per layer and head.

    lambda, redundancy_phase, first and seed belong to the policies that have them; null takes the
    policy's own default. share: `share_size` adjacent layers keep the same tokens (`selection`) or
    one merged cache (`merged`). granularity `channel` and `tensor` take their ranges from
    `calibration_records` records, clipped to `calibration_percentile` per cent of the numbers.
    """

    policy: Policy = "rkv"
    budget: Positive
    budgets: Literal["uniform", "pyramid"] = "uniform"
    lambda_: Fraction | None = Field(default=None, alias="lambda")
    redundancy_phase: Phase | None = None
    first: NotNegative | None = None
    seed: StrictInt | None = None
    phase: Phase = "pre_rope"
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
