"""Eviction: from N_C tokens of a teacher's cache to M slots per layer and head.

The policies and their settings are there without torch; the rest is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kava_core.eviction.policies import POLICIES, Policy
from kava_core.lazy import lazily

if TYPE_CHECKING:
    from kava_core.eviction.batch import CacheBatch
    from kava_core.eviction.budgets import make_budgets
    from kava_core.eviction.layers import group_layers, parse_layers
    from kava_core.eviction.targets import Targets, evict, merge

__all__ = [
    "POLICIES",
    "CacheBatch",
    "Policy",
    "Targets",
    "evict",
    "group_layers",
    "make_budgets",
    "merge",
    "parse_layers",
]

__getattr__ = lazily(
    __name__,
    {
        "CacheBatch": "kava_core.eviction.batch",
        "make_budgets": "kava_core.eviction.budgets",
        "group_layers": "kava_core.eviction.layers",
        "parse_layers": "kava_core.eviction.layers",
        "Targets": "kava_core.eviction.targets",
        "evict": "kava_core.eviction.targets",
        "merge": "kava_core.eviction.targets",
    },
)
