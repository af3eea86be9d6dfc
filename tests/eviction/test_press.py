"""Scorers in kvpress' convention, run on stored caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from kava_core.errors import KavaError
from kava_core.eviction import CacheBatch, Policy, evict
from kava_core.eviction.check import check_policy
from kava_core.eviction.policies.base import RotaryPhase
from kava_core.eviction.policies.key_norm import KeyNorm
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

    rule: Callable[[CacheBatch], Any]
    kept: Callable[[CacheBatch], Any] = lambda _: None

    def score(self, batch: CacheBatch) -> Any:
        return self.rule(batch)

    def keepable(self, batch: CacheBatch) -> Any:
        return self.kept(batch)


def places(batch: CacheBatch) -> Tensor:
    return batch.token_indices.float()[:, None, None].expand(batch.shape)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Odd(lambda batch: places(batch)[..., 0]), "expected scores [T, L', H] = "),
        (Odd(lambda batch: places(batch).double()), "found [24, 3, 2] of torch.float64"),
        (Odd(lambda batch: places(batch).numpy()), "found <class 'numpy.ndarray'>. Mend the"),
        (Odd(lambda _: None), "policy odd: expected scores [T, L', H] = [24, 3, 2]"),
        (Odd(lambda batch: batch.nothing), "policy odd failed to score (AttributeError: "),
        (Odd(lambda batch: places(batch).log()), "finite: mend the policy, or choose another"),
        (Odd(places, lambda _: torch.ones(3, dtype=torch.bool)), "found [3] of torch.bool"),
        (Odd(places, lambda batch: batch.token_lengths), "found [24] of torch.int64"),
        (
            Odd(places, lambda _: [True]),
            "expected None or [T] = [24] of torch.bool from `keepable`",
        ),
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


def test_a_broken_cache_is_blamed_on_the_cache_whosever_the_policy() -> None:
    batch = naive.make_batch([4, 6])
    batch.keys[7] = torch.nan
    for policy in (KeyNorm(), Odd(lambda given: given.keys.float().mean(-1))):
        with pytest.raises(KavaError) as error:
            evict(batch, policy, [2] * len(batch.layers))
        assert f"policy {policy.name}: record {batch.ids[1]!r}: expected finite" in str(error.value)
        assert "token 3 of the trace" in str(error.value)
        assert "holds broken numbers: run the generate stage again" in str(error.value)


def test_a_lack_of_memory_in_a_scorer_is_a_lack_of_memory() -> None:
    def lacking(*_: Any) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory")

    batch = naive.make_batch([4])
    with pytest.raises(torch.OutOfMemoryError):
        evict(batch, Pressed(lacking), [2] * len(batch.layers))
