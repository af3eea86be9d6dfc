"""Every policy, against slow references and against the promises that all of them make."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kava_core.errors import KavaError
from kava_core.eviction import POLICIES, CacheBatch, evict
from kava_core.eviction.selection import score_all
from tests.eviction import naive

LENGTHS = [7, 1, 23, 12, 2, 8]
NUMERIC = ["rkv", "attention", "redundancy", "key_norm", "value_norm"]
VARIANTS = [
    *((name, {}) for name in POLICIES),
    ("rkv", {"lambda_": 0.0}),
    ("rkv", {"lambda_": 1.0}),
    ("rkv", {"lambda_": 0.5, "redundancy_phase": "post_rope"}),
    ("redundancy", {"redundancy_phase": "post_rope"}),
    ("random", {"seed": 7}),
    ("streaming", {"first": 0}),
    ("streaming", {"first": 30}),
    ("steps", {"last": 2}),
]
every_policy = pytest.mark.parametrize(("name", "settings"), VARIANTS)


def alone(batch: CacheBatch, record: int) -> CacheBatch:
    """One record in freshly allocated tensors of its own."""
    first, last = batch.spans[record]
    return CacheBatch.from_ragged(
        batch.keys[first:last].clone(),
        batch.values[first:last].clone(),
        batch.importance[first:last].clone(),
        [0, last - first],
        [batch.ids[record]],
        rotary=batch.rotary,
        cot_start=[batch.cot_start[record]],
        step_ends=[batch.step_ends[record]],
        results=[batch.results[record]],
    )


@pytest.mark.parametrize(
    ("name", "settings"), [variant for variant in VARIANTS if variant[0] in NUMERIC]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_the_formulas(name: str, settings: dict, dtype: torch.dtype) -> None:
    batch = naive.make_batch(LENGTHS, dtype=dtype)
    scores = score_all(POLICIES[name](**settings), batch)
    for record, (first, last) in enumerate(batch.spans):
        for layer in range(3):
            for head in range(2):
                expected = naive.scores(name, settings, batch, record, layer, head, 4)
                torch.testing.assert_close(
                    scores[first:last, layer, head].double(),
                    torch.tensor(expected, dtype=torch.float64),
                    rtol=1e-5,
                    atol=0,
                )


@every_policy
@pytest.mark.parametrize("budgets", [[4, 4, 4], [9, 3, 1], [1, 1, 1], [40, 23, 7]])
def test_the_best_slots_are_kept_in_temporal_order(
    name: str, settings: dict, budgets: list[int]
) -> None:
    batch = naive.make_batch(LENGTHS)
    targets = evict(batch, POLICIES[name](**settings), budgets)
    assert targets.slot_positions.shape == (6, 3, 2, max(budgets))
    for record, (first, last) in enumerate(batch.spans):
        for layer, budget in enumerate(budgets):
            for head in range(2):
                at = (record, layer, head)
                scores = naive.scores(name, settings, batch, record, layer, head, budget)
                expected = naive.best(scores, budget)
                count = len(expected)
                assert count == min(last - first, budget) or name in ("steps", "results")
                kept = targets.slot_positions[at].tolist()
                assert kept[count:] == [-1] * (max(budgets) - count)
                kept = kept[:count]
                if last - first == 2 and count == 1:  # the two are equally like each other
                    assert scores[kept[0]] == pytest.approx(scores[expected[0]], rel=1e-6)
                else:
                    assert kept == expected
                assert targets.slot_counts[at] == count
                assert targets.engaged[at] == (last - first > count)
                for result, cache in ((targets.keys, batch.keys), (targets.values, batch.values)):
                    assert torch.equal(result[at][:count], cache[first:last, layer, head][kept])
                    assert not result[at][count:].any()


@every_policy
def test_padding_is_never_selected_whatever_it_holds(name: str, settings: dict) -> None:
    batch = naive.make_batch(LENGTHS)
    padded = {
        field: torch.full((6, 30, *getattr(batch, field).shape[1:]), float("nan"))
        for field in ("keys", "values", "importance")
    }
    for record, (first, last) in enumerate(batch.spans):
        for field, tensor in padded.items():
            tensor[record, : last - first] = getattr(batch, field)[first:last]
    again = CacheBatch.from_padded(
        padded["keys"].permute(0, 2, 3, 1, 4),
        padded["values"].permute(0, 2, 3, 1, 4),
        padded["importance"].permute(0, 2, 3, 1),
        torch.tensor(LENGTHS),
        batch.ids,
        rotary=batch.rotary,
        cot_start=batch.cot_start,
    )
    again = replace(again, step_ends=batch.step_ends, results=batch.results)
    policy = POLICIES[name](**settings)
    expected, found = evict(batch, policy, [5, 5, 5]), evict(again, policy, [5, 5, 5])
    assert torch.equal(found.slot_positions, expected.slot_positions)
    assert torch.equal(found.keys, expected.keys)
    assert torch.equal(found.values, expected.values)


@every_policy
@pytest.mark.parametrize("shape", [(3, 2, 8), (2, 3, 5), (1, 1, 64), (4, 2, 33)])
def test_scores_do_not_depend_on_the_batch(
    name: str, settings: dict, shape: tuple[int, int, int]
) -> None:
    if settings.get("redundancy_phase") == "post_rope" and shape[2] % 2:
        pytest.skip("a rotated head has an even dimension")
    layers, heads, dim = shape
    lengths = [*LENGTHS, 130, 64, 65, 1, 257, 700]
    batch = naive.make_batch(lengths, layers=layers, heads=heads, dim=dim, dtype=torch.bfloat16)
    batch = replace(batch, budgets=(5,) * layers)
    policy = POLICIES[name](**settings)
    scores = score_all(policy, batch)
    for record, (first, last) in enumerate(batch.spans):
        single = replace(alone(batch, record), budgets=batch.budgets)
        assert torch.equal(score_all(policy, single), scores[first:last])  # to the bit


@every_policy
def test_a_record_too_long_for_one_piece_is_scored_the_same(name: str, settings: dict) -> None:
    batch = naive.make_batch([40, 9000, 3, 5], layers=2, heads=2, dim=64)
    pieces = [(tokens.stop - tokens.start, records) for tokens, records in batch.pieces()]
    assert pieces[0] == (40, [(0, slice(0, 40))])
    assert [records[0][0] for _, records in pieces[1:-1]] == [1] * 5
    assert pieces[-1] == (8, [(2, slice(0, 3)), (3, slice(3, 8))])
    policy = POLICIES[name](**settings)
    together = evict(batch, policy, [6, 4])
    for record in range(3):
        single = evict(alone(batch, record), policy, [6, 4])
        assert torch.equal(single.slot_positions[0], together.slot_positions[record])


@pytest.mark.parametrize("shared", [0.0, 1.0, 30.0])
def test_long_traces_are_scored_as_exactly_as_short_ones(shared: float) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(4096, 2, 2, 64, generator=generator) + shared
    importance = torch.rand(4096, 2, 2, generator=generator) / 4096
    batch = CacheBatch.from_ragged(keys, keys, importance, [0, 4096], ["long"])
    scores = score_all(POLICIES["rkv"](lambda_=0.3), batch)
    for layer in range(2):
        units = torch.nn.functional.normalize(keys[:, layer].double(), dim=-1).transpose(0, 1)
        cosines = units @ units.transpose(1, 2)  # [H, N, N]
        cosines.diagonal(dim1=1, dim2=2).zero_()
        expected = 0.7 * (-cosines.sum(2) / 4096).softmax(1).T
        expected += 0.3 * importance[:, layer].double()
        torch.testing.assert_close(scores[:, layer].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["redundancy", "rkv", "attention", "key_norm", "value_norm"])
def test_the_earlier_of_equal_tokens_wins(name: str) -> None:
    for length in (9, 100, 2000):
        ones = torch.ones(length, 1, 1, 4)
        batch = CacheBatch.from_ragged(ones, ones, ones[..., 0], [0, length], ["same"])
        targets = evict(batch, POLICIES[name](), [5])
        assert targets.slot_positions.flatten().tolist() == [0, 1, 2, 3, 4]


def test_zero_keys_resemble_nothing() -> None:
    batch = naive.make_batch([6])
    batch.keys[2] = 0
    scores = score_all(POLICIES["redundancy"](), batch)
    expected = naive.scores("redundancy", {}, batch, 0, 1, 1, 3)
    torch.testing.assert_close(scores[:, 1, 1].double(), torch.tensor(expected).double())


def test_random_is_a_fair_draw_that_follows_the_seed_the_id_the_layer_and_the_head() -> None:
    batch = naive.make_batch([50] * 40, layers=4, heads=4, dim=2)
    kept = evict(batch, POLICIES["random"](), [10] * 4).slot_positions
    shares = torch.bincount(kept.flatten(), minlength=50) / (40 * 16)
    assert (shares - 0.2).abs().max() < 0.08
    other = evict(batch, POLICIES["random"](seed=1), [10] * 4).slot_positions
    assert not torch.equal(kept, other)
    assert len({tuple(row) for row in kept.reshape(-1, 10).tolist()}) == 40 * 16
    chosen = evict(batch.choose_layers([1, 3]), POLICIES["random"](), [10] * 2).slot_positions
    assert torch.equal(chosen, kept[:, [1, 3]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_policy
def test_a_gpu_keeps_what_a_cpu_keeps(name: str, settings: dict) -> None:
    batch = naive.make_batch(LENGTHS, dtype=torch.bfloat16)
    policy = POLICIES[name](**settings)
    expected, found = evict(batch, policy, [4, 4, 4]), evict(batch.to("cuda"), policy, [4, 4, 4])
    assert torch.equal(found.slot_positions.cpu(), expected.slot_positions)
    assert torch.equal(found.keys.cpu(), expected.keys)


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("rkv", {"lambda_": 1.2}, "lambda"),
        ("rkv", {"lambda_": -0.1}, "lambda"),
        ("rkv", {"lambda_": float("nan")}, "lambda"),
        ("rkv", {"lambda_": "high"}, "lambda"),
        ("rkv", {"redundancy_phase": "rope"}, "redundancy_phase"),
        ("redundancy", {"redundancy_phase": "none"}, "redundancy_phase"),
        ("streaming", {"first": -1}, "first"),
        ("steps", {"last": 0}, "last"),
        ("steps", {"last": True}, "last"),
        ("random", {"seed": 0.5}, "seed"),
    ],
)
def test_a_bad_setting_is_named(name: str, settings: dict, named: str) -> None:
    with pytest.raises(KavaError, match=named):
        POLICIES[name](**settings)


@every_policy
@pytest.mark.parametrize("budget", [1, 4, 9])
def test_a_record_may_choose_once_for_all_its_layers_and_heads(
    name: str, settings: dict, budget: int
) -> None:
    batch = naive.make_batch(LENGTHS)
    policy = POLICIES[name](**settings)
    targets = evict(batch, policy, [budget] * 3, select="record")
    assert torch.equal(
        targets.slot_positions, targets.slot_positions[:, :1, :1].expand(6, 3, 2, -1)
    )
    scores = score_all(policy, replace(batch, budgets=(budget,) * 3)).double()
    keepable = policy.keepable(batch)
    if keepable is not None:
        scores[~keepable] = -torch.inf
    for record, (first, last) in enumerate(batch.spans):
        kept = [p for p in targets.slot_positions[record, 2, 1].tolist() if p >= 0]
        means = scores[first:last].mean((1, 2))
        assert kept == sorted(kept) and len(kept) == targets.slot_counts[record, 2, 1]
        if len(kept) < last - first and bool(means.isfinite().all()):
            rest = [i for i in range(last - first) if i not in kept]
            assert means[kept].min() >= means[rest].max() - 1e-6
        for layer in range(3):  # keys of the slots are those of the tokens
            assert torch.equal(
                targets.keys[record, layer, 1, : len(kept)], batch.keys[first:last, layer, 1][kept]
            )


def test_steps_keeps_the_last_tokens_of_steps_and_of_too_many_the_later() -> None:
    batch = naive.make_batch([7, 3, 12])  # steps of 3
    (kept,) = {
        tuple(map(tuple, targets.slot_positions[:, 0, 0].tolist()))
        for targets in [evict(batch, POLICIES["steps"](), [3, 3, 3])]
    }
    assert kept == ((2, 5, 6), (2, -1, -1), (5, 8, 11))
    twice = evict(batch, POLICIES["steps"](last=2), [3, 3, 3]).slot_positions[:, 0, 0].tolist()
    assert twice == [[2, 5, 6], [1, 2, -1], [5, 8, 11]]


def test_one_choice_for_all_layers_needs_one_budget() -> None:
    with pytest.raises(KavaError, match="one budget"):
        evict(naive.make_batch([7]), POLICIES["rkv"](), [4, 3, 2], select="record")


def test_steps_needs_to_know_where_steps_end() -> None:
    batch = replace(naive.make_batch([7]), step_ends=None)
    with pytest.raises(KavaError, match="does not say where they end"):
        evict(batch, POLICIES["steps"](), [2, 2, 2])


@pytest.mark.parametrize("results", [None, [[2], []]])
def test_results_must_be_known(results: list[list[int]] | None) -> None:
    batch = replace(naive.make_batch([7, 4]), results=results)
    name = "r1" if results else "r0"
    with pytest.raises(KavaError, match=rf"record '{name}': this policy keeps the results"):
        evict(batch, POLICIES["results"](), [2, 2, 2])


@pytest.mark.parametrize("ends", [[], [3], [3, 3, 7], [5, 3, 7], [0, 7], [3, 8]])
def test_steps_that_do_not_make_up_the_trace_are_refused(ends: list[int]) -> None:
    x = torch.ones(7, 1, 1, 4)
    with pytest.raises(KavaError, match=r"record 'a': expected steps that end one after the other"):
        CacheBatch.from_ragged(x, x, None, [0, 7], ["a"], step_ends=[ends])


def test_a_store_without_importance_is_refused_where_it_is_needed() -> None:
    batch = replace(naive.make_batch([5]), importance=None)
    for policy in (POLICIES["attention"](), POLICIES["rkv"]()):
        with pytest.raises(KavaError, match=r"importance.*generate"):
            evict(batch, policy, [2, 2, 2])
    for policy in (POLICIES["redundancy"](), POLICIES["rkv"](lambda_=0)):
        assert evict(batch, policy, [2, 2, 2]).slot_counts.eq(2).all()


def test_post_rope_redundancy_needs_the_rotation() -> None:
    batch = replace(naive.make_batch([5]), rotary=None)
    with pytest.raises(KavaError, match="redundancy_phase"):
        evict(batch, POLICIES["rkv"](redundancy_phase="post_rope"), [2, 2, 2])


@pytest.mark.parametrize("name", NUMERIC)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_record_is_named(name: str, broken: float) -> None:
    batch = naive.make_batch([4, 6, 5])
    for tensor in (batch.keys, batch.values, batch.importance):
        tensor[7] = broken
    with pytest.raises(KavaError, match="'r1'"):
        evict(batch, POLICIES[name](), [2, 2, 2])


def test_an_empty_trace_is_named() -> None:
    tensor = torch.zeros(4, 1, 1, 2)
    with pytest.raises(KavaError, match="'b'"):
        CacheBatch.from_ragged(tensor, tensor, None, [0, 4, 4], ["a", "b"])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"keys": torch.zeros(4, 2, 3)}, "keys"),
        ({"values": torch.zeros(4, 1, 1, 3)}, "keys and values"),
        ({"importance": torch.zeros(4, 2, 1)}, "importance"),
        ({"offsets": [0, 3]}, "offsets"),
        ({"offsets": []}, "offsets"),
        ({"ids": ["a", "b"]}, "ids"),
        ({"cot_start": [1, 2]}, "positions"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(changed: dict, named: str) -> None:
    tensor = torch.zeros(4, 1, 1, 2)
    good = {"keys": tensor, "values": tensor, "importance": None, "offsets": [0, 4], "ids": ["a"]}
    with pytest.raises(KavaError, match=named):
        CacheBatch.from_ragged(**(good | changed))


@pytest.mark.parametrize("lengths", [[3], [5, 5], [3, 6]])
def test_lengths_that_do_not_fit_the_padding_are_refused(lengths: list[int]) -> None:
    tensor = torch.zeros(2, 1, 1, 5, 2)
    if lengths == [5, 5]:
        assert CacheBatch.from_padded(tensor, tensor, None, lengths, ["a", "b"]).lengths == [5, 5]
        return
    with pytest.raises(KavaError, match="length"):
        CacheBatch.from_padded(tensor, tensor, None, lengths, ["a", "b"])
