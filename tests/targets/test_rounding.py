"""Quantisation-aware training: the student's keys and values pass through the store's own codec."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kava_core.distill.batches import TargetsDataset
from kava_core.distill.match import Match
from kava_core.distill.objective import kv_loss
from kava_core.distill.terms import student_terms
from kava_core.errors import KavaError
from kava_core.models.phase import rotary_of
from kava_core.store import (
    Codec,
    Geometry,
    Ranges,
    StoreSpec,
    TargetsStore,
    calibrate,
    finalise,
    write_targets_shard,
)
from kava_core.targets.rounding import Rounding, fake_quantisation
from tests.distill.toy import PLAIN, toy_objective, toy_student, toy_traces, write_store
from tests.tiny import tiny_model

MERGED = Geometry(**{**PLAIN.model_dump(), "groups": ((0, 1), (2,)), "share": "merged"})


def kept(
    folder: Path, keys: Tensor, values: Tensor, geometry: Geometry, codec: Codec
) -> TargetsStore:
    """A store of these keys and values [B, L', H, M, D], every slot filled."""
    traces = [t for t in toy_traces(40) if len(t.cot_ids) >= geometry.slots][: len(keys)]
    places = torch.arange(geometry.slots).expand(*keys.shape[:3], -1).contiguous()
    ranges: Ranges | None = None
    if codec.granularity != "token":
        flat = [x.permute(0, 3, 1, 2, 4).flatten(0, 1) for x in (keys, values)]
        ranges = calibrate([(flat[0], flat[1])], codec.granularity, 95.0)  # clips one in twenty
    folder.mkdir()
    rotary = rotary_of(tiny_model("llama", torch.float32))
    spec = StoreSpec(geometry, codec, "pre_rope", rotary, ranges)
    write_targets_shard(
        folder, spec, 0, traces, keys=keys, values=values,
        slot_counts=torch.full(keys.shape[:3], geometry.slots), slot_positions=places,
        endpoint=torch.randn(len(keys), geometry.model_layers + 1, geometry.hidden_size),
    )  # fmt: skip
    finalise(
        folder, spec, shards=1, settings={},
        fingerprints={"problems": "p", "teacher": "t", "tokenizer": "k", "teacher_kv": "c"},
    )  # fmt: skip
    return TargetsStore.open(folder)


def drawn(geometry: Geometry, records: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (records, len(geometry.rows), geometry.kv_heads, geometry.slots, geometry.head_dim)
    return 2 * torch.randn(shape, generator=generator) + 1, torch.randn(shape, generator=generator)


@pytest.mark.parametrize("geometry", [PLAIN, MERGED], ids=["plain", "merged"])
@pytest.mark.parametrize("granularity", ["token", "channel", "tensor"])
@pytest.mark.parametrize(("keys_bits", "values_bits"), [(8, 4), (4, 16)])
def test_what_comes_back_is_what_the_store_gives_bit_for_bit(
    tmp_path: Path, keys_bits: int, values_bits: int, granularity: str, geometry: Geometry
) -> None:
    keys, values = drawn(geometry)
    codec = Codec.from_bits(keys=keys_bits, values=values_bits, granularity=granularity)
    store = kept(tmp_path / "store", keys, values, geometry, codec)
    stored, rounding, match = (
        store.batch([0, 1, 2]).dequantise(),
        Rounding.of(store),
        Match.of(store),
    )
    for name, x, expected in (("keys", keys, stored.keys), ("values", values, stored.values)):
        ours = x[:, match.rows].requires_grad_(True)
        fake = rounding(name, ours, match.rows)
        assert torch.equal(fake, expected[:, match.rows])
        assert not torch.equal(fake, ours)
        weights = torch.randn(fake.shape)
        (gradient,) = torch.autograd.grad((fake * weights).sum(), ours)
        assert torch.equal(gradient, weights)


def test_half_precision_is_rounded_from_float32(tmp_path: Path) -> None:
    """As under autocast: the codes of bfloat16 numbers, and not bfloat16 numbers of codes."""
    keys, values = drawn(PLAIN)
    store = kept(tmp_path / "store", keys, values, PLAIN, Codec.from_bits(keys=8, values=8))
    half = values.bfloat16().requires_grad_(True)
    rounding = Rounding.of(store)
    fake = rounding("values", half, [0, 1, 2])
    assert fake.dtype == torch.float32
    assert torch.equal(fake, rounding("values", values.bfloat16().float(), [0, 1, 2]))
    (gradient,) = torch.autograd.grad(fake.sum(), half)
    assert gradient.dtype == torch.bfloat16 and torch.equal(gradient, torch.ones_like(gradient))


@pytest.mark.parametrize("bits", [16, 32])
def test_a_store_of_floats_is_refused(tmp_path: Path, bits: int) -> None:
    codec = Codec.from_bits(keys=bits, values=bits, endpoint=8)
    store = write_store(tmp_path / "store", toy_traces(4), codec=codec)
    name = {16: "bfloat16", 32: "float32"}[bits]
    with pytest.raises(
        KavaError, match=rf"keeps keys in {name} and values in {name}\. Set evict\."
    ):
        fake_quantisation(store)


def test_the_kv_term_compares_rounded_with_stored_and_reaches_the_student(tmp_path: Path) -> None:
    codec = Codec.from_bits(keys=4, values=8)
    store = write_store(tmp_path / "store", toy_traces(5), codec=codec)
    student, match, rounding = toy_student().eval(), Match.of(store), fake_quantisation(store)
    batch = TargetsDataset(store, chains=False).__getitems__([0, 1, 2, 3, 4])
    objective = toy_objective(store)
    terms = student_terms(objective, match, rounding=rounding)(student, batch)
    plain = student_terms(objective, match)(student, batch)
    reasoning = student(
        *(batch[k] for k in ("question_ids", "question_mask", "answer_ids", "answer_mask"))
    )
    targets, expected = batch["targets"].dequantise(), 0.0
    for name, ours, std in (
        ("keys", student.slot_keys(reasoning, match.phase), objective.keys_std),
        ("values", torch.stack(reasoning.values, 1), objective.values_std),
    ):
        rounded = rounding(name, ours.detach(), match.rows)
        theirs = getattr(targets, name)
        expected += 0.5 * float(kv_loss(rounded, theirs, targets.slot_mask, "smooth_l1", std))
    assert terms["kv"].item() == pytest.approx(expected, rel=1e-6)
    assert terms["kv"].item() != plain["kv"].item()
    assert all(torch.equal(terms[name], plain[name]) for name in ("answer", "codi"))
    terms["kv"].backward()
    missing = {name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()}
    assert missing == {"eot", "decoder.lm_head.weight"}  # as without rounding


def test_a_student_learns_through_the_codes(tmp_path: Path) -> None:
    """Gradients that pass straight through codes of 4 bits still lead to the targets."""
    store = write_store(tmp_path / "store", toy_traces(4), codec=Codec.from_bits(keys=4, values=4))
    student, rounding = toy_student(), Rounding.of(store)
    terms = student_terms(toy_objective(store, alpha_codi=0.0), Match.of(store), rounding=rounding)
    batch = TargetsDataset(store, chains=False).__getitems__([0, 1, 2, 3])
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = terms(student, batch)["kv"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
