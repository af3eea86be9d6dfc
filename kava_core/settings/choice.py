"""A choice among registered kinds, each of which is its own schema.

A policy or a source is a frozen dataclass: its name chooses it, its fields are its settings. In
YAML it stands as the bare name, for its defaults, or as a mapping with the `name` and the fields;
in Python the setting is the dataclass itself. A field whose name is a Python keyword ends in an
underscore, which YAML leaves out.

A kind that another package offers (`kava_core.registry`) is written down with `packages`, that
package and its version; where it is read with them, they must be what is installed.
"""

from __future__ import annotations

import functools
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

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
from kava_core.registry import Registry
from kava_core.settings.base import Real, Section

CHOICE = "choice"  # type of the error that holds the errors of a chosen kind's own settings


def choice_of(registry: Registry[Any]) -> Any:
    """What turns the annotation `Annotated[Base, *choice_of(registry)]` into a setting."""
    return (
        PlainValidator(functools.partial(_read, registry)),
        PlainSerializer(functools.partial(_write, registry)),
    )


def packages_of(registry: Registry[Any], *chosen: Any) -> dict[str, str]:
    """Package → version of all that these policies, or sources, are computed with beside ours."""
    return {
        package: version
        for each in chosen
        for package, version in registry.packages(type(each)).items()
    }


def _write(registry: Registry[Any], chosen: Any) -> dict[str, Any]:
    """Name and every field with the value that holds, as plain JSON."""
    values = {field.name.rstrip("_"): getattr(chosen, field.name) for field in fields(chosen)}
    packages = packages_of(registry, chosen)
    return {
        "name": chosen.name,
        **({"packages": packages} if packages else {}),
        **{name: list(v) if isinstance(v, tuple) else v for name, v in values.items()},
    }


def _read(registry: Registry[Any], value: Any) -> Any:
    what = registry.what
    if isinstance(value, registry.base) and registry.has(type(value)):
        return value
    names = registry.names()
    given = dict(value) if isinstance(value, dict) else {"name": value}
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in names:
        raise ValueError(
            f"should be one of {', '.join(names)}, or {{name: one of them, and its settings}}"
        )
    try:
        kind: Any = registry.find(name)
        if (installed := registry.packages(kind)) and "packages" in given:
            _check_packages(f"{what} {name}", given.pop("packages"), installed)
        with registry.guarded(kind, "to take its settings", passing=(ValueError, AssertionError)):
            settings = _section(kind).model_validate(given)
            return kind(**{field.name: getattr(settings, field.name) for field in fields(kind)})
    except ValidationError as error:
        raise PydanticCustomError(
            CHOICE,
            "{what} {name}: wrong settings",
            {"what": what, "name": name, "errors": error.errors()},
        ) from None
    except KavaError as error:
        text = str(error)
        raise ValueError(text if text.startswith(what) else f"{what} {name}: {text}") from None


def _check_packages(what: str, wanted: Any, installed: dict[str, str]) -> None:
    if wanted == installed:
        return
    there = ", ".join(f"{package} {version}" for package, version in installed.items())
    asked = wanted
    if isinstance(wanted, dict):
        asked = ", ".join(f"{package} {version}" for package, version in wanted.items())
    raise KavaError(
        f"{what} is here of {there}, not of {asked}, as is wanted. Install that, or run the stage "
        "again with what is installed."
    )


@functools.cache
def _section(kind: type[Any]) -> type[Section]:
    """The settings of a dataclass: its own fields, types and defaults.

    KavaError for a type that no setting can have, and for one that its module does not know.
    """
    try:
        hints = get_type_hints(kind)
    except NameError as error:
        raise KavaError(f"its fields' types cannot be read ({error}). Mend that package.") from None
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
    if origin is Literal:
        return hint
    raise KavaError(
        f"a setting of type {getattr(hint, '__name__', hint)} cannot be read: expected int, float, "
        "bool, str, a Literal, or tuples and unions of these. Mend that package."
    )
