"""The teacher."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictInt, model_validator

from kava_core.settings.base import Dtype, Positive, PositiveReal, Processes, Real, Section
from kava_core.settings.training import Training


class Scratch(Section):
    """A byte-level BPE tokenizer and a small Llama, both made from the training problems.

    vocabulary: most tokens of the tokenizer. hidden_size, layers, heads, kv_heads,
    intermediate_size: the Llama's shape. context_length: positions that it may attend over.
    rope_theta: base of its rotary frequencies.
    """

    vocabulary: Annotated[StrictInt, Field(ge=270)] = 512
    hidden_size: Positive = 128
    layers: Positive = 2
    heads: Positive = 4
    kv_heads: Positive = 2
    intermediate_size: Positive = 384
    context_length: Positive = 512
    rope_theta: PositiveReal = 10000.0

    @model_validator(mode="after")
    def _divisible(self) -> Scratch:
        if self.hidden_size % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be an even multiple of heads {self.heads}, "
                f"and that a multiple of kv_heads {self.kv_heads}"
            )
        return self


class Forgets(Section):
    """A teacher that does without what is evicted.

    keeps: what it sees of earlier steps where it forgets: the tokens of their `results`, or the
    last token of each (`steps`). share: the part of its training records, drawn anew each time, in
    which it forgets.
    """

    keeps: Literal["results", "steps"]
    share: Annotated[Real, Field(gt=0, le=1)] = 0.5


class Teacher(Section):
    """The model whose caches are compressed.

    model: `scratch` builds one; anything else is a Hugging Face folder or id to start from.
    revision: of a model on the Hub; null: its newest. scratch: what is built. training: null takes
    the model as it is (it can already write the chain of thought). processes: how many share each
    batch of the training, as a student's; `auto`: as many as there are GPUs. forgets: teaches it to
    do without tokens that are evicted; null: it always sees all. validate_on: how many validation
    problems it is asked when it has learnt. batch_size: problems asked at once. max_new_tokens:
    most that it may write to answer one. model_dtype: dtype of the weights while validation
    problems are asked.
    """

    model: str = "scratch"
    revision: str | None = None
    scratch: Scratch = Scratch()
    training: Training | None
    processes: Processes = 1
    # Not among the settings that a teacher says it was made with where it sees all.
    forgets: Annotated[Forgets | None, Field(exclude_if=lambda value: value is None)] = None
    validate_on: Positive = 200
    batch_size: Positive = 128
    max_new_tokens: Positive = 256
    # Not among the settings that a teacher says it was made with where it is the usual one.
    model_dtype: Annotated[Dtype, Field(exclude_if=lambda value: value == "float32")] = "float32"

    @model_validator(mode="after")
    def _trained(self) -> Teacher:
        if self.model == "scratch" and self.training is None:
            raise ValueError("a teacher from scratch needs `training`")
        if self.model == "scratch" and self.revision is not None:
            raise ValueError("revision belongs to a `model` on the Hub: leave it out")
        if self.model != "scratch" and self.changed("scratch"):
            raise ValueError(
                "scratch describes a model that is built, and `model` names one: leave it out"
            )
        if self.training is not None:
            self.training.check_shared(self.processes)
        elif wrong := self.changed("processes", "forgets"):
            raise ValueError(f"{wrong[0]}: means nothing at `training: null`. Leave it out")
        lora = self.training.lora if self.training else None
        if lora is not None and self.model == "scratch":
            raise ValueError(
                "training.lora: adapters change a model that has learnt something, and a model "
                "from scratch is random: leave it out, or name a `model`"
            )
        return self
