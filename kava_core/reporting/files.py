"""Files of other stages, checked against a description of what a report needs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kava_core.artefacts import read_json
from kava_core.errors import KavaError

Percent = Annotated[float, Field(ge=0, le=100)]


class Found(BaseModel):
    """A part of a file that later versions may add keys to."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class GroupScore(Found):
    """Accuracy (%) on the problems of one kind: a number of steps, an operation, a length."""

    exact_match: Percent
    n: int


def read_checked(kind: Any, path: Path, stage: str) -> Any:
    """The JSON in `path` as what the type `kind` describes; KavaError names path, place, stage."""
    if not path.is_file():
        raise KavaError(f"{path} is missing. Run `kava {stage}` first.")
    return checked(kind, read_json(path), path, stage)


def checked(kind: Any, value: Any, path: Path, stage: str) -> Any:
    """`value`, which was read from `path`, as what the type `kind` describes."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = " → ".join(map(str, first["loc"])) or "top level"
        message = first["msg"].removeprefix("Value error, ")
        raise KavaError(
            f"{path}: {where}: {message}, found {first['input']!r:.80}. Run `kava {stage}` again."
        ) from None
