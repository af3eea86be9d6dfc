"""Problems: where they come from and how they are split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, model_validator

from kava_core.settings.base import Fraction, Name, Positive, Real, Section

# Those of kava_core.problems.sources.
FileSourceName = Literal[
    "gsm8k", "gsm8k-aug", "gsm8k-aug-nl", "gsm-hard", "svamp", "metamath", "math", "table"
]


class Synthetic(Section):
    """Generated word problems (`kava_core.problems.synthetic.Generator`)."""

    steps: tuple[Positive, Positive] = (2, 4)
    operations: tuple[Literal["add", "subtract", "multiply", "divide"], ...] = (
        "add",
        "subtract",
        "multiply",
        "divide",
    )
    max_value: Positive = 99
    max_operand: Positive = 20
    factors: tuple[Positive, ...] = (2, 3)
    style: Literal["compact", "prose"] = "compact"
    distractors: Fraction = 0.0


class Columns(Section):
    """Which columns of a table are what; `steps` and `topic` may be missing."""

    question: str
    answer: str
    steps: str | None = None
    topic: str | None = None


class FileSource(Section):
    """Problems from files or from the Hub: docs/sources.md says what each source looks like.

    path: a file, a folder with train, validation and test files, or a Hub name. hub_config: the
    Hub's name for a part of a dataset; null: the source's own. columns, separator: of a `table`;
    the separator cuts a text into steps.
    """

    path: str | None = None
    hub_config: str | None = None
    columns: Columns | None = None
    separator: Annotated[str, Field(min_length=1)] = "\n"

    def _check_source(self, source: str) -> None:
        if self.path is None:
            raise ValueError(f"source {source} needs a `path`: a file, a folder or a Hub name")
        if (source == "table") != (self.columns is not None):
            raise ValueError("`columns` belongs to the source table, which needs it")


class TestSet(FileSource):
    """Further problems to ask; split null: `test`, or the only split there is."""

    __test__ = False  # no test of pytest's

    source: FileSourceName
    split: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> TestSet:
        self._check_source(self.source)
        return self


class Prepare(FileSource):
    """Problems: where they come from, how many, and how their steps are written.

    Sizes of null take all there is. drop_last_step: leave out the step that states the answer.
    latent_fraction: how much of a trace, in whole steps, latents stand for; students write the
    rest. max_*: what is longer is left out and counted; questions everywhere, traces in train and
    validation. deduplicate: leave out of train and validation what stands in a test set; without
    it such a question is an error, unless allow_leakage.
    """

    source: Literal["synthetic"] | FileSourceName
    traces: Literal["equations", "sentences"] = "equations"
    train: Positive | None = None
    validation: Positive
    test: Positive | None = None
    seed: StrictInt = 0
    synthetic: Synthetic = Synthetic()
    drop_last_step: StrictBool = False
    latent_fraction: Annotated[Real, Field(ge=0.2, le=1)] = 1.0
    max_steps: Positive | None = None
    max_question_characters: Positive | None = None
    max_trace_characters: Positive | None = None
    deduplicate: StrictBool = False
    allow_leakage: StrictBool = False
    test_sets: dict[Name, TestSet] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> Prepare:
        if self.deduplicate and self.allow_leakage:
            raise ValueError("deduplicate leaves nothing that allow_leakage could allow: set one")
        if self.test_sets.keys() & {self.source, "test"}:
            raise ValueError(
                f"test_sets must not be named test or {self.source}, the pipeline's own source"
            )
        if self.source != "synthetic":
            self._check_source(self.source)
            return self
        if self.train is None or self.test is None:
            raise ValueError("source synthetic needs the numbers `train` and `test`")
        foreign = (
            *FileSource.model_fields,
            "deduplicate",
            "drop_last_step",
            "max_steps",
            "max_question_characters",
            "max_trace_characters",
        )
        plain = Prepare.model_fields
        wrong = [name for name in foreign if getattr(self, name) != plain[name].default]
        if wrong:
            raise ValueError(f"source synthetic has no {', '.join(wrong)}")
        return self
