"""Kinds by name: ours, and those that other installed packages offer by entry points.

A package outside offers a policy or a source by an entry point in its `pyproject.toml`:

    [project.entry-points."kava.policies"]
    middle = "kava_extras.middle:Middle"

Settings then name it as they name ours. Nothing of a package is imported before one of its kinds is
named. What is made with it records the package and its version.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any, Generic, TypeVar

from kava_core.errors import KavaError, is_out_of_memory
from kava_core.interrupt import check
from kava_core.wording import LONGEST_MESSAGE, shorten

K = TypeVar("K")
# ClassVar of a kind: the names of further packages whose version what it computes depends on.
DEPENDS_ON = "depends_on"
# What stands beside the settings of a kind, so that none of them may be called so.
TAKEN = {"name", "packages"}


@dataclass(frozen=True)
class Registry(Generic[K]):
    """Ours and others' kinds of one sort.

    what: the word for it in messages. group: the entry points' group. base: the class that a kind
    extends. own: ours.
    """

    what: str
    group: str
    base: type[K]
    own: Mapping[str, type[K]]

    def names(self) -> list[str]:
        """Every name, ours first; nothing is imported for it."""
        others = sorted({point.name for point in _points(self.group)} - set(self.own))
        return [*self.own, *others]

    def find(self, name: str) -> type[K]:
        """The kind called `name`; KeyError if nobody offers it.

        KavaError if more than one does, or the one that does cannot be imported or is not such a
        kind.
        """
        points = [point for point in _points(self.group) if point.name == name]
        if name in self.own and points:
            raise KavaError(
                f"{self.what} {name} is KaVa's own, and {_package(points[0])} offers another of "
                "that name. Uninstall that package, or have it renamed there."
            )
        if len(points) > 1:
            offering = " and ".join(sorted(_package(point) for point in points))
            raise KavaError(
                f"{self.what} {name} is offered by more than one package: {offering}. Uninstall "
                "all but one."
            )
        if not points:
            return self.own[name]
        return self._load(points[0])

    def packages(self, kind: type[K]) -> dict[str, str]:
        """Package → version of all that `kind` is computed with, {} for one of ours."""
        name = getattr(kind, "name", None)
        if not isinstance(name, str) or self._is_own(kind):
            return {}
        for point in _points(self.group):
            if point.name == name and point.dist is not None:
                further = {each: _version(each, name) for each in getattr(kind, DEPENDS_ON, ())}
                return {_canonical(point.dist.name): point.dist.version, **further}
        return {}

    def has(self, kind: type) -> bool:
        """Whether settings could name this very class."""
        try:
            return self.find(getattr(kind, "name", "")) is kind
        except KeyError:
            return False

    def whose(self, kind: type) -> str:
        """`policy last of last-token 1.2`: the kind and its package, for messages."""
        name = getattr(kind, "name", kind.__name__)
        if not self._is_own(kind):
            for point in _points(self.group):
                if point.name == name:
                    return f"{self.what} {name} of {_package(point)}"
        return f"{self.what} {name}"

    @contextmanager
    def guarded(
        self, kind: type, doing: str, passing: tuple[type[Exception], ...] = ()
    ) -> Iterator[None]:
        """Whatever another package's code raises in here is a KavaError that names it.

        What ours raise goes through, and so do a KavaError, a lack of memory and what is `passing`.
        """
        try:
            yield
        except (Exception, SystemExit) as error:
            check()  # a signal is nobody's fault
            through = isinstance(error, (KavaError, *passing)) or is_out_of_memory(error)
            if through or self._is_own(kind):
                raise
            raise KavaError(
                f"{self.whose(kind)} failed {doing} ({_said(error)}). Mend that package, or choose "
                f"another {self.what}."
            ) from error

    def _is_own(self, kind: type) -> bool:
        return self.own.get(getattr(kind, "name", "")) is kind

    def _load(self, point: EntryPoint) -> type[K]:
        where = f"{self.what} {point.name} of {_package(point)}"
        try:
            kind: Any = point.load()
        # Whatever a stranger's module does while it is imported, the end of the program included.
        except (Exception, SystemExit) as error:
            check()
            raise KavaError(
                f"{where} cannot be imported ({_said(error)}). Mend or reinstall that package, or "
                f"choose another {self.what}."
            ) from error
        fits = isinstance(kind, type) and issubclass(kind, self.base) and is_dataclass(kind)
        if not fits or not kind.__dataclass_params__.frozen:
            raise KavaError(
                f"{where}: expected a frozen dataclass that extends {self.base.__module__}."
                f"{self.base.__name__}, found {kind!r:.120}. Mend that package."
            )
        if getattr(kind, "name", None) != point.name:
            raise KavaError(
                f"{where}: expected a class with `name = {point.name!r}`, as its entry point is "
                f"called, found {getattr(kind, 'name', None)!r:.80}. Mend that package."
            )
        if taken := TAKEN & {field.name for field in fields(kind)}:
            raise KavaError(
                f"{where}: expected no field called {' or '.join(sorted(taken))}, which stands "
                "beside a kind's settings. Leave its annotation out, or rename it there."
            )
        declared = {name for name in self.base.__annotations__ if not hasattr(kind, name)}
        if lacking := declared | getattr(kind, "__abstractmethods__", frozenset()):
            raise KavaError(f"{where}: it has no {', '.join(sorted(lacking))}. Mend that package.")
        return kind


@functools.cache
def _points(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group, each once, however often its package is found on the path."""
    found: dict[tuple[str, str, str], EntryPoint] = {}
    for point in entry_points(group=group):
        found.setdefault((point.name, point.value, _package(point)), point)
    return tuple(found.values())


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {shorten(str(error), LONGEST_MESSAGE)}"


def _canonical(name: str) -> str:
    """A package's name as it is compared; without dots, which DVC reads as a path."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(package: str, name: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise KavaError(
            f"{name} needs the package {package}, which is not installed. Install it."
        ) from None
