"""The eviction policies: one idea, one file, one line here."""

from __future__ import annotations

from kava_core.eviction.policies.attention import Attention
from kava_core.eviction.policies.base import Policy
from kava_core.eviction.policies.crop import Crop
from kava_core.eviction.policies.key_norm import KeyNorm
from kava_core.eviction.policies.random import Random
from kava_core.eviction.policies.redundancy import Redundancy
from kava_core.eviction.policies.results import Results
from kava_core.eviction.policies.rkv import RKV
from kava_core.eviction.policies.steps import Steps
from kava_core.eviction.policies.streaming import Streaming
from kava_core.eviction.policies.uniform import Uniform
from kava_core.eviction.policies.value_norm import ValueNorm

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        RKV,
        Attention,
        Redundancy,
        Crop,
        Uniform,
        Random,
        KeyNorm,
        ValueNorm,
        Streaming,
        Steps,
        Results,
    )
}

__all__ = ["POLICIES", "Policy"]
