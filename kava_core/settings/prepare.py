"""Problems: where they come from and how they are split."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, StrictBool, StrictInt, model_validator

from kava_core.problems.bad import OnBadRecord
from kava_core.problems.prompt import PLAIN, Prompt
from kava_core.problems.records import TraceForm
from kava_core.problems.sources import (
    REGISTRY,
    GeneratedSource,
    Source,
)
from kava_core.settings.base import Name, Positive, Section
from kava_core.settings.choice import choice_of

SourceChoice = Annotated[Source, *choice_of(REGISTRY)]


class TestSet(Section):
    """Further problems to ask, beside the pipeline's own.

    source, path, hub_config, revision: as in `prepare`. split: which one of a dataset; null:
    `test`, or the only split there is. size: how many are drawn, by the pipeline's seed, of a
    source that draws its problems.
    """

    __test__ = False  # no test of pytest's

    source: SourceChoice
    path: str | None = None
    hub_config: str | None = None
    revision: str | None = None
    split: str | None = None
    # Not among the settings that test sets say they were made with where nothing is drawn.
    size: Annotated[Positive | None, Field(exclude_if=lambda value: value is None)] = None

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        name = self.source.name
        if isinstance(self.source, GeneratedSource):
            if self.size is None:
                raise ValueError(f"source {name} needs the number `size`")
            if foreign := self.changed("path", "hub_config", "revision", "split"):
                raise ValueError(f"source {name} has no {', '.join(foreign)}")
        elif self.path is None:
            raise ValueError(f"source {name} needs a `path`: a file, a folder or a Hub name")
        elif self.size is not None:
            raise ValueError(f"size: source {name} draws no problems. Leave it out")
        return self


class Prepare(Section):
    """Problems: where they come from, how many, and how their steps are written.

    source: what the problems look like, by name or with its settings (`kava_core.problems.sources`,
    docs/sources.md). path: a file, a folder with train, validation and test files, or a Hub name.
    hub_config: the Hub's name for a part of a dataset; null: the source's own. revision: the
    version of a dataset on the Hub; null: its newest. traces: how a step is written, in a form that
    the source has. prompt: how a problem is put to teacher and students
    (`kava_core.problems.prompt`, docs/prompts.md). train, validation, test: how many problems;
    null: all there are. seed: decides what is drawn. drop_last_step: leave out the step that states
    the answer. max_steps, max_trace_characters, max_trace_tokens: longer traces are left out of
    train and validation, and counted. max_question_characters, max_question_tokens: longer
    questions are left out everywhere, and counted. tokenizer: the teacher's, a Hugging Face folder
    or id, which tokens are counted with, and which must be able to write every record.
    tokenizer_revision: of a tokenizer on the Hub; null: its newest. on_bad_record: what is
    malformed, or cannot be written, is an error that names all of it (`fail`), or is left out and
    counted (`drop`). deduplicate: leave out of train and validation what stands in a test set.
    allow_leakage: let it stand in both, which is an error otherwise. test_sets: further problems to
    ask, by a name of your own.
    """

    source: SourceChoice
    path: str | None = None
    hub_config: str | None = None
    revision: str | None = None
    traces: TraceForm = "equations"
    prompt: Prompt = PLAIN
    train: Positive | None = None
    validation: Positive
    test: Positive | None = None
    seed: StrictInt = 0
    drop_last_step: StrictBool = False
    max_steps: Positive | None = None
    max_question_characters: Positive | None = None
    max_trace_characters: Positive | None = None
    tokenizer: str | None = None
    tokenizer_revision: str | None = None
    max_question_tokens: Positive | None = None
    max_trace_tokens: Positive | None = None
    on_bad_record: OnBadRecord = "fail"
    deduplicate: StrictBool = False
    allow_leakage: StrictBool = False
    test_sets: dict[Name, TestSet] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        name = self.source.name
        if self.deduplicate and self.allow_leakage:
            raise ValueError("deduplicate leaves nothing that allow_leakage could allow: set one")
        if self.test_sets.keys() & {name, "train", "validation", "test"}:
            raise ValueError(
                f"test_sets must not be named train, validation, test or {name}, the pipeline's "
                "own source"
            )
        counted = self.changed("tokenizer_revision", "max_question_tokens", "max_trace_tokens")
        if counted and self.tokenizer is None and not isinstance(self.source, GeneratedSource):
            raise ValueError(
                f"{', '.join(counted)}: which tokens? Set `tokenizer` to the teacher's model"
            )
        if not isinstance(self.source, GeneratedSource):
            if self.path is None:
                raise ValueError(f"source {name} needs a `path`: a file, a folder or a Hub name")
            return self
        if self.train is None or self.test is None:
            raise ValueError(f"source {name} needs the numbers `train` and `test`")
        foreign = self.changed(
            "path",
            "hub_config",
            "revision",
            "deduplicate",
            "drop_last_step",
            "max_steps",
            "max_question_characters",
            "max_trace_characters",
            "tokenizer",
            "tokenizer_revision",
            "max_question_tokens",
            "max_trace_tokens",
            *(() if self.test_sets else ("on_bad_record",)),
        )
        if foreign:
            raise ValueError(f"source {name} has no {', '.join(foreign)}")
        return self
