"""A choice among registered kinds, each of which is its own schema.

A policy or a source is a frozen dataclass: its name chooses it, its fields are its settings. In
YAML it stands as the bare name, for its defaults, or as a mapping with the `name` and the fields;
in Python the setting is the dataclass itself. A field whose name is a Python keyword ends in an
underscore, which YAML leaves out.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, ClassVar, Protocol, Union, get_args, get_origin, get_type_hints

from pydantic import (
    Field,
    PlainSerializer,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    create_model,
)
from pydantic_core import PydanticCustomError

from kava_core.errors import KavaError
from kava_core.settings.base import Real, Section

CHOICE = "choice"  # type of the error that holds the errors of a chosen kind's own settings


class Kind(Protocol):
    """A registered class: a dataclass with a name."""

    name: ClassVar[str]


def choice_of(what: str, kinds: Mapping[str, type]) -> Any:
    """What turns the annotation `Annotated[Base, *choice_of("policy", POLICIES)]` into a setting.

    what: the word for it in messages. kinds: name → dataclass.
    """
    return (
        PlainValidator(functools.partial(_read, what, kinds)),
        PlainSerializer(write_choice),
    )


def write_choice(chosen: Any) -> dict[str, Any]:
    """Name and every field with the value that holds, as plain JSON."""
    values = {field.name.rstrip("_"): getattr(chosen, field.name) for field in fields(chosen)}
    return {"name": chosen.name} | {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }


def _read(what: str, kinds: Mapping[str, type], value: Any) -> Any:
    if isinstance(value, tuple(kinds.values())):
        return value
    given = dict(value) if isinstance(value, dict) else {"name": value}
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(
            f"should be one of {', '.join(kinds)}, or {{name: one of them, and its settings}}"
        )
    kind = kinds[name]
    try:
        settings = _section(kind).model_validate(given)
        return kind(**{field.name: getattr(settings, field.name) for field in fields(kind)})
    except ValidationError as error:
        raise PydanticCustomError(
            CHOICE,
            "{what} {name}: wrong settings",
            {"what": what, "name": name, "errors": error.errors()},
        ) from None
    except KavaError as error:
        raise ValueError(f"{what} {name}: {error}") from None


@functools.cache
def _section(kind: type) -> type[Section]:
    """The settings of a dataclass: its own fields, types and defaults."""
    hints = get_type_hints(kind)
    found: dict[str, Any] = {}
    for field in fields(kind):
        default = ... if field.default is MISSING else field.default
        alias = field.name.rstrip("_")
        found[field.name] = (_strict(hints[field.name]), Field(default=default, alias=alias))
    model: type[Section] = create_model(kind.__name__, __base__=Section, **found)
    return model


_EXACT = {int: StrictInt, float: Real, bool: StrictBool, str: StrictStr}


def _strict(hint: Any) -> Any:
    """The type without conversions: YAML's own types must do, and true is no number."""
    if hint in _EXACT:
        return _EXACT[hint]
    origin, inside = get_origin(hint), get_args(hint)
    if origin is tuple:
        parts = tuple(part if part is ... else _strict(part) for part in inside)
        return tuple.__class_getitem__(parts)
    if origin in (Union, UnionType):
        options = [part if part is NoneType else _strict(part) for part in inside]
        return functools.reduce(lambda left, right: left | right, options)
    return hint
