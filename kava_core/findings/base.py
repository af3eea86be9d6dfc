"""Findings as files: written in the order they are given, and checked when they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from kava_core.artefacts import atomic_path, make_folders, read_json
from kava_core.errors import KavaError

T = TypeVar("T")


class Finding(BaseModel):
    """A part of a file. Later versions may add keys to it, which this one passes over."""

    model_config = ConfigDict(extra="ignore", frozen=True)


def write_finding(path: Path, value: object, *, spaced: bool = True) -> None:
    """Write `Finding`s, and dicts and lists of them, as JSON, atomically.

    Keys keep their order, so that numbers used as keys are read in the order of numbers. spaced:
    indented for people, which long files are not. The folder is made if there is none.
    """
    plain = to_jsonable_python(value)
    layout: dict[str, Any] = {"indent": 2} if spaced else {"separators": (",", ":")}
    make_folders(path.parent)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(plain, ensure_ascii=False, **layout) + "\n", "utf-8")


def read_finding(kind: type[T], path: Path, stage: str) -> T:
    """The JSON in `path` as a `kind`; KavaError names path, place and the stage to run again."""
    if not path.is_file():
        raise KavaError(f"{path} is missing. Run `kava {stage}` first.")
    return check_finding(kind, read_json(path), path, stage)


def check_finding(kind: type[T], value: object, path: Path, stage: str) -> T:
    """`value`, which was read from `path`, as a `kind`."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = " → ".join(map(str, first["loc"])) or "top level"
        message = first["msg"].removeprefix("Value error, ")
        raise KavaError(
            f"{path}: {where}: {message}, found {first['input']!r:.80}. Run `kava {stage}` again."
        ) from None
