"""Studies: pipelines run many times over, with other seeds and other settings."""

from __future__ import annotations

import re
from collections.abc import KeysView
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue, StrictInt, ValidationError, model_validator

from kava_core.errors import KavaError
from kava_core.settings.base import NAME, Name, NotNegative, Section
from kava_core.settings.pipeline import explain, read_document

# The sections of a pipeline that decide what a study finds, and two settings of another.
DECISIVE = ("prepare", "teacher", "traces", "generate", "evict", "students")
ASKING = ("evaluate.limit", "evaluate.max_new_tokens")


class Study(Section):
    """A named study of `studies:` in pipelines.yaml: students × seeds × settings of one pipeline.

    pipeline: whose settings it starts from. students: those that are trained; null: all of the
    pipeline's. seeds: each in turn is every student's `training.seed`. reseed: `all` gives it to
    the teacher too. split: whose problems are asked; settings are chosen on validation problems.
    test_sets: those of `prepare.test_sets` that are asked beside the own one. interventions: the
    first so many problems that every student with latents is asked again with its latents changed;
    0: none. fidelity: the first so many validation problems that the teacher answers from the slots
    of every store that a student is taught from; 0: none. baseline: the student with which the
    others are compared; null: none are. settings: dotted key of the pipeline → another value, for
    the whole study; what is not there yet is made, so a student can be added. grid: dotted key →
    values, crossed with each other. together: mappings of the same dotted keys to values, for
    settings that change together; each is crossed with the grid. `students.*.KEY` is the key of
    every student of the study.
    """

    pipeline: Name
    students: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    seeds: Annotated[tuple[StrictInt, ...], Field(min_length=1)]
    reseed: Literal["students", "all"] = "students"
    split: Literal["validation", "test"] = "validation"
    test_sets: tuple[Name, ...] = ()
    interventions: NotNegative = 0
    fidelity: NotNegative = 0
    baseline: Name | None = None
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    grid: dict[str, Annotated[list[JsonValue], Field(min_length=1)]] = Field(default_factory=dict)
    together: tuple[dict[str, JsonValue], ...] = ()

    @property
    def _together(self) -> KeysView[str]:
        """The keys of `together`."""
        return (self.together or ({},))[0].keys()

    @model_validator(mode="after")
    def _means_something(self) -> Study:
        for setting, named in (
            ("students", self.students or ()),
            ("seeds", self.seeds),
            ("test_sets", self.test_sets),
        ):
            if len(set(named)) < len(named):
                raise ValueError(f"{setting}: each counts once. Name it once")
        if self.test_sets and self.split != "test":
            raise ValueError("test_sets: are asked in a study of `split: test`. Set it")
        for key, values in self.grid.items():
            if any(value in values[:i] for i, value in enumerate(values)):
                raise ValueError(f"grid: {key} has a value twice. Name it once")
        if self.together:
            first = self.together[0].keys()
            if len(first) < 2 or any(each.keys() != first for each in self.together):
                raise ValueError(
                    "together: expected the same keys in every one, two or more. Name a value of "
                    "each in all; the values of a single key belong in grid"
                )
            if any(each in self.together[:i] for i, each in enumerate(self.together)):
                raise ValueError("together: one stands there twice. Leave one out")
        where = {"settings": {*self.settings}, "grid": {*self.grid}, "together": {*self._together}}
        for one, other in combinations(where, 2):
            if both := sorted(where[one] & where[other]):
                raise ValueError(f"{both[0]} stands in both {one} and {other}. Leave one out")
        for key in (*self.settings, *self.grid, *self._together):
            section, _, rest = key.partition(".")
            if key not in ASKING and (section not in DECISIVE or not rest):
                raise ValueError(
                    f"{key} should be a dotted key below {', '.join(DECISIVE)}, or one of "
                    f"{', '.join(ASKING)}: the others change nothing that a study finds"
                )
            if section == "students" and key.endswith(".training.seed"):
                raise ValueError(f"{key}: the seeds are those of `seeds`. Leave it out")
        return self

    @model_validator(mode="after")
    def _said_once(self) -> Study:
        keys = (*self.settings, *self.grid, *self._together)
        for every in (key for key in keys if key.startswith("students.*.")):
            own = re.escape(every.removeprefix("students.*."))
            for key in keys:
                if key != every and re.fullmatch(rf"students\.{NAME}\.{own}", key):
                    raise ValueError(
                        f"{key} stands beside {every}, which means it too. Leave it out"
                    )
        return self


def load_study(path: Path, name: str) -> Study:
    """The study `name` of the file; KavaError with the key path of every wrong setting."""
    studies = read_document(path).get("studies") or {}
    if not isinstance(studies, dict):
        raise KavaError(f"{path}: studies should be a mapping of names to studies.")
    if name not in studies:
        raise KavaError(
            f"{path} has no study {name!r}. There are: {', '.join(map(str, studies)) or 'none'}."
        )
    if not re.fullmatch(NAME, name):
        raise KavaError(
            f"study name {name!r} must be of letters, digits, - and _ only: it names a folder. "
            "Rename it."
        )
    try:
        return Study.model_validate(studies[name])
    except ValidationError as error:
        raise KavaError(explain(path, f"studies.{name}", error)) from None
