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
from kava_core.registry import Registry

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

# Those of other packages too; settings choose among all of them.
REGISTRY: Registry[Policy] = Registry(
    "policy",
    "kava.policies",
    Policy,  # type: ignore[type-abstract]
    POLICIES,
)

__all__ = ["POLICIES", "REGISTRY", "Policy"]
