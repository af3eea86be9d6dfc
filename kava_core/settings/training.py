"""How weights are fitted, the teacher's and the students'."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, model_validator

from kava_core.settings.base import (
    Decay,
    Fraction,
    Positive,
    PositiveReal,
    Processes,
    Section,
    Weight,
)


class LoRA(Section):
    """Low-rank adapters on the named modules, the only weights of the decoder that are trained.

    rank: of the adapters' matrices. alpha: the adapters are scaled by alpha / rank. dropout: of
    what the adapters read. targets: the last part of modules' names. save: what is kept when
    training ends: `merged`, the weights with the adapters folded in; `adapter`, the adapters alone,
    in PEFT's format in the folder `adapter/`; or `both`.
    """

    rank: Positive = 128
    alpha: Positive = 32
    dropout: Fraction = 0.1
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    )
    save: Literal["merged", "adapter", "both"] = "merged"


class HeldOut(Section):
    """Records that are measured and never learnt from.

    records: how many, the last ones. every: steps from one measurement of the loss's terms to the
    next.
    """

    records: Positive
    every: Positive


class ExactMatch(Section):
    """Held-out records that are answered during training.

    records: how many, the first ones. every: steps from one asking to the next; they are asked
    after the last step too. max_new_tokens: most that may be written to answer one. keep: the
    weights that the training ends with, the `last`, or the `best`: those of the first step with the
    highest exact match.
    """

    records: Positive
    every: Positive
    max_new_tokens: Positive = 256
    keep: Literal["last", "best"] = "last"


class Training(Section):
    """How weights are fitted; AdamW with a cosine schedule (in a curriculum a constant one).

    steps or epochs: how long, in optimiser steps or in passes over the training records, one of the
    two; an epoch drops the records that fill no batch. batch_size: records of a forward pass.
    accumulation: passes of an optimiser step. learning_rate: AdamW's, at its highest. weight_decay:
    AdamW's. adam_beta2: decay of AdamW's second moment; short runs, whose gradients change in size
    within hundreds of steps, learn faster with 0.99. warmup: the share of the steps in which the
    rate rises. max_grad_norm: longer gradients are cut to this norm. precision: that of the
    arithmetic; weights and optimiser stay float32. gradient_checkpointing: compute activations
    again in the backward pass instead of keeping them, the same numbers in less memory and more
    time; not for students with latents, whose cache it would detach. lora: low-rank adapters; null:
    every weight is trained. held_out: evaluation during training; null: none. exact_match: answers
    during training, and which weights are kept; null: none. records: how many are learnt from, the
    first ones; null: all. seed: decides all that is drawn. threads: CPU threads; they change
    results by rounding.
    """

    steps: Positive | None = None
    epochs: Positive | None = None
    batch_size: Positive = 64
    accumulation: Positive = 1
    learning_rate: PositiveReal = 1e-3
    weight_decay: Weight = 0.01
    adam_beta2: Decay = 0.999
    warmup: Fraction = 0.05
    max_grad_norm: PositiveReal = 2.0
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: StrictBool = False
    lora: LoRA | None = None
    held_out: HeldOut | None = None
    # Not among the settings that a model says it was made with where there is none.
    exact_match: Annotated[ExactMatch | None, Field(exclude_if=lambda value: value is None)] = None
    # Likewise.
    records: Annotated[Positive | None, Field(exclude_if=lambda value: value is None)] = None
    seed: StrictInt = 0
    threads: Positive = 2

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            found = "neither" if self.steps is None else "both"
            raise ValueError(f"should have exactly one of `steps` and `epochs`, found {found}")
        return self

    @model_validator(mode="after")
    def _asks_what_it_never_learnt(self) -> Training:
        held_out = self.held_out.records if self.held_out else 0
        if self.exact_match is not None and self.exact_match.records > held_out:
            raise ValueError(
                f"exact_match.records: expected at most held_out.records, {held_out}, found "
                f"{self.exact_match.records}: held-out records are asked. Set `held_out` to as many"
            )
        return self

    def check_shared(self, processes: Processes) -> None:
        """ValueError if the processes cannot share every batch evenly."""
        if processes != "auto" and self.batch_size % processes:
            raise ValueError(
                f"training.batch_size {self.batch_size} must be a multiple of processes "
                f"{processes}, which share every batch"
            )

    @property
    def keeps_weights(self) -> bool:
        """Whether whole weights are what is kept, or a part of it; else adapters alone."""
        return self.lora is None or self.lora.save != "adapter"

    def taught(self, records: int) -> int:
        """How many of so many training records are learnt from."""
        left = records - (self.held_out.records if self.held_out else 0)
        return left if self.records is None else min(self.records, left)

    def steps_per_epoch(self, records: int) -> int:
        """Optimiser steps of a pass over `records` that are learnt from."""
        return -(-(records // self.batch_size) // self.accumulation)

    def total_steps(self, records: int) -> int:
        """Optimiser steps of the whole training on `records` that are learnt from."""
        if self.epochs is not None:
            return self.epochs * self.steps_per_epoch(records)
        assert self.steps is not None
        return self.steps
