"""Accuracy and cost, and the page at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kava_core.settings.base import Dtype, Name, NotNegative, Positive, Section
from kava_core.settings.student import Student

TEACHERS = (TEACHER_COT, TEACHER_NO_COT) = ("teacher-cot", "teacher-no-cot")


def writer_of(student: str) -> str:
    """What a student is called that writes its chain of thought in place of thinking it."""
    return f"{student}-cot"


class Evaluate(Section):
    """Accuracy and cost of every system on each test set.

    split: `test`, or `validation` for the validation problems in place of all test sets, which are
    then not looked at. limit: the first so many problems of each set; null: all. batch_size:
    problems asked at once; peak memory is that of one batch. max_new_tokens: most that may be
    written to answer one. similarity_records: how many records of the store latents are compared
    with. interpret_records: test problems over which latents are looked into; 0: none.
    intervention_problems: those that are asked again with latents changed; 0: none, and none
    without `interpret_records`. model_dtype: dtype of the systems' weights. threads: CPU threads of
    a worker. others: students from elsewhere that are asked as well, name → folder
    (docs/students.md), each with its own tokenizer and prompt. write_steps: students with `w_cot`
    that are asked a second time, writing their chain of thought, each as a system NAME-cot.
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
    # Neither is among the settings that an evaluation was made with where there is nobody.
    others: Annotated[dict[Name, str], Field(exclude_if=lambda value: not value)] = Field(
        default_factory=dict
    )
    write_steps: Annotated[tuple[Name, ...], Field(exclude_if=lambda value: not value)] = ()

    @model_validator(mode="after")
    def _means_something(self) -> Evaluate:
        if not self.interpret_records and self.changed("intervention_problems"):
            raise ValueError(
                "intervention_problems: means nothing where interpret_records is 0. Leave it out"
            )
        if len(set(self.write_steps)) < len(self.write_steps):
            raise ValueError("write_steps must name none twice")
        return self

    def check_systems(self, students: Mapping[str, Student]) -> None:
        """ValueError if two systems would be called alike, or one is to write its chain of thought
        that is no student, or never learns to."""
        for name in self.write_steps:
            if name not in students:
                raise ValueError(
                    f"evaluate.write_steps: there is no student {name}. There are: "
                    f"{', '.join(students)}"
                )
            if not students[name].taught("w_cot"):
                raise ValueError(
                    f"evaluate.write_steps: student {name} never learns to write its chain of "
                    f"thought. Set students.{name}.w_cot above 0, or leave it out"
                )
            if (writer := writer_of(name)) in {*students, *TEACHERS}:
                raise ValueError(
                    f"evaluate.write_steps: {name} would be called {writer} as it writes, and "
                    "another system is called so. Rename one"
                )
        own = {*students, *TEACHERS, *map(writer_of, self.write_steps)}
        if taken := self.others.keys() & own:
            raise ValueError(
                f"evaluate.others.{min(taken)}: a system of this pipeline is called so. Rename it"
            )


class Report(Section):
    """The page at the end.

    title: stands above the page.
    """

    title: str
