"""Every term against the formula of METHOD section 4, written out in plain Python."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kava_core.distill.batches import TargetsDataset
from kava_core.distill.match import Match, picked
from kava_core.distill.objective import Objective, cross_entropy, endpoint_loss, kv_loss
from kava_core.distill.terms import student_terms
from kava_core.errors import KavaError
from kava_core.models.latent import LatentReasoner, Reasoning
from kava_core.store import Geometry, TargetsStore
from tests.distill.toy import PLAIN, toy_objective, toy_student, toy_traces, write_store

KINDS = ["l1", "smooth_l1", "mse"]
B, L, H, M, D, E = 4, 3, 2, 5, 6, 7


def d(kind: str, x: float, y: float) -> float:
    """One entry's distance."""
    gap = abs(x - y)
    if kind == "l1":
        return gap
    if kind == "mse":
        return gap * gap
    return gap * gap / 2 if gap < 1 else gap - 0.5


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64)


def slot_mask() -> Tensor:
    """Valid slots first; the number differs between records, layers and heads."""
    counts = torch.arange(B * L * H).view(B, L, H) * 7 % M + 1
    return torch.arange(M) < counts[..., None]


# --- cross entropy --------------------------------------------------------------------------------


def plain_cross_entropy(logits: Tensor, ids: Tensor, mask: Tensor) -> float:
    records = []
    for row, tokens, kept in zip(logits.tolist(), ids.tolist(), mask.tolist(), strict=True):
        records.append(
            mean(
                [
                    math.log(sum(math.exp(x) for x in scores)) - scores[token]
                    for scores, token, real in zip(row, tokens, kept, strict=True)
                    if real
                ]
            )
        )
    return mean(records)


def answers() -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]])
    ids = torch.arange(12).view(4, 3) % 5
    return random(4, 3, 5), ids, mask


def test_cross_entropy_is_the_mean_over_tokens_then_records() -> None:
    expected = plain_cross_entropy(*answers())
    assert float(cross_entropy(*answers())) == pytest.approx(expected, rel=1e-6)
    logits, ids, mask = answers()
    over_tokens = sum(
        plain_cross_entropy(logits[i : i + 1], ids[i : i + 1], mask[i : i + 1]) * int(mask[i].sum())
        for i in range(4)
    ) / int(mask.sum())
    assert expected != pytest.approx(over_tokens, rel=1e-3)  # the two means do differ here


def test_padding_of_an_answer_does_not_matter() -> None:
    logits, ids, mask = answers()
    logits.requires_grad_(True)
    loss = cross_entropy(logits, ids, mask)
    loss.backward()
    assert not logits.grad[mask == 0].any()
    assert logits.grad[mask == 1].any(-1).all()
    assert torch.equal(loss, cross_entropy(logits, ids.masked_fill(mask == 0, 3), mask))


# --- keys and values ------------------------------------------------------------------------------


def plain_kv(
    student: Tensor, teacher: Tensor, mask: Tensor, kind: str, std: list[float] | None
) -> float:
    records = []
    for b in range(len(student)):
        slots = []
        for layer in range(L):
            scale = 1.0 if std is None else std[layer]
            for h in range(H):
                for m in range(M):
                    if mask[b, layer, h, m]:
                        x, y = student[b, layer, h, m].tolist(), teacher[b, layer, h, m].tolist()
                        slots.append(
                            mean([d(kind, p / scale, q / scale) for p, q in zip(x, y, strict=True)])
                        )
        records.append(mean(slots))
    return mean(records)


@pytest.mark.parametrize("std", [None, [0.5, 2.0, 30.0]], ids=["plain", "std"])
@pytest.mark.parametrize("kind", KINDS)
def test_kv_is_the_mean_over_valid_slots_then_records(kind: str, std: list[float] | None) -> None:
    student, teacher = random(B, L, H, M, D, seed=1), random(B, L, H, M, D, seed=2)
    scale = None if std is None else torch.tensor(std)
    actual = kv_loss(student, teacher, slot_mask(), kind, scale)
    expected = plain_kv(student, teacher, slot_mask(), kind, std)
    assert float(actual) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_slots_without_a_target_neither_matter_nor_learn(kind: str, rubbish: float) -> None:
    mask = slot_mask()
    std = torch.tensor([0.5, 2.0, 30.0])
    student, teacher = random(B, L, H, M, D, seed=1), random(B, L, H, M, D, seed=2)
    expected = kv_loss(student, teacher, mask, kind, std)
    teacher[~mask] = rubbish
    student.requires_grad_(True)
    actual = kv_loss(student, teacher, mask, kind, std)
    actual.backward()
    assert torch.equal(actual, expected)
    assert not student.grad[~mask].any()
    assert student.grad[mask].any(-1).all()
    moved = student.detach().clone()
    moved[~mask] += 100
    assert torch.equal(kv_loss(moved, teacher, mask, kind, std), expected)


