"""How weights are fitted, the teacher's and the students'."""

from __future__ import annotations

from typing import Literal

from pydantic import StrictInt

from kava_core.settings.base import Decay, Fraction, Positive, PositiveReal, Section, Weight


class LoRA(Section):
    """Low-rank adapters on the named projections; merged into the weights when training ends."""

    rank: Positive = 128
    alpha: Positive = 32
    dropout: Fraction = 0.1
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


class HeldOut(Section):
    """The last `records` training records are never trained on; every `every` steps the terms of
    the loss are measured on them."""

    records: Positive
    every: Positive


class Training(Section):
    """How weights are fitted; AdamW with a cosine schedule.

    adam_beta2: decay of AdamW's second moment; short runs, whose gradients change in size within
    hundreds of steps, learn faster with 0.99. held_out: evaluation during training; null: none.
    """

    steps: Positive
    batch_size: Positive = 64
    accumulation: Positive = 1
    learning_rate: PositiveReal = 1e-3
    weight_decay: Weight = 0.01
    adam_beta2: Decay = 0.999
    warmup: Fraction = 0.05
    max_grad_norm: PositiveReal = 2.0
    precision: Literal["float32", "bfloat16"] = "float32"
    lora: LoRA | None = None
    held_out: HeldOut | None = None
    seed: StrictInt = 0
    threads: Positive = 2
