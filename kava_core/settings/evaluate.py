"""Accuracy and cost, and the page at the end."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from kava_core.settings.base import Dtype, Name, NotNegative, Positive, Section


class Evaluate(Section):
    """Accuracy and cost of every system on the first `limit` problems of each test set.

    split: `test`, or `validation` for the validation problems in place of all test sets, which are
    then not looked at. limit: null asks all of them. batch_size: peak memory is that of one batch.
    interpret_records: test problems over which latents are looked into; intervention_problems:
    those that are asked again with latents changed. 0 turns either off; without records there is
    neither. model_dtype: of the systems' weights. others: students from elsewhere that are asked as
    well, name → folder (docs/students.md), each with its own tokenizer and prompt.
    """

    split: Literal["validation", "test"] = "test"
    limit: Positive | None = None
    batch_size: Positive = 128
    max_new_tokens: Positive = 256
    similarity_records: Positive = 256
    interpret_records: NotNegative = 64
    intervention_problems: NotNegative = 200
    model_dtype: Dtype = "float32"
    threads: Positive = 2
    others: dict[Name, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _means_something(self) -> Evaluate:
        if not self.interpret_records and self.changed("intervention_problems"):
            raise ValueError(
                "intervention_problems: means nothing where interpret_records is 0. Leave it out"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_nobody(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Where nobody else is asked, nothing says so."""
        written: dict[str, Any] = write(self)
        return written if self.others else {k: v for k, v in written.items() if k != "others"}


class Report(Section):
    """The page at the end."""

    title: str
