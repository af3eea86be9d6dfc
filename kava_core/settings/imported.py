"""A pipeline whose targets and teacher come from elsewhere: another team, another project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from kava_core.errors import KavaError
from kava_core.settings.base import Name, Section
from kava_core.settings.evaluate import Evaluate, Report
from kava_core.settings.pipeline import (
    MAKING,
    Cadence,
    Pipeline,
    Resources,
    explain,
    find_pipeline,
    is_imported,
    load_pipeline,
)
from kava_core.settings.prepare import Prepare
from kava_core.settings.student import Student


class Imports(Section):
    """Where a pipeline without `teacher`, `generate` and `evict` has its targets from; paths are
    below the project's folder unless absolute.

    targets: the folder of a targets store; null: data/NAME/kv_targets, where `kava store import`
    puts it. teacher: the folder of the teacher that it was made from; null: data/NAME/teacher.
    """

    targets: str | None = None
    teacher: str | None = None


class Imported(Section):
    """A pipeline that trains from imported targets, and makes none: it has students alone.

    prepare: problems of its own, for students that read `problems`, and to evaluate with; without
    it there are no stages evaluate and report.
    """

    imports: Imports = Imports()
    prepare: Prepare | None = None
    students: Annotated[dict[Name, Student], Field(min_length=1)]
    evaluate: Evaluate = Evaluate()
    report: Report = Report(title="Students of imported targets")
    resources: Resources = Resources()
    cadence: Cadence = Cadence()

    @model_validator(mode="before")
    @classmethod
    def _makes_no_targets(cls, given: Any) -> Any:
        making = [name for name in MAKING if isinstance(given, dict) and name in given]
        if making:
            raise ValueError(
                f"{', '.join(making)}: means nothing beside `imports`, which says that targets and "
                "teacher come from elsewhere. Leave one out"
            )
        return given

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if sent := self.resources.changed("caches_to", "targets_to"):
            raise ValueError(
                f"resources.{sent[0]}: says where stores are put that are made, and none is made "
                "here. Leave it out"
            )
        self.evaluate.check_systems(self.students)
        if self.prepare is not None:
            return self
        for name, student in self.students.items():
            if student.reads == "problems":
                raise ValueError(
                    f"students.{name}.reads: problems, and a targets store brings none. Add a "
                    "section `prepare` for problems of your own, or leave this student out"
                )
        if asked := self.changed("evaluate", "report"):
            raise ValueError(
                f"{', '.join(asked)}: there are no problems to ask. Add a section `prepare`, or "
                "leave it out"
            )
        if self.resources.changed("workers", "push_caches"):
            raise ValueError(
                "resources.workers, resources.push_caches: belong to stages that make caches, and "
                "there are none. Leave them out"
            )
        return self


def load_any_pipeline(path: Path, name: str | None = None) -> tuple[str, Pipeline | Imported]:
    """As `load_pipeline`, of a pipeline that makes its targets or imports them."""
    found, plain = find_pipeline(path, name)
    if not is_imported(plain):
        return load_pipeline(path, found)
    try:
        return found, Imported.model_validate(plain)
    except ValidationError as error:
        raise KavaError(explain(path, f"pipelines.{found}", error)) from None
