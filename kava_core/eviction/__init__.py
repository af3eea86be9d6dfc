"""Eviction: from N_C tokens of a teacher's cache to M slots per layer and head."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from kava_core.errors import KavaError
from kava_core.eviction.base import Policy
from kava_core.eviction.batch import CacheBatch
from kava_core.eviction.budgets import make_budgets
from kava_core.eviction.layers import group_layers, parse_layers
from kava_core.eviction.policies.attention import Attention
from kava_core.eviction.policies.crop import Crop
from kava_core.eviction.policies.key_norm import KeyNorm
from kava_core.eviction.policies.random import Random
from kava_core.eviction.policies.redundancy import Redundancy
from kava_core.eviction.policies.rkv import RKV
from kava_core.eviction.policies.streaming import Streaming
from kava_core.eviction.policies.uniform import Uniform
from kava_core.eviction.policies.value_norm import ValueNorm
from kava_core.eviction.targets import Targets, evict, merge

POLICIES: dict[str, type[Policy]] = {
    "rkv": RKV,
    "attention": Attention,
    "redundancy": Redundancy,
    "crop": Crop,
    "uniform": Uniform,
    "random": Random,
    "key_norm": KeyNorm,
    "value_norm": ValueNorm,
    "streaming": Streaming,
}

__all__ = [
    "POLICIES",
    "CacheBatch",
    "Policy",
    "Targets",
    "evict",
    "group_layers",
    "make_budgets",
    "make_policy",
    "merge",
    "parse_layers",
]


def make_policy(name: str, **settings: Any) -> Policy:
    """The policy called `name` with these settings; KavaError names what is wrong."""
    if name not in POLICIES:
        raise KavaError(f"expected `policy` to be one of {', '.join(POLICIES)}, found {name!r}.")
    policy = POLICIES[name]
    known = [field.name for field in fields(policy)]  # type: ignore[arg-type]
    for setting in settings:
        if setting not in known:
            raise KavaError(
                f"policy {name!r} has no setting {setting!r}; it has "
                f"{', '.join(known) or 'none'}. Remove the setting or change the policy."
            )
    return policy(**settings)
