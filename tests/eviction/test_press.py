"""Scorers in kvpress' convention, run on stored caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kava_core.errors import KavaError
from kava_core.eviction import CacheBatch, Policy, evict
from kava_core.eviction.check import check_policy
from kava_core.eviction.policies.base import RotaryPhase
from kava_core.eviction.press import PressPolicy
from tests.eviction import naive


class Scorer:
    """`score(module, hidden_states, keys, values, attentions, kwargs)`, and a ratio to remove."""

    def __init__(self, rule: Callable[..., Any]) -> None:
        self.rule, self.compression_ratio = rule, 0.0

    def score(self, *given: Any) -> Any:
        return self.rule(self, *given)


@dataclass(frozen=True)
class Pressed(PressPolicy):
    name = "pressed"

    rule: Callable[..., Any]

    def press(self) -> Scorer:
        return Scorer(self.rule)


def norm(_: Scorer, module: Any, __: Any, keys: Tensor, *___: Any) -> Tensor:
    assert keys.dtype == torch.float32 and module.head_dim == keys.shape[3]
    return -keys.norm(dim=-1)


def unlike_the_mean(_: Scorer, __: Any, ___: Any, keys: Tensor, *____: Any) -> Tensor:
    mean = torch.nn.functional.normalize(keys, dim=-1).mean(dim=2, keepdim=True)
    return -torch.cosine_similarity(keys, mean, dim=-1)


def ends(press: Scorer, _: Any, __: Any, keys: Tensor, *___: Any) -> Tensor:
    """The first token and the last ones, as many as the ratio leaves."""
    tokens = keys.shape[2]
    removed = tokens - int(tokens * (1 - press.compression_ratio))
    score = torch.ones(keys.shape[:3])
    score[:, :, 1 : 1 + removed] = 0
    return score


def drawn(_: Scorer, __: Any, ___: Any, keys: Tensor, *____: Any) -> Tensor:
    return torch.rand(keys.shape[:3])


@pytest.mark.parametrize("rule", [norm, unlike_the_mean, ends, drawn])
def test_a_scorer_is_a_policy_as_ours_are(rule: Callable[..., Any]) -> None:
    check_policy(Pressed(rule))


def test_its_keys_are_those_of_a_model_at_work() -> None:
    batch = naive.make_batch([5, 9])
    phases: list[tuple[CacheBatch, RotaryPhase]] = [(replace(batch, rotary=None), "pre_rope")]
    if batch.rotary is not None:
        phases.append((batch, "post_rope"))
    assert len(phases) == 2
    for given, phase in phases:
        scores = Pressed(unlike_the_mean).score(given)
        for first, last in batch.spans:
            keys = batch.float_keys(slice(first, last), phase)  # [N, L', H, D]
            for row in range(len(batch.layers)):
                expected = unlike_the_mean(None, 0, 0, keys[:, row].transpose(0, 1)[None])  # type: ignore[arg-type]
                assert torch.equal(scores[first:last, row], expected[0].T)


def test_a_ratio_is_that_of_the_record_and_the_layer() -> None:
    batch = naive.make_batch([3, 10, 101])
    budgets = list(range(2, 2 + len(batch.layers)))
    kept = evict(batch, Pressed(ends), budgets)
    for record, length in enumerate((3, 10, 101)):
        for layer, budget in enumerate(budgets):
            m = min(budget, length)
            expected = [0, *range(length - m + 1, length)]
            assert kept.slot_positions[record, layer, 0, :m].tolist() == expected


def test_a_draw_is_of_the_record_and_the_layer_and_leaves_others_alone() -> None:
    batch = naive.make_batch([6, 6])
    torch.manual_seed(1)
    before = torch.rand(2)
    torch.manual_seed(1)
    scores = Pressed(drawn).score(batch)
    assert torch.equal(torch.rand(2), before)
    assert not torch.equal(scores[:6], scores[6:])
    assert not torch.equal(scores[:, 0], scores[:, 1])


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (lambda _, module, *__: module.q_proj, "reads the attention layer (`q_proj`)"),
        (lambda _, __, hidden, *___: hidden.shape, "reads the hidden states (`shape`)"),
        (lambda *given: given[5].sum(2), "cannot score from keys and values alone (AttributeError"),
        (lambda *given: given[6]["position_embeddings"], "alone (KeyError: 'position_embeddings')"),
        (lambda *given: given[3].sum(), "expected scores [1, kv_heads, tokens]"),
        (lambda *_: 3, "found int"),
    ],
)
def test_what_a_store_does_not_hold_is_one_sentence(rule: Callable[..., Any], said: str) -> None:
    with pytest.raises(KavaError, match="policy pressed: ") as error:
        evict(naive.make_batch([4]), Pressed(rule), [2] * len(naive.make_batch([4]).layers))
    assert said in str(error.value)


@dataclass(frozen=True)
class Odd(Policy):
    """A policy that breaks one promise."""

    name = "odd"

    rule: Callable[[CacheBatch], Tensor]
    kept: Callable[[CacheBatch], Tensor | None] = lambda _: None

    def score(self, batch: CacheBatch) -> Tensor:
        return self.rule(batch)

    def keepable(self, batch: CacheBatch) -> Tensor | None:
        return self.kept(batch)


def places(batch: CacheBatch) -> Tensor:
    return batch.token_indices.float()[:, None, None].expand(batch.shape)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Odd(lambda batch: places(batch)[..., 0]), "expected scores [T, L', H] = "),
        (Odd(lambda batch: places(batch).double()), "found [24, 3, 2] of torch.float64"),
        (Odd(lambda batch: places(batch).log()), "expected finite scores"),
        (Odd(lambda batch: torch.rand(batch.shape)), "when asked twice"),
        (Odd(lambda batch: places(batch) + len(batch.ids)), "for a record alone as in a batch"),
        (
            Odd(places, lambda batch: batch.token_lengths > 6),
            "let at least one token of every record be kept, found none of record 'record-2'",
        ),
    ],
)
def test_a_policy_that_breaks_a_promise_is_found_out(policy: Policy, said: str) -> None:
    with pytest.raises(KavaError) as error:
        check_policy(policy)
    assert said in str(error.value)
