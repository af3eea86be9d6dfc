"""The students."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    StrictBool,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from kava_core.settings.base import NotNegative, Positive, Section, Weight
from kava_core.settings.training import Training

Distance = Literal["l1", "smooth_l1", "mse"]


def _one_layer_map(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    try:
        return read(value)
    except ValidationError:
        raise ValueError(
            "should be `uniform` or a list: one of the teacher's layers, numbered from 0, for each "
            "of the student's"
        ) from None


LayerMap = Annotated[
    Literal["uniform"] | Annotated[tuple[NotNegative, ...], Field(min_length=1)],
    WrapValidator(_one_layer_map),
]


class Student(Section):
    """One student: how it reasons, what it is taught by, and how long.

    targets: `store` reads them from kv_targets, the teacher is not even loaded but for its weights;
    `online` makes them anew in every step with the frozen teacher, by the store's settings, and
    takes token ids and statistics from the store only. processes: how many share each batch, on
    this machine or the Ray cluster that RAY_ADDRESS names; it changes results by rounding.

    model: the Hugging Face folder or id it starts from; null: the teacher itself. Another model
    learns K/V projectors into the teacher's basis beside it. layer_map: which layer of the teacher
    teaches each of the student's. fake_quantise: keys and values pass through the store's codes
    before they are compared. docs/methods.md has a snippet for each method.
    """

    training: Training
    model: str | None = None
    layer_map: LayerMap = "uniform"
    targets: Literal["store", "online"] = "store"
    processes: Positive = 1
    reasoning: Literal["jacobi", "sequential", "none"] = "jacobi"
    iterations: NotNegative = 3
    projection: StrictBool = True
    per_position: StrictBool = True
    alpha_kv: Weight = 0.0
    alpha_codi: Weight = 0.0
    w_cot: Weight = 0.0
    kv_distance: Distance = "smooth_l1"
    kv_std: StrictBool = True
    fake_quantise: StrictBool = False
    codi_distance: Distance = "smooth_l1"
    codi_std: StrictBool = True
    shard_window: Positive = 16
    gradient_share_every: NotNegative = 0

    @model_validator(mode="after")
    def _has_latents(self) -> Student:
        if self.reasoning == "none" and (self.alpha_kv or self.alpha_codi):
            raise ValueError(
                "a student with `reasoning: none` reads no targets: alpha_kv, alpha_codi must be 0"
            )
        if self.reasoning == "none" and self.targets == "online":
            raise ValueError("a student with `reasoning: none` reads no targets: remove `targets`")
        if self.fake_quantise and not self.alpha_kv:
            raise ValueError(
                "fake_quantise changes the KV term alone, and alpha_kv is 0: set one or the other"
            )
        if self.layer_map != "uniform" and not (self.alpha_kv or self.alpha_codi):
            raise ValueError(
                "layer_map says what is compared, and alpha_kv and alpha_codi are 0: set one or "
                "leave layer_map out"
            )
        return self

    @model_validator(mode="after")
    def _divisible(self) -> Student:
        if self.training.batch_size % self.processes:
            raise ValueError(
                f"training.batch_size {self.training.batch_size} must be a multiple of processes "
                f"{self.processes}, which share every batch"
            )
        return self