def test_a_record_without_any_target_is_no_division_by_zero() -> None:
    student = random(1, L, H, M, D).requires_grad_(True)
    loss = kv_loss(student, student.detach() + 1, torch.zeros(1, L, H, M).bool(), "l1", None)
    loss.backward()
    assert float(loss) == 0 and not student.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_costs_the_students_rounding_and_no_more(kind: str) -> None:
    """As under autocast: 8 bits of the student are lost, none of the teacher or of the means."""
    generator = torch.Generator().manual_seed(0)
    shape, levels = (2, 3, 2, 61, 16), (2, 4, 501)
    student = torch.randn(shape, generator=generator).bfloat16()
    teacher = torch.randn(shape, generator=generator)
    mask = torch.ones(shape[:-1]).bool()
    std = torch.tensor([0.3, 1.1, 7.0])
    exact = kv_loss(student.double(), teacher.double(), mask, kind, std)
    assert float(kv_loss(student, teacher, mask, kind, std)) == pytest.approx(float(exact), 1e-6)
    student, teacher = (torch.randn(levels, generator=generator) for _ in range(2))
    student, std = student.bfloat16(), torch.tensor([1.0, 0.3, 1.1, 7.0])
    exact = endpoint_loss(student.double(), teacher.double(), kind, std)
    assert float(endpoint_loss(student, teacher, kind, std)) == pytest.approx(float(exact), 1e-6)


# --- endpoint -------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [None, [9.0, 0.5, 2.0, 30.0]], ids=["plain", "std"])
@pytest.mark.parametrize("kind", KINDS)
def test_codi_is_the_mean_over_decoder_levels(kind: str, std: list[float] | None) -> None:
    student, teacher = random(B, L + 1, E, seed=1), random(B, L + 1, E, seed=2)
    entries = [
        d(
            kind,
            float(student[b, level, e]) / (std[level] if std else 1.0),
            float(teacher[b, level, e]) / (std[level] if std else 1.0),
        )
        for b in range(B)
        for level in range(1, L + 1)
        for e in range(E)
    ]
    scale = None if std is None else torch.tensor(std)
    actual = endpoint_loss(student, teacher, kind, scale)
    assert float(actual) == pytest.approx(mean(entries), rel=1e-12)


def test_the_embedding_level_is_left_out_of_codi() -> None:
    student, teacher = random(B, L + 1, E, seed=1), random(B, L + 1, E, seed=2)
    expected = endpoint_loss(student, teacher, "mse", torch.ones(L + 1))
    teacher[:, 0] = math.nan
    student.requires_grad_(True)
    std = torch.tensor([0.0, 1.0, 1.0, 1.0])
    loss = endpoint_loss(student, teacher, "mse", std)
    loss.backward()
    assert torch.equal(loss, expected)
    assert not student.grad[:, 0].any() and student.grad[:, 1:].any(-1).all()


# --- all terms ------------------------------------------------------------------------------------


def test_the_teachers_side_gets_no_gradient() -> None:
    teacher = random(B, L, H, M, D).requires_grad_(True)
    student = random(B, L, H, M, D, seed=1).requires_grad_(True)
    kv_loss(student, teacher, slot_mask(), "mse", torch.ones(L)).backward()
    assert teacher.grad is None and student.grad is not None
    teacher = random(B, L + 1, E).requires_grad_(True)
    student = random(B, L + 1, E, seed=1).requires_grad_(True)
    endpoint_loss(student, teacher, "l1", torch.ones(L + 1)).backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_cut_in_two_gives_the_mean_of_its_halves(kind: str) -> None:
    logits, ids, tokens = answers()
    keys, wanted, mask = random(B, L, H, M, D), random(B, L, H, M, D, seed=1), slot_mask()
    ends, targets = random(B, L + 1, E), random(B, L + 1, E, seed=1)
    std = torch.tensor([0.5, 2.0, 3.0, 4.0])

    def terms(rows: slice) -> list[float]:
        return [
            float(cross_entropy(logits[rows], ids[rows], tokens[rows])),
            float(kv_loss(keys[rows], wanted[rows], mask[rows], kind, std[1:])),
            float(endpoint_loss(ends[rows], targets[rows], kind, std)),
        ]

    halves = [mean(list(pair)) for pair in zip(terms(slice(2)), terms(slice(2, 4)), strict=True)]
    assert terms(slice(4)) == pytest.approx(halves, rel=1e-6)


