"""A whole pipeline, read from `pipelines.yaml`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kava_core.errors import KavaError
from kava_core.settings.base import NAME, Name, NotNegative, PositiveReal, Section, Weight
from kava_core.settings.evaluate import Evaluate, Report
from kava_core.settings.evict import Evict
from kava_core.settings.fidelity import Fidelity
from kava_core.settings.generate import Generate
from kava_core.settings.prepare import Prepare
from kava_core.settings.student import Student
from kava_core.settings.teacher import Teacher


class Resources(Section):
    """What is used to compute, never what is computed: not tracked by DVC.

    workers: Ray workers of generate and evict; 0 runs in process; null shares the cores there are.
    """

    workers: NotNegative | None = None
    cpus_per_worker: PositiveReal = 1
    gpus_per_worker: Weight = 0
    loader_workers: NotNegative = 0


class Pipeline(Section):
    """A named pipeline, complete."""

    prepare: Prepare
    teacher: Teacher
    generate: Generate
    evict: Evict
    fidelity: Fidelity = Fidelity()
    students: dict[Name, Student]
    evaluate: Evaluate
    report: Report
    resources: Resources = Resources()


def load_pipeline(path: Path, name: str | None = None) -> tuple[str, Pipeline]:
    """The pipeline `name` of the file, or the one its `pipeline:` key names, validated.

    Raises KavaError with the key path of every wrong setting.
    """
    try:
        document: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KavaError(f"{path} is missing. Run this where pipelines.yaml lies.") from None
    except OSError as error:
        raise KavaError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise KavaError(f"{path} is not valid YAML: {error}") from None
    pipelines = document.get("pipelines") if isinstance(document, dict) else None
    if not isinstance(pipelines, dict):
        raise KavaError(f"{path} has no `pipelines:` mapping.")
    pipelines = {str(key): value for key, value in pipelines.items()}
    name = str(name or document.get("pipeline"))
    if name not in pipelines:
        raise KavaError(f"{path} has no pipeline {name!r}. There are: {', '.join(pipelines)}.")
    if not re.fullmatch(NAME, name):
        raise KavaError(
            f"pipeline name {name!r} must be of letters, digits, - and _ only: it names a folder, "
            "and DVC reads a dot as a path. Rename it."
        )
    try:
        return name, Pipeline.model_validate(pipelines[name])
    except ValidationError as error:
        raise KavaError(_explain(path, f"pipelines.{name}", error)) from None


def _explain(path: Path, root: str, error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join([root, *map(str, problem["loc"])])
        message = problem["msg"].removeprefix("Value error, ")
        found = "" if isinstance(problem["input"], dict) else f", found {problem['input']!r}"
        if problem["type"] == "extra_forbidden":
            message, found = "no such setting", ""
        lines.append(f"{key}: {message}{found}")
    return f"{path} has {len(lines)} wrong setting(s):\n  " + "\n  ".join(lines)
