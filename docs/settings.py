"""docs/settings.md, from the classes of kava_core.settings and what their docstrings say.

`python docs/settings.py` writes it anew. In a docstring `name: text`, or `one, other: text`, says
what settings are for, up to the next of these or the end of the paragraph.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from kava_core.eviction.policies import POLICIES
from kava_core.problems.prompt import PLAIN
from kava_core.problems.sources import SOURCES
from kava_core.settings import Imports, Pipeline, Study, Training

PAGE = Path(__file__).with_suffix(".md")
BEGIN = "<!-- what follows is written by `python docs/settings.py` -->\n"
# Our own policies and sources, and the page about them.
KINDS: dict[str, tuple[Mapping[str, type], str]] = {
    "policy": (POLICIES, "eviction.md"),
    "source": (SOURCES, "sources.md"),
}
FEW = 4  # settings of a mapping that are named where it is
LONG = 60  # characters of a text that is not said twice in a table
Section = type[BaseModel]


@dataclasses.dataclass(frozen=True)
class Row:
    """A setting. path: its key in the section; default: None where there has to be a value."""

    path: str
    type: str
    default: str | None
    text: str


def page(before: str) -> str:
    """The page with these tables in the place of its own."""
    return before.partition(BEGIN)[0] + BEGIN + "".join(_parts())


def undocumented() -> list[str]:
    """Settings that no docstring says anything of."""
    return [
        f"{title}: {row.path}" for title, _, rows in _sections() for row in rows if not row.text
    ]


def _parts() -> Iterator[str]:
    sections = list(_sections())
    anchors = {title: title.lower().replace(" ", "-").replace(".", "") for title, *_ in sections}
    yield f"\n{' · '.join(f'[{title}](#{anchor})' for title, anchor in anchors.items())}\n"
    for title, about, rows in sections:
        yield f"\n## {title}\n\n"
        if about:
            yield f"{about}\n\n"
        yield "| setting | what it may be | default | what it does |\n|---|---|---|---|\n"
        said: dict[str, str] = {}
        for row in rows:
            first = said.setdefault(row.text, row.path)
            text = row.text if first == row.path or len(row.text) < LONG else f"as `{first}`."
            default = "*required*" if row.default is None else row.default
            cells = (f"`{row.path}`", row.type, default, text)
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _sections() -> Iterator[tuple[str, str, list[Row]]]:
    """Title, what stands above the table, and its rows."""
    fields = get_type_hints(Pipeline, include_extras=True)
    for name in Pipeline.model_fields:
        section = next(each for each in _models(fields[name]))
        key = "students.NAME" if name == "students" else name
        yield key, _about(section), list(_rows(section, {Training}))
        if name == "students":
            where = "`teacher.training` and `students.NAME.training`."
            yield "training", f"{where} {_about(Training)}", list(_rows(Training, set()))
    for key, section in (("imports", Imports), ("studies.NAME", Study)):
        yield key, _about(section), list(_rows(section, set()))
    for what, (kinds, link) in KINDS.items():
        rows = [row for kind in kinds.values() for row in _kind(kind)]
        places = ("evict.policy", "fidelity.policies") if what == "policy" else ("prepare.source",)
        where = " and ".join(f"`{place}`" for place in places)
        about = f"What {where} may say beside the `name` of a [{what}]({link})."
        yield f"settings of a {what}", about, rows


def _rows(section: Section, shown: set[type], above: str = "") -> Iterator[Row]:
    """The settings of a section, each followed by those of the mapping that it is, if that is
    shown nowhere before."""
    hints, texts = get_type_hints(section, include_extras=True), _texts(section)
    for name, field in section.model_fields.items():
        hint = hints[name]
        default = field.get_default(call_default_factory=True)
        path = above + (field.alias or name)
        required = default is PydanticUndefined
        yield Row(path, _type(hint), None if required else _default(default), texts.get(name, ""))
        below = f"{path}.NAME." if _origin(hint) is dict else f"{path}."
        for inner in _models(hint):
            if inner not in shown:
                shown.add(inner)
                yield from _rows(inner, shown, below)


def _kind(kind: type) -> Iterator[Row]:
    """The settings of a policy or a source, which is a dataclass."""
    hints, texts = get_type_hints(kind), _texts(kind)
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING
        default = None if required else _default(field.default)
        path = f"{kind.name}: {field.name.rstrip('_')}"  # type: ignore[attr-defined]
        yield Row(path, _type(hints[field.name]), default, texts.get(field.name, ""))


# --- what docstrings say --------------------------------------------------------------------------


def _texts(section: type) -> dict[str, str]:
    """Setting → what the docstring says of it."""
    return {name: text for _, found in _read(section) for names, text in found for name in names}


def _about(section: type) -> str:
    """What the docstring says before the first of its settings."""
    return " ".join(before for before, _ in _read(section) if before)


def _read(section: type) -> Iterator[tuple[str, list[tuple[list[str], str]]]]:
    """For each paragraph what stands before the settings, and settings with their text."""
    names = "|".join(_names(section))
    begin = re.compile(rf"(?:^|(?<=[.:;)] ))((?:{names})(?:(?:, | or )(?:{names}))*): ")
    for paragraph in inspect.cleandoc(section.__doc__ or "").split("\n\n"):
        before, *rest = begin.split(_linked(" ".join(paragraph.split())))
        found = [
            (re.split(", | or ", named), text.strip())
            for named, text in zip(rest[::2], rest[1::2], strict=True)
        ]
        yield before.strip(), found


def _names(section: type) -> Iterable[str]:
    if issubclass(section, BaseModel):
        return section.model_fields
    return [field.name for field in dataclasses.fields(section)]  # type: ignore[arg-type]


def _linked(text: str) -> str:
    return re.sub(r"docs/([a-z-]+)\.md", r"[\1](\1.md)", text)


# --- what a setting may be ------------------------------------------------------------------------


def _models(hint: Any) -> Iterator[Section]:
    """The sections that a value may be, or hold."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        yield hint
    elif not _chosen(hint):
        for part in get_args(hint):
            yield from _models(part)