def made_up() -> tuple[Reasoning, dict[str, Tensor], Tensor, Tensor]:
    """A reasoning, its batch, and the student's keys and values, all random."""
    logits, ids, tokens = answers()
    with_end = torch.cat((logits, random(4, 1, 5, seed=8)), 1)  # one row past the last token
    reasoning = Reasoning(
        logits=with_end,
        keys=[],
        values=[],
        latent_positions=torch.zeros(4, M),
        endpoint=random(B, L + 1, E),
        chain_losses=random(4, 3, seed=9).abs() * tokens.flip(0),
    )
    batch = {
        "answer_ids": ids,
        "answer_mask": tokens,
        "chain_mask": tokens.flip(0),
        "keys": random(B, L, H, M, D, seed=3),
        "values": random(B, L, H, M, D, seed=4),
        "slot_mask": slot_mask(),
        "endpoint": random(B, L + 1, E, seed=5),
    }
    return reasoning, batch, random(B, L, H, M, D, seed=6), random(B, L, H, M, D, seed=7)


def objective(**changes: Any) -> Objective:
    return Objective(
        **{
            "alpha_kv": 3.0,
            "alpha_codi": 5.0,
            "w_cot": 0.25,
            "kv_distance": "smooth_l1",
            "codi_distance": "l1",
            "keys_std": torch.tensor([1.0, 2.0, 3.0]),
            "values_std": torch.tensor([0.1, 0.2, 0.3]),
            "endpoint_std": torch.tensor([9.0, 1.0, 2.0, 4.0]),
            **changes,
        }
    )


def test_the_loss_is_the_weighted_sum_of_method_section_4() -> None:
    reasoning, batch, keys, values = made_up()
    terms = objective().weighted(reasoning, batch, keys, values)
    mask = slot_mask()
    kv = 0.5 * (
        plain_kv(keys, batch["keys"], mask, "smooth_l1", [1.0, 2.0, 3.0])
        + plain_kv(values, batch["values"], mask, "smooth_l1", [0.1, 0.2, 0.3])
    )
    codi = mean(
        [
            abs(float(x - y)) / std
            for level, std in ((1, 1.0), (2, 2.0), (3, 4.0))
            for x, y in zip(
                reasoning.endpoint[:, level].flatten(),
                batch["endpoint"][:, level].flatten(),
                strict=True,
            )
        ]
    )
    answer = plain_cross_entropy(reasoning.logits[:, :3], batch["answer_ids"], batch["answer_mask"])
    assert reasoning.chain_losses is not None
    chain = mean(
        [
            mean([loss for loss, real in zip(row, kept, strict=True) if real])
            for row, kept in zip(
                reasoning.chain_losses.tolist(), batch["chain_mask"].tolist(), strict=True
            )
        ]
    )
    assert {name: float(x) for name, x in terms.items()} == {
        "answer": pytest.approx(answer, rel=1e-6),
        "cot": pytest.approx(0.25 * chain, rel=1e-6),
        "codi": pytest.approx(5 * codi, rel=1e-6),
        "kv": pytest.approx(3 * kv, rel=1e-6),
    }


@pytest.mark.parametrize(("weight", "term"), [("alpha_kv", "kv"), ("alpha_codi", "codi"),
                                              ("w_cot", "cot")])  # fmt: skip
