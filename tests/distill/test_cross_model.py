"""Students of another depth and basis than the teacher: layer maps, levels, heads, projectors."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig

from kava_core.distill.adapters import add_lora, merge_lora
from kava_core.distill.batches import TargetsDataset
from kava_core.distill.fit import Stopped, fit
from kava_core.distill.match import Match, choose_layers, cut_heads
from kava_core.distill.projectors import ProjectedReasoning, add_projectors, drop_projectors
from kava_core.distill.terms import student_terms
from kava_core.errors import KavaError
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import save_model
from kava_core.settings import Cadence
from kava_core.store import Geometry, ShardShuffleSampler, TargetsStore
from tests.distill import toy
from tests.distill.toy import TRAINING, files, same, toy_objective, toy_traces, write_store
from tests.tiny import COMMON, EOS, PROMPT, tiny_model

# The teacher: 4 layers of 2 heads of 8; students of 2 layers, with the same and with other heads.
DEEP = Geometry.plain(layers=4, kv_heads=2, head_dim=8, hidden_size=32, slots=4)
INDICES = [0, 1, 2, 3, 4]


def student_of(layers: int = 2, seed: int = 1, slots: int = 4, **config: Any) -> LatentReasoner:
    settings = {**COMMON, "num_hidden_layers": layers, **config}
    return LatentReasoner.from_teacher(
        tiny_model(LlamaConfig(**settings), torch.float32, seed=seed),
        latents=slots,
        iterations=2,
        reasoning="jacobi",
        projection=True,
        per_position=True,
        answer_prompt_ids=PROMPT,
        eos_token_id=EOS,
        seed=0,
    )


def reasoned(student: LatentReasoner, batch: dict[str, Any]) -> Any:
    return student(
        *(batch[k] for k in ("question_ids", "question_mask", "answer_ids", "answer_mask"))
    )


# --- layer maps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (4, 4, [0, 1, 2, 3]),
        (2, 4, [0, 3]),
        (3, 5, [0, 2, 4]),
        (3, 4, [0, 2, 3]),  # 1.5 is rounded up
        (4, 12, [0, 4, 7, 11]),
        (16, 28, [0, 2, 4, 5, 7, 9, 11, 13, 14, 16, 18, 20, 22, 23, 25, 27]),
        (5, 3, [0, 1, 1, 2, 2]),  # deeper than the teacher: some rows teach several
        (1, 6, [5]),
    ],
)
def test_a_uniform_stride_keeps_both_ends(student: int, teacher: int, expected: list[int]) -> None:
    found = choose_layers("uniform", student, teacher)
    assert found == expected
    if student > 1:
        exact = [i * (teacher - 1) / (student - 1) for i in range(student)]
        assert found == [math.floor(x + 0.5) for x in exact]


def test_an_explicit_map_is_one_of_the_teachers_layers_for_each_of_the_students() -> None:
    assert choose_layers((2, 2, 0), 3, 4) == [2, 2, 0]
    with pytest.raises(KavaError, match=r"\[0, 3\] names 2 layers, and the student has 3"):
        choose_layers([0, 3], 3, 4)
    with pytest.raises(KavaError, match=r"\[0, 4\] names layers .* Its 4 layers are numbered"):
        choose_layers([0, 4], 2, 4)


def test_heads_are_cut_anew_in_the_order_of_a_tokens_numbers() -> None:
    x = torch.randn(2, 3, 4, 5, 6)  # [B, L, H, M, D]
    other = cut_heads(x, (3, 8))
    assert other.shape == (2, 3, 3, 5, 8)
    for slot in range(5):
        flat = [float(v) for head in range(4) for v in x[1, 2, head, slot]]
        assert [float(v) for head in range(3) for v in other[1, 2, head, slot]] == flat
    assert torch.equal(cut_heads(other, (4, 6)), x)


# --- what is compared -----------------------------------------------------------------------------

MAPS = {
    "uniform": (DEEP, "uniform", [(0, 0), (1, 3)]),
    "explicit": (DEEP, [1, 2], [(0, 1), (1, 2)]),
    "one layer for both": (DEEP, [3, 3], [(0, 3), (1, 3)]),
    "a store of some layers": (
        Geometry(**{**DEEP.model_dump(), "layers": (1, 3), "groups": ((1,), (3,))}),
        "uniform",
        [(1, 1)],  # the student's first layer belongs to a layer without targets
    ),
    "merged layers": (
        Geometry(**{**DEEP.model_dump(), "groups": ((0, 1), (2, 3)), "share": "merged"}),
        "uniform",
        [(0, 0), (1, 1)],
    ),
}


@pytest.mark.parametrize("heads", [2, 4], ids=["same heads", "other heads"])
@pytest.mark.parametrize("case", MAPS)
def test_layers_levels_and_heads_are_matched_as_mapped(
    tmp_path: Path, case: str, heads: int
) -> None:
    """Each term against loops: no projector yet, statistics from the store's manifest."""
    geometry, layer_map, pairs = MAPS[case]
    store = write_store(tmp_path / "store", toy_traces(5), geometry=geometry)
    student = student_of(num_key_value_heads=heads, head_dim=16 // heads).eval()
    match = Match.between(student, store, layer_map)
    assert list(zip(match.layers, match.rows, strict=True)) == pairs
    objective = toy_objective(store, match, kv_distance="mse")
    batch = TargetsDataset(store, chains=False).__getitems__(INDICES)
    terms = student_terms(objective, match)(student, batch)
    reasoning, targets = reasoned(student, batch), batch["targets"].dequantise()
    statistics = store.manifest.statistics
    kv = []
    for b in range(5):
        losses: dict[str, list[float]] = {"keys": [], "values": []}
        for name, ours, theirs, std in (
            ("keys", student.slot_keys(reasoning, "pre_rope"), targets.keys, statistics.keys_std),
            ("values", torch.stack(reasoning.values, 1), targets.values, statistics.values_std),
        ):
            for layer, row in pairs:
                for h in range(2):
                    for m in range(int(targets.slot_counts[b, row, h])):
                        token = torch.cat([ours[b, layer, k, m] for k in range(heads)])
                        gap = (token[8 * h : 8 * h + 8] - theirs[b, row, h, m]) / std[row]
                        losses[name].append(float(gap.square().mean()))
        kv.append(sum(sum(x) / len(x) for x in losses.values()) / 2)
    assert float(terms["kv"]) == pytest.approx(sum(kv) / 5, rel=1e-5)
    codi = [
        float((reasoning.endpoint[:, i + 1] - targets.endpoint[:, t + 1]).abs().mean())
        / statistics.endpoint_std[t + 1]
        for i, t in enumerate(choose_layers(layer_map, 2, 4))
        if (i == 1) == (t == 3)  # both normed, or neither
    ]
    assert float(terms["codi"]) == pytest.approx(sum(codi) / len(codi), rel=1e-5)


def test_a_normed_level_is_compared_with_a_normed_one_only(tmp_path: Path) -> None:
    """A student twice as deep as its teacher: its last two layers belong to the teacher's last, and
    only the last one's hidden states are normed."""
    geometry = Geometry.plain(layers=3, kv_heads=2, head_dim=8, hidden_size=32, slots=4)
    store = write_store(tmp_path / "store", toy_traces(5), geometry=geometry)
    student = student_of(6).eval()
    match = Match.between(student, store)
    assert match.rows == [0, 0, 1, 1, 2, 2]
    assert list(zip(match.own_levels, match.levels, strict=True)) == [
        (0, 0), (1, 1), (2, 1), (3, 2), (4, 2), (6, 3),
    ]  # fmt: skip
    objective = toy_objective(store, match)
    batch = TargetsDataset(store, chains=False).__getitems__(INDICES)
    found = float(student_terms(objective, match)(student, batch)["codi"].detach())
    ours, theirs = reasoned(student, batch).endpoint, batch["targets"].dequantise().endpoint
    std = store.manifest.statistics.endpoint_std
    gaps = [
        (ours[:, i] - theirs[:, t]).abs().mean() / std[t]
        for i, t in ((1, 1), (2, 1), (3, 2), (4, 2), (6, 3))
    ]
    assert found == pytest.approx(float(sum(gaps) / 5), rel=1e-5)


def test_a_map_that_leaves_no_level_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", toy_traces(4), geometry=DEEP)
    student = student_of(1)
    with pytest.raises(KavaError, match=r"layers \[1\], .* normed .*End layer_map in 3, or set"):
        Match.between(student, store, [1])
    assert Match.between(student, store, [1], codi=False).levels == [0]
    assert Match.between(student, store, [3]).levels == [0, 4]


def test_a_student_with_the_teachers_layers_is_matched_as_ever(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", toy_traces(5), geometry=DEEP)
    assert Match.between(student_of(4), store) == Match.of(store)
    assert Match.of(store).levels == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        ({"slots": 6}, {}, r"reasons in 6 latents, and .*store has 4 slots"),
        ({"num_key_value_heads": 4}, {}, r"keys of 2 × 8 = 16 .*student's have 4 × 8 = 32"),
        ({"head_dim": 4}, {}, r"keys of 2 × 8 = 16 .*student's have 2 × 4 = 8"),
        ({"hidden_size": 48, "head_dim": 8}, {}, r"teacher's have 32 numbers, the student's 48\. "
                                                 r"Set alpha_codi to 0"),
        ({}, {"layer_map": [0]}, r"layer_map \[0\] names 1 layers, and the student has 2"),
        ({}, {"layer_map": [0, 9]}, r"layer_map \[0, 9\] names layers that the teacher"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_with_both_values(
    tmp_path: Path, config: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    store = write_store(tmp_path / "store", toy_traces(4), geometry=DEEP)
    with pytest.raises(KavaError, match=said):
        Match.between(student_of(**config), store, **settings)


def test_other_hidden_sizes_are_fine_without_codi(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", toy_traces(5), geometry=DEEP)
    student = student_of(hidden_size=48, head_dim=8)
    match = Match.between(student, store, codi=False)
    batch = TargetsDataset(store, chains=False).__getitems__(INDICES)
    objective = toy_objective(store, alpha_codi=0.0, match=match)
    assert student_terms(objective, match)(student, batch).keys() == {"answer", "kv"}


def test_a_map_that_meets_no_stored_layer_is_refused(tmp_path: Path) -> None:
    geometry = Geometry(**{**DEEP.model_dump(), "layers": (1, 2), "groups": ((1,), (2,))})
    store = write_store(tmp_path / "store", toy_traces(4), geometry=geometry)
    with pytest.raises(
        KavaError, match=r"layers \[0, 3\], and .* keeps targets of layers \[1, 2\]"
    ):
        Match.between(student_of(), store)
    assert Match.between(student_of(), store, kv=False).levels == [0, 1, 4]


# --- projectors -----------------------------------------------------------------------------------


def crossed(store: TargetsStore, student: LatentReasoner, **weights: float) -> tuple[Match, Any]:
    """The match of a student and its terms."""
    match = Match.between(student, store)
    return match, student_terms(toy_objective(store, match=match, **weights), match)


@pytest.mark.parametrize("layers", [4, 2])
@pytest.mark.parametrize("heads", [2, 4], ids=["same heads", "other heads"])
def test_fresh_projectors_change_no_term_by_a_bit(tmp_path: Path, layers: int, heads: int) -> None:
    store = write_store(tmp_path / "store", toy_traces(5), geometry=DEEP)
    student = student_of(layers, num_key_value_heads=heads, head_dim=16 // heads)
    match, terms = crossed(store, student)
    batch = TargetsDataset(store, chains=False).__getitems__(INDICES)
    before = terms(student, batch)
    add_projectors(student, match)
    after = terms(student, batch)
    assert after.keys() == {"answer", "codi", "kv"}
    assert all(torch.equal(before[name], after[name]) for name in before)
    drop_projectors(student)
    assert not isinstance(reasoned(student, batch), ProjectedReasoning)
    assert all(torch.equal(x, terms(student, batch)[name]) for name, x in before.items())


def test_a_projector_maps_each_tokens_numbers_by_its_layers_matrix(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", toy_traces(5), geometry=DEEP)
    student = student_of(num_key_value_heads=4, head_dim=4).eval()
    match, _ = crossed(store, student)
    batch = TargetsDataset(store, chains=False).__getitems__(INDICES)
    keys, values = (x.detach() for x in match.slots(student, reasoned(student, batch)))
    add_projectors(student, match)
    with torch.no_grad():
        for parameter in student.projectors.parameters():
            parameter.normal_()
    projected = reasoned(student, batch)
    for ours, before, w in (
        (projected.slot_keys, keys, student.projectors.keys),
        (projected.slot_values, values, student.projectors.values),
    ):
        for b, layer, m in ((0, 0, 0), (3, 1, 2)):
            token = torch.cat([before[b, layer, h, m] for h in range(2)])
            wanted = token @ (torch.eye(16) + w[layer])
            found = torch.cat([ours[b, layer, h, m] for h in range(2)])
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_projectors_find_the_teachers_basis(tmp_path: Path) -> None:
    """Targets that are a student's own slots, turned by a matrix per layer: with the student
    frozen, the KV term falls to next to nothing, and only projectors can make it."""
    traces = toy_traces(24)
    store = write_store(tmp_path / "store", traces, geometry=DEEP)
    student = student_of().eval().requires_grad_(False)
    match, _ = crossed(store, student)
    batch = TargetsDataset(store, chains=False).__getitems__(list(range(24)))
    generator = torch.Generator().manual_seed(3)
    slots = match.slots(student, reasoned(student, batch))
    turned = []
    for x in slots:
        turn = torch.linalg.qr(torch.randn(2, 16, 16, generator=generator)).Q
        whole = cut_heads(x, (1, 16))[:, :, 0] @ turn
        turned.append(cut_heads(whole[:, :, None], (2, 8)).contiguous())
    mask = torch.ones(turned[0].shape[:-1]).bool()
    objective = toy_objective(store, alpha_codi=0.0, match=match)
    wanted = {**batch, "keys": turned[0], "values": turned[1], "slot_mask": mask}
    reasoning = reasoned(student, batch)

    def loss(keys: Tensor, values: Tensor) -> Tensor:
        return objective.weighted(reasoning, wanted, keys, values)["kv"]

    add_projectors(student, match)
    optimizer = torch.optim.Adam(student.projectors.parameters(), lr=0.03)
    first = float(loss(*slots))
    for _ in range(300):
        optimizer.zero_grad()
        loss(*student.projectors(*slots)).backward()
        optimizer.step()
    projected = reasoned(student, batch)
    assert float(loss(projected.slot_keys, projected.slot_values).detach()) < 0.02 * first


def test_a_saved_student_holds_no_projectors_and_loads(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", toy_traces(5), geometry=DEEP)
    student = student_of()
    untouched = set(student.state_dict())
    match, _ = crossed(store, student)
    adapters = add_lora(student.decoder, toy.lora(2, 2, 0.0, "q_proj"), seed=0, path="it")
    add_projectors(student, match)
    assert {n for n in student.state_dict() if n.startswith("projectors.")} == {
        "projectors.keys",
        "projectors.values",
    }
    drop_projectors(student)
    student.decoder = merge_lora(adapters)
    assert set(student.state_dict()) == untouched
    save_model(tmp_path / "student", student, None)
    loaded = LatentReasoner.from_pretrained(tmp_path / "student").eval()
    question = torch.tensor([[9, 10, 11]])
    assert same(loaded.state_dict(), student.state_dict())
    assert torch.equal(loaded.generate(question), student.eval().generate(question))


class Cross:
    """A run of `fit` on a 2-layer student with projectors and adapters of a 4-layer store."""

    def __init__(self, store: Path, folder: Path) -> None:
        self.store, self.folder = TargetsStore.open(store), folder

    def run(self, stop_at: int | None = None, precision: str = "float32") -> dict[str, Tensor]:
        torch.set_num_threads(1)
        student = student_of(attention_dropout=0.1)
        match, terms = crossed(self.store, student)
        add_lora(student.decoder, toy.lora(2, 4, 0.1, "q_proj", "k_proj"), seed=0, path="it")
        add_projectors(student, match)
        seen = toy.Seen()

        def counted(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
            if seen.number(batch) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return terms(model, batch)

        fit(
            student,
            counted,
            TargetsDataset(self.store, chains=False),
            ShardShuffleSampler(self.store.sizes, seed=0),
            toy.but(TRAINING, steps=6, accumulation=1, precision=precision),
            Cadence(log_every=2, save_every=3, gradient_share_every=3),
            folder=self.folder / "checkpoints",
            curves=self.folder / "curves",
            title="cross",
        )
        return {name: x.detach().clone() for name, x in student.state_dict().items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_stopped_run_goes_on_with_its_projectors(tmp_path: Path, precision: str) -> None:
    write_store(tmp_path / "store", toy_traces(16), geometry=DEEP)
    whole = Cross(tmp_path / "store", tmp_path / "whole")
    weights = whole.run(precision=precision)
    assert weights["projectors.keys"].any() and weights["projectors.values"].any()
    parts = Cross(tmp_path / "store", tmp_path / "parts")
    with pytest.raises(Stopped, match="at step 4 of 6"):
        parts.run(stop_at=4, precision=precision)
    assert same(parts.run(precision=precision), weights)
    assert files(tmp_path / "parts" / "curves") == files(tmp_path / "whole" / "curves")


def test_several_processes_can_train_projectors(tmp_path: Path) -> None:
    """Wrapped as the Trainer wraps it, which looks in the forward for what has a gradient."""
    store = write_store(tmp_path / "store", toy_traces(5), geometry=DEEP)
    student = student_of()
    match, terms = crossed(store, student)
    add_projectors(student, match)
    batch = TargetsDataset(store, chains=False).__getitems__(INDICES)
    sum(terms(student, batch).values()).backward()  # type: ignore[union-attr]
    expected = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(student, find_unused_parameters=True)
        for _ in range(2):  # what one step leaves undone, the next one complains about
            student.zero_grad()
            sum(terms(wrapped, batch).values()).backward()  # type: ignore[union-attr]
    finally:
        distributed.destroy_process_group()
    for name, gradient in expected.items():
        torch.testing.assert_close(student.get_parameter(name).grad, gradient)
    assert expected.keys() >= {"projectors.keys", "projectors.values"}