def _origin(hint: Any) -> Any:
    return _origin(get_args(hint)[0]) if get_origin(hint) is Annotated else get_origin(hint)


def _chosen(hint: Any) -> str:
    """`policy` or `source`, if it is a choice among registered ones."""
    for mark in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
        func: Callable[..., Any] | None = getattr(mark, "func", None)
        if isinstance(func, partial) and func.args:
            return str(func.args[0].what)
    return ""


def _type(hint: Any) -> str:
    """In words."""
    if what := _chosen(hint):
        return f"a [{what}]({KINDS[what][1]})"
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _bounded(_type(inside[0]), inside[1:])
    if origin is Literal:
        *most, last = (f"`{value}`" for value in inside)
        return f"{', '.join(most)} or {last}" if most else last
    if origin in (Union, UnionType):
        return " or ".join("null" if part is NoneType else _type(part) for part in inside)
    if origin is tuple and ... not in inside:
        return f"[{', '.join(map(_type, inside))}]"
    if origin in (tuple, list):
        return f"list of {_type(inside[0])}"
    if origin is dict:
        return f"NAME: {_type(inside[1])}"
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        if hint is Training:
            return "[training](#training)"
        names = list(hint.model_fields)
        return f"`{{{', '.join(names)}}}`" if len(names) < FEW else "mapping"
    words = {int: "integer", float: "number", bool: "true or false", str: "text"}
    return words.get(hint, "any value")


def _bounded(words: str, marks: Iterable[Any]) -> str:
    """A number with what bounds it."""
    limits = [limit for mark in marks for limit in getattr(mark, "metadata", [mark])]
    if words not in ("integer", "number"):
        return words
    signs = {Gt: (">", "gt"), Ge: ("≥", "ge"), Lt: ("<", "lt"), Le: ("≤", "le")}
    found = [
        f"{sign} {getattr(limit, name):g}"
        for kind, (sign, name) in signs.items()
        for limit in limits
        if isinstance(limit, kind)
    ]
    return " ".join([words, " and ".join(found)]).strip()


def _default(value: Any) -> str:
    """As it stands in YAML."""
    if value == PLAIN or (isinstance(value, BaseModel) and not hasattr(value, "label")):
        return "–"
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(getattr(value, "label", value)).replace("\n", "\\n")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
