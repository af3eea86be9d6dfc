"""Try a policy on made-up caches, for the tests of whoever writes one."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from kava_core.errors import KavaError
from kava_core.eviction.batch import CacheBatch
from kava_core.eviction.policies.base import Policy
from kava_core.eviction.selection import score_all
from kava_core.eviction.targets import evict
from kava_core.rotary import Rotary

LAYERS, HEADS, DIM, BUDGET = 3, 2, 8, 4
LENGTHS = (7, 12, 5)


def check_policy(policy: Policy) -> None:
    """KavaError if `policy` is not what stores rely on.

    Scores must have the shape and type of `Policy.score` and be finite, the same when asked again,
    whatever else is drawn, and the same to the bit for a record alone as in a batch. What may be
    kept must be as `Policy.keepable` says, with at least one token of every record. The caches are
    random; they have importance, positions, steps and results.
    """
    whole = _caches(range(len(LENGTHS)))
    scores = score_all(policy, whole)
    torch.rand(3)
    if not torch.equal(scores, score_all(policy, whole)):
        raise KavaError(
            f"expected the same scores from {policy} when asked twice, found others. Draw random "
            "numbers from a seed of its own."
        )
    evict(whole, policy, list(whole.budgets or ()))
    for record, (first, last) in enumerate(whole.spans):
        alone = score_all(policy, _caches([record]))
        if not torch.equal(alone, scores[first:last]):
            raise KavaError(
                f"expected the same scores from {policy} for a record alone as in a batch, found "
                f"others for record {whole.ids[record]!r}. Compute what is summed over tokens for "
                "each record on its own."
            )


def _caches(records: range | list[int]) -> CacheBatch:
    keys, values, importance = [], [], []
    for record in records:
        draw = torch.Generator().manual_seed(record)
        shape = (LENGTHS[record], LAYERS, HEADS, DIM)
        keys.append(torch.randn(shape, generator=draw).bfloat16())
        values.append(torch.randn(shape, generator=draw).bfloat16())
        importance.append(torch.rand(shape[:3], generator=draw))
    lengths = [LENGTHS[record] for record in records]
    turns = torch.tensor([[10 ** (-i / 2) for i in range(DIM // 2)]] * LAYERS, dtype=torch.float64)
    batch = CacheBatch.from_ragged(
        torch.cat(keys),
        torch.cat(values),
        torch.cat(importance),
        [0, *torch.tensor(lengths).cumsum(0).tolist()],
        [f"record-{record}" for record in records],
        rotary=Rotary(turns, torch.ones(LAYERS, dtype=torch.float64)),
        cot_start=[3 + record for record in records],
        step_ends=[(math.ceil(length / 2), length) for length in lengths],
        results=[(length // 2, length - 1) for length in lengths],
    )
    return replace(batch, budgets=(BUDGET,) * LAYERS)
