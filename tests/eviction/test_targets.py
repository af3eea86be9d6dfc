"""From caches to targets: choice of layers, sharing, rotary phase, and ragged batches at large."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kava_core.errors import KavaError
from kava_core.eviction import POLICIES, CacheBatch, evict, group_layers, make_budgets, merge
from kava_core.rotary import Rotary
from tests.eviction import naive

RKV = POLICIES["rkv"]()


@st.composite
def cuts(draw: st.DrawFn) -> tuple[CacheBatch, list[int], list[list[int]]]:
    """A batch, groups of its chosen layers and a budget for each group."""
    layers = draw(st.integers(1, 4))
    batch = naive.make_batch(
        draw(st.lists(st.integers(1, 40), min_size=1, max_size=6)),
        layers=layers,
        heads=draw(st.integers(1, 3)),
        dim=draw(st.sampled_from([2, 6, 16])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        seed=draw(st.integers(0, 9)),
    )
    chosen = draw(st.lists(st.sampled_from(range(layers)), min_size=1, unique=True))
    groups = group_layers(len(chosen), draw(st.integers(1, len(chosen))))
    kind = draw(st.sampled_from(["uniform", "pyramid"]))
    budgets = make_budgets(kind, len(groups), draw(st.integers(1, 50)))
    return batch.choose_layers(sorted(chosen)), budgets, groups


@given(cut=cuts())
@settings(max_examples=60, deadline=None)
def test_whatever_the_cut_the_slots_are_tokens_of_the_trace_in_order(
    cut: tuple[CacheBatch, list[int], list[list[int]]],
) -> None:
    batch, budgets, groups = cut
    targets = evict(batch, RKV, budgets, share="selection", groups=groups)
    heads, dim = batch.keys.shape[2:]
    shape = (len(batch.ids), len(batch.layers), heads, max(budgets))
    assert targets.slot_positions.shape == shape
    assert targets.keys.shape == targets.values.shape == (*shape, dim)
    assert targets.keys.dtype == batch.keys.dtype
    for record, (first, last) in enumerate(batch.spans):
        for group, budget in zip(groups, budgets, strict=True):
            for layer in group:
                for head in range(heads):
                    positions = targets.slot_positions[record, layer, head]
                    count = int(targets.slot_counts[record, layer, head])
                    kept = positions[:count]
                    assert count == min(last - first, budget)
                    assert torch.equal(kept, kept.unique())  # ascending, each once
                    assert kept.min() >= 0 and kept.max() < last - first
                    assert positions[count:].eq(-1).all()
                    assert torch.equal(positions, targets.slot_positions[record, group[0], head])
                    cache = batch.keys[first:last, batch.layers[layer], head]
                    assert torch.equal(targets.keys[record, layer, head, :count], cache[kept])


@given(cut=cuts(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_other_batch_gives_a_record_the_same_targets(
    cut: tuple[CacheBatch, list[int], list[list[int]]], data: st.DataObject
) -> None:
    batch, budgets, groups = cut
    share = data.draw(st.sampled_from(["selection", "merged"]))
    order = data.draw(st.lists(st.sampled_from(range(len(batch.ids))), min_size=1, max_size=8))
    shuffled = CacheBatch.from_ragged(
        *(
            torch.cat([tensor[slice(*batch.spans[i])] for i in order])
            for tensor in (batch.keys, batch.values, batch.importance)
        ),
        torch.tensor([0, *(batch.lengths[i] for i in order)]).cumsum(0),
        [batch.ids[i] for i in order],
    ).choose_layers(batch.layers)
    expected = evict(batch, RKV, budgets, share=share, groups=groups)
    found = evict(shuffled, RKV, budgets, share=share, groups=groups)
    for field in ("keys", "values", "slot_positions", "slot_counts", "lengths"):
        assert torch.equal(getattr(found, field), getattr(expected, field)[order])


def test_chosen_layers_are_those_of_the_full_result() -> None:
    batch = naive.make_batch([9, 30, 4], layers=6)
    full = evict(batch, RKV, [7] * 6)
    for layers in ([0, 2, 4], [1, 2, 5], [5], [4, 5]):
        some = evict(batch.choose_layers(layers), RKV, [7] * len(layers))
        assert torch.equal(some.slot_positions, full.slot_positions[:, layers])
        assert torch.equal(some.keys, full.keys[:, layers])
        assert torch.equal(some.values, full.values[:, layers])
    with pytest.raises(KavaError, match="layers"):
        batch.choose_layers([6])


def test_a_shared_selection_is_the_best_by_mean_score() -> None:
    batch = naive.make_batch([20, 5], layers=4)
    targets = evict(batch, RKV, [6, 6], share="selection", groups=[[0], [1, 2, 3]])
    alone = evict(batch, RKV, [6, 6, 6, 6])
    assert torch.equal(targets.slot_positions[:, 0], alone.slot_positions[:, 0])
    for record in range(2):
        for head in range(2):
            each = [naive.scores("rkv", {}, batch, record, layer, head, 6) for layer in range(1, 4)]
            mean = [sum(scores) / 3 for scores in zip(*each, strict=True)]
            kept = naive.best(mean, 6)
            for layer in range(1, 4):
                assert targets.slot_positions[record, layer, head, : len(kept)].tolist() == kept


def test_a_merged_cache_has_the_mean_direction_and_the_mean_magnitude() -> None:
    batch = naive.make_batch([20, 5], layers=3, dtype=torch.bfloat16)
    groups = [[0, 1], [2]]
    apart = evict(batch, RKV, [6, 4], share="selection", groups=groups)
    merged = evict(batch, RKV, [6, 4], share="merged", groups=groups)
    assert merged.keys.shape == (2, 2, 2, 6, 8)
    assert merged.keys.dtype == torch.bfloat16
    assert torch.equal(merged.slot_positions, apart.slot_positions[:, [0, 2]])
    assert torch.equal(merged.slot_counts, apart.slot_counts[:, [0, 2]])
    assert torch.equal(merged.keys[:, 1], apart.keys[:, 2])
    for one, several in ((merged.keys, apart.keys), (merged.values, apart.values)):
        first, second = several[:, 0].double(), several[:, 1].double()
        lengths = (first.norm(dim=-1, keepdim=True), second.norm(dim=-1, keepdim=True))
        direction = first / lengths[0] + second / lengths[1]
        expected = direction / direction.norm(dim=-1, keepdim=True) * sum(lengths) / 2
        torch.testing.assert_close(one[:, 0].double(), expected.nan_to_num(), rtol=8e-3, atol=1e-6)


def test_merging_keeps_what_is_equal_and_survives_what_cancels() -> None:
    vector = torch.randn(5, 8)
    torch.testing.assert_close(merge([vector, vector, vector]), vector)
    torch.testing.assert_close(merge([vector, 3 * vector]), 2 * vector)
    assert merge([vector, -vector]).abs().max() < 1e-6
    assert not merge([torch.zeros(2, 4), torch.zeros(2, 4)]).any()


def test_post_rope_targets_are_rotated_to_where_their_tokens_stood() -> None:
    batch = naive.make_batch([20, 3, 8], layers=3, dim=8).choose_layers([0, 2])
    inv_freq = torch.stack([batch.rotary.inv_freq[0] / 2**i for i in range(3)])  # one per layer
    batch = replace(batch, rotary=Rotary(inv_freq, batch.rotary.scaling))
    plain = evict(batch, RKV, [5, 4])
    turned = evict(batch, RKV, [5, 4], rotary_phase="post_rope")
    assert torch.equal(turned.slot_positions, plain.slot_positions)
    assert torch.equal(turned.values, plain.values)
    for record, start in enumerate(batch.cot_start):
        for index, layer in enumerate(batch.layers):
            for head in range(2):
                at = (record, index, head)
                for slot, position in enumerate(plain.slot_positions[at].tolist()):
                    expected = torch.zeros(8).double()
                    if position >= 0:
                        key = plain.keys[at][slot].double()
                        expected = naive.turn(key, start + position, inv_freq[layer])
                    found = turned.keys[at][slot].double()
                    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_does_not_rotate_is_left_as_it_is() -> None:
    batch = naive.make_batch([9])
    none = Rotary(torch.zeros(3, 0).double(), torch.ones(3).double())
    batch = replace(batch, rotary=none)
    policy = POLICIES["rkv"](redundancy_phase="post_rope")
    turned = evict(batch, policy, [4, 4, 4], rotary_phase="post_rope")
    assert torch.equal(turned.keys, evict(batch, RKV, [4, 4, 4]).keys)


def test_engagement_is_the_share_where_something_was_dropped() -> None:
    batch = naive.make_batch([3, 4, 5, 9], layers=2)
    targets = evict(batch, RKV, [4, 8])
    assert targets.engaged.tolist() == [
        [[False] * 2, [False] * 2],
        [[False] * 2, [False] * 2],
        [[True] * 2, [False] * 2],
        [[True] * 2, [True] * 2],
    ]
    assert targets.engaged.float().mean() == 6 / 16


def test_impossible_cuts_are_named() -> None:
    batch = naive.make_batch([5])
    for budgets in ([0, 2, 2], [2, 2], [2, 2, -1], [2.0, 2, 2]):
        with pytest.raises(KavaError, match="budget"):
            evict(batch, RKV, budgets)
    with pytest.raises(KavaError, match="share"):
        evict(batch, RKV, [2, 2, 2], share="cache")  # type: ignore[arg-type]
    for groups in (None, [], [[0, 1]], [[0, 2], [1]], [[0, 1], [1, 2]], [[], [0, 1, 2]]):
        with pytest.raises(KavaError, match="groups"):
            evict(batch, RKV, [2] * len(groups or []), share="merged", groups=groups)
    with pytest.raises(KavaError, match="rotary_phase"):
        evict(batch, RKV, [2, 2, 2], rotary_phase="both")  # type: ignore[arg-type]
    with pytest.raises(KavaError, match="rotary_phase"):
        evict(replace(batch, cot_start=None), RKV, [2, 2, 2], rotary_phase="post_rope")