def test_a_weight_of_zero_turns_a_term_off(weight: str, term: str) -> None:
    reasoning, batch, keys, values = made_up()
    every = objective().weighted(reasoning, batch, keys, values)
    fewer = objective(**{weight: 0.0}).weighted(reasoning, batch, keys, values)
    assert every.keys() - fewer.keys() == {term}
    assert all(torch.equal(every[name], x) for name, x in fewer.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_of_every_term_match_finite_differences(kind: str) -> None:
    std, mask = torch.tensor([0.5, 2.0, 30.0]), slot_mask()
    student = random(B, L, H, M, D, seed=1).requires_grad_(True)
    teacher = random(B, L, H, M, D, seed=2)
    assert torch.autograd.gradcheck(lambda x: kv_loss(x, teacher, mask, kind, std), student)
    ends = random(B, L + 1, E, seed=3).requires_grad_(True)
    wanted, levels = random(B, L + 1, E, seed=4), torch.tensor([9.0, 0.5, 2.0, 30.0])
    assert torch.autograd.gradcheck(lambda x: endpoint_loss(x, wanted, kind, levels), ends)
    logits, ids, tokens = answers()
    assert torch.autograd.gradcheck(
        lambda x: cross_entropy(x, ids, tokens), logits.requires_grad_()
    )


# --- with a student and a store -------------------------------------------------------------------


def all_objective(store: TargetsStore, **changes: Any) -> Objective:
    distances = {"kv_distance": "mse", "codi_distance": "mse"}
    return toy_objective(store, **{"w_cot": 1.0, **distances, **changes})


def terms_of(
    student: LatentReasoner, store: TargetsStore, indices: list[int], **changes: Any
) -> dict[str, Tensor]:
    terms = student_terms(all_objective(store, **changes), Match.of(store))
    return terms(student, TargetsDataset(store, chains=True).__getitems__(indices))


def test_no_term_depends_on_how_records_are_batched(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", toy_traces(6))
    student = toy_student().eval()
    together = terms_of(student, store, [0, 1, 2, 3, 4, 5])
    assert together.keys() == {"answer", "cot", "codi", "kv"}
    halves = [terms_of(student, store, half) for half in ([4, 0, 2], [1, 5, 3])]
    for name, value in together.items():
        parts = mean([float(half[name]) for half in halves])
        assert float(value) == pytest.approx(parts, rel=1e-5), name


def test_statistics_come_from_the_whole_store(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", toy_traces(30))
    chosen = all_objective(store)
    assert chosen.keys_std is not None and chosen.values_std is not None
    # the toy's layers were drawn with spreads 1, 2, 3 and half of that
    assert chosen.keys_std.tolist() == pytest.approx([1, 2, 3], rel=0.1)
    assert chosen.values_std.tolist() == pytest.approx([0.5, 1, 1.5], rel=0.1)
    assert chosen.endpoint_std is not None and chosen.endpoint_std.shape == (4,)
    off = all_objective(store, kv_std=False, codi_std=False)
    assert off.keys_std is None and off.values_std is None and off.endpoint_std is None


@pytest.mark.parametrize("phase", ["pre_rope", "post_rope"])
def test_keys_are_matched_in_the_phase_of_the_store(tmp_path: Path, phase: str) -> None:
    store = write_store(tmp_path / "store", toy_traces(5), phase=phase)
    student = toy_student().eval()
    batch = TargetsDataset(store, chains=False).__getitems__([0, 1, 2, 3, 4])
    reasoning = student(
        *(batch[k] for k in ("question_ids", "question_mask", "answer_ids", "answer_mask"))
    )
    keys = torch.stack(reasoning.keys, 1)
    assert Match.of(store).phase == phase
    if phase == "pre_rope":
        # Turn the cached keys back, position by position; heads are 8 wide, so 4 frequencies.
        plain = torch.empty_like(keys)
        for b in range(5):
            for m in range(4):
                position = int(reasoning.latent_positions[b, m])
                assert position == int(batch["question_mask"][b].sum()) + 1 + m  # past Q and <bot>
                for i in range(4):
                    angle = position * 10000 ** (-i / 4)
                    x, y = keys[b, :, :, m, i], keys[b, :, :, m, i + 4]
                    plain[b, :, :, m, i] = x * math.cos(angle) + y * math.sin(angle)
                    plain[b, :, :, m, i + 4] = y * math.cos(angle) - x * math.sin(angle)
        keys = plain
    targets = batch["targets"].dequantise()
    std = store.manifest.statistics
    expected = 0.5 * sum(
        plain_store_kv(x, y, targets.slot_mask, spread)
        for x, y, spread in (
            (keys, targets.keys, std.keys_std),
            (torch.stack(reasoning.values, 1), targets.values, std.values_std),
        )
    )
    terms = terms_of(student, store, [0, 1, 2, 3, 4])
    assert float(terms["kv"]) == pytest.approx(expected, rel=1e-5)


def plain_store_kv(student: Tensor, teacher: Tensor, mask: Tensor, std: tuple[float, ...]) -> float:
    records = []
    for b in range(len(student)):
        slots = [
            float(((student[b, i, h, m] - teacher[b, i, h, m]).double() / std[i]).square().mean())
            for i in range(student.shape[1])
            for h in range(student.shape[2])
            for m in range(student.shape[3])
            if mask[b, i, h, m]
        ]
        records.append(mean(slots))
    return mean(records)


@pytest.mark.parametrize(
    ("layers", "groups", "share"),
    [((1, 2), ((1,), (2,)), "none"), ((0, 1, 2), ((0, 1), (2,)), "merged"),
     ((0, 2), ((0, 2),), "merged")],
    ids=["subset", "merged", "merged subset"],
)  # fmt: skip
def test_layers_left_out_are_untaught_and_merged_rows_teach_several(
    tmp_path: Path, layers: tuple[int, ...], groups: tuple[tuple[int, ...], ...], share: Any
) -> None:
    geometry = Geometry(**{**PLAIN.model_dump(), "layers": layers, "groups": groups,
                           "share": share})  # fmt: skip
    store = write_store(tmp_path / "store", toy_traces(4), geometry=geometry)
    match = Match.of(store)
    assert match.layers == list(layers)
    assert match.rows == [row for row, group in enumerate(groups) for _ in group]
    student = toy_student().eval()
    batch = TargetsDataset(store, chains=False).__getitems__([0, 1, 2, 3])
    reasoning = student(
        *(batch[k] for k in ("question_ids", "question_mask", "answer_ids", "answer_mask"))
    )
    targets = batch["targets"].dequantise()
    keys, values = student.slot_keys(reasoning, "pre_rope"), torch.stack(reasoning.values, 1)
    std = store.manifest.statistics
    expected = 0.0
    for ours, theirs, spread in (
        (keys, targets.keys, std.keys_std),
        (values, targets.values, std.values_std),
    ):
        picked = [(layer, row) for row, group in enumerate(groups) for layer in group]
        expected += 0.5 * plain_store_kv(
            torch.stack([ours[:, layer] for layer, _ in picked], 1),
            torch.stack([theirs[:, row] for _, row in picked], 1),
            torch.stack([targets.slot_mask[:, row] for _, row in picked], 1),
            tuple(spread[row] for _, row in picked),
        )
    terms = terms_of(student, store, [0, 1, 2, 3])
    assert float(terms["kv"]) == pytest.approx(expected, rel=1e-5)


def test_half_and_coded_targets_are_worked_out_before_they_are_compared(tmp_path: Path) -> None:
    from kava_core.store import Codec

    student = toy_student().eval()
    exact = write_store(tmp_path / "exact", toy_traces(4))
    expected = float(terms_of(student, exact, [0, 1, 2, 3])["kv"])
    for bits, tolerance in ((16, 1e-2), (8, 2e-2)):
        codec = Codec.from_bits(keys=bits, values=bits, endpoint=bits)
        store = write_store(tmp_path / str(bits), toy_traces(4), codec=codec)
        near = float(terms_of(student, store, [0, 1, 2, 3])["kv"])
        assert near != expected and near == pytest.approx(expected, rel=tolerance)


def test_without_targets_only_the_answer_and_the_chain_are_learnt(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", toy_traces(4))
    nothing = toy_objective(None, w_cot=1.0)
    batch = TargetsDataset(store, chains=True).__getitems__([0, 1])
    del batch["targets"]
    assert student_terms(nothing, None)(toy_student(latents=0), batch).keys() == {"answer", "cot"}


def test_a_batch_out_of_the_ordinary_is_divided_by_the_stores_statistics(tmp_path: Path) -> None:
    """Were it by its own, a batch a hundred times as large would lose as much as any other."""
    store = write_store(tmp_path / "store", toy_traces(6))
    student, objective = toy_student().eval(), all_objective(store)
    batch = TargetsDataset(store, chains=False).__getitems__([0, 1])
    reasoning = student(
        *(batch[k] for k in ("question_ids", "question_mask", "answer_ids", "answer_mask"))
    )
    targets = batch["targets"].dequantise()
    keys, values = Match.of(store).slots(student, reasoning)

    def losses(factor: float) -> dict[str, float]:
        wanted = {
            **batch, "keys": factor * targets.keys, "values": factor * targets.values,
            "slot_mask": targets.slot_mask, "endpoint": factor * targets.endpoint,
        }  # fmt: skip
        scaled = dataclasses.replace(reasoning, endpoint=factor * reasoning.endpoint)
        terms = objective.weighted(scaled, wanted, factor * keys, factor * values)
        return {name: float(value.detach()) for name, value in terms.items()}

    once, often = losses(1.0), losses(100.0)
    for name in ("kv", "codi"):
        assert often[name] == pytest.approx(1e4 * once[name], rel=1e-4), name


@pytest.mark.parametrize(
    ("weights", "reads"),
    [({"alpha_codi": 0.0}, "none"), ({}, "endpoint")],
)
def test_terms_are_the_same_of_what_they_read_alone(
    tmp_path: Path, weights: dict[str, float], reads: Any
) -> None:
    store = write_store(tmp_path / "store", toy_traces(6))
    objective = toy_objective(store, alpha_kv=0.0, **weights)
    student, terms = toy_student().eval(), student_terms(objective, Match.of(store))
    every, needed = (
        terms(student, TargetsDataset(store, chains=False, reads=x).__getitems__([4, 0, 2]))
        for x in ("all", reads)
    )
    assert every.keys() == needed.keys()
    assert all(torch.equal(every[name], x) for name, x in needed.items())


def test_all_rows_in_order_are_not_copied() -> None:
    x = random(2, 3, 4)
    assert picked(x, [0, 1, 2]) is x
    for places in ([0, 1], [0, 2, 1], [0, 0, 1, 2]):
        assert torch.equal(picked(x, places), x[:, places])


@pytest.mark.parametrize("missing", ["chain_ids", "chain_mask"])
def test_half_a_chain_is_refused(tmp_path: Path, missing: str) -> None:
    store = write_store(tmp_path / "store", toy_traces(2))
    batch = TargetsDataset(store, chains=True).__getitems__([0, 1])
    del batch[missing]
    with pytest.raises(KavaError, match="chain_ids and chain_mask belong together"):
        student_terms(all_objective(store), Match.of(store))(toy_student(), batch)


# --- what the KV term reaches ---------------------------------------------------------------------


def trained(student: LatentReasoner, store: TargetsStore) -> set[str]:
    """Parameters with a gradient from the KV term alone."""
    student.zero_grad()
    terms_of(student, store, [0, 1, 2, 3, 4])["kv"].backward()
    return {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}


def test_the_kv_term_reaches_all_of_the_student_but_the_named(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", toy_traces(5))
    student = toy_student()
    everything = {name for name, _ in student.named_parameters()}
    # `<eot>` stands after the latents, and the untied head makes logits of what comes after it.
    assert everything - trained(student, store) == {"eot", "decoder.lm_head.weight"}
    # Two iterations have pushed the last two of the four initial latents out.
    assert student.initial_latents.grad.any(-1).tolist() == [True, True, False, False]


def test_the_kv_term_trains_lora_b_and_not_the_frozen_weights(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", toy_traces(5))
    student = toy_student(adapted=True)
    reached = trained(student, store)
    adapters = {name for name, _ in student.named_parameters() if "lora_" in name}
    assert {n for n in adapters if "lora_B" in n} <= reached
    assert not {n for n in adapters if "lora_A" in n} & reached  # zero as long as B is
    own = {"bot", "initial_latents", *(f"projection.{part}.{x}" for part in ("up", "down", "norm")
                                       for x in ("weight", "bias"))}  # fmt: skip
    assert reached == own | {n for n in adapters if "lora_B" in n}
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    assert adapters <= trained(student, store)


def test_only_the_lower_layers_learn_from_a_lower_row(tmp_path: Path) -> None:
    """The first layer's keys of the last iteration still see every layer, through the latents."""
    geometry = Geometry(**{**PLAIN.model_dump(), "layers": (0,), "groups": ((0,),)})
    store = write_store(tmp_path / "store", toy_traces(5), geometry=geometry)
    student = toy_student()
    assert {f"decoder.model.layers.{i}.mlp.up_proj.weight" for i in range(3)} <= trained(
        student, store
    )
    student = toy_student(iterations=0)
    reached = trained(student, store)
    assert "decoder.model.layers.0.self_attn.k_proj.weight" in reached
    assert not any(f"layers.{i}." in name for i in (1, 2) for name in reached)
