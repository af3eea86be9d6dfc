"""Chains of thought that the teacher writes itself."""

from __future__ import annotations

from typing import Self

from pydantic import StrictInt, model_validator

from kava_core.settings.base import Dtype, Positive, Section, Weight


class Traces(Section):
    """The teacher's own chains of thought over the training problems, in place of the given ones.

    samples: how many are written for each problem; those that end in the right answer are kept,
    equal ones once. temperature: 0 writes the likeliest tokens, which make one chain; above it
    tokens are drawn. seed: decides what is drawn. max_new_tokens: a chain that has not ended by
    then is not kept. model_dtype: dtype of the teacher's weights. shard_size: problems of a part of
    the work; it changes what is drawn. batch_size: chains written at once; it changes what is
    drawn, too. threads: CPU threads of a worker.
    """

    samples: Positive = 1
    temperature: Weight = 0.0
    seed: StrictInt = 0
    max_new_tokens: Positive = 256
    model_dtype: Dtype = "float32"
    shard_size: Positive = 512
    batch_size: Positive = 64
    threads: Positive = 1

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        wrong = self.changed("samples", "seed")
        if self.temperature == 0 and wrong:
            raise ValueError(
                f"{', '.join(wrong)}: means nothing at `temperature: 0`, where every chain of a "
                "problem is the same. Set `temperature`, or leave it out"
            )
        return self
