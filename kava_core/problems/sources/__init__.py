"""Sources of problems: a format each, one file each, behind one interface.

A new one is a file with a frozen dataclass, whose fields are what settings may say about it, and
its line in `SOURCES`.
"""

from __future__ import annotations

from kava_core.problems.sources.base import GeneratedSource, RowSource, Source
from kava_core.problems.sources.boxed import Boxed
from kava_core.problems.sources.gsm8k import GSM8K
from kava_core.problems.sources.gsm8k_aug import GSM8kAug
from kava_core.problems.sources.gsm8k_aug_nl import GSM8kAugNL
from kava_core.problems.sources.gsm_hard import GSMHard
from kava_core.problems.sources.last_digit import LastDigit
from kava_core.problems.sources.metamath import MetaMath
from kava_core.problems.sources.svamp import SVAMP
from kava_core.problems.sources.synthetic import Synthetic
from kava_core.problems.sources.table import Table

_ALL: tuple[type[Source], ...] = (
    Synthetic,
    LastDigit,
    GSM8K,
    GSM8kAug,
    GSM8kAugNL,
    GSMHard,
    SVAMP,
    MetaMath,
    Boxed,
    Table,
)
SOURCES: dict[str, type[Source]] = {source.name: source for source in _ALL}

__all__ = ["SOURCES", "GeneratedSource", "RowSource", "Source"]
