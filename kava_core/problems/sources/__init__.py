"""Sources of problems: a format each, one file each, behind one interface.

A new one is a file with a frozen dataclass, whose fields are what settings may say about it, and
its line in `SOURCES`.
"""

from __future__ import annotations

from collections.abc import Iterable

from kava_core.problems.sources.base import GeneratedSource, RowSource, Source
from kava_core.problems.sources.boxed import Boxed
from kava_core.problems.sources.gsm8k import GSM8K
from kava_core.problems.sources.gsm8k_aug import GSM8kAug
from kava_core.problems.sources.gsm8k_aug_nl import GSM8kAugNL
from kava_core.problems.sources.gsm_hard import GSMHard
from kava_core.problems.sources.last_digit import LastDigit
from kava_core.problems.sources.metamath import MetaMath
from kava_core.problems.sources.multiarith import MultiArith
from kava_core.problems.sources.svamp import SVAMP
from kava_core.problems.sources.synthetic import Synthetic
from kava_core.problems.sources.table import Table
from kava_core.registry import Registry

_ALL: tuple[type[Source], ...] = (
    Synthetic,
    LastDigit,
    GSM8K,
    GSM8kAug,
    GSM8kAugNL,
    GSMHard,
    SVAMP,
    MultiArith,
    MetaMath,
    Boxed,
    Table,
)
SOURCES: dict[str, type[Source]] = {source.name: source for source in _ALL}
# Those of other packages too; settings choose among all of them.
REGISTRY: Registry[Source] = Registry(
    "source",
    "kava.sources",
    Source,
    SOURCES,
)


def sources_of(fields: Iterable[str]) -> list[str]:
    """The names of the sources that read rows of these fields: those that use most of them."""
    there = set(fields)
    used = {
        name: max((len(layout) for layout in kind.layouts if there.issuperset(layout)), default=0)
        for name, kind in SOURCES.items()
        if issubclass(kind, RowSource)
    }
    most = max(used.values())
    return [name for name, number in used.items() if number == most] if most else []


__all__ = [
    "REGISTRY",
    "SOURCES",
    "GeneratedSource",
    "RowSource",
    "Source",
    "sources_of",
]
