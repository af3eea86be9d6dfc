"""The plan: from settings and a geometry, and from the store that was made by it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from kava_core.errors import KavaError
from kava_core.eviction import evict
from kava_core.eviction.policies.rkv import RKV
from kava_core.eviction.policies.streaming import Streaming
from kava_core.settings import Evict, Generate
from kava_core.store import Codec, Geometry, TargetsStore, finalise, write_targets_shard
from kava_core.targets.plan import Plan
from kava_core.targets.specs import latent_fraction, store_codec, stored_settings
from tests.eviction import naive
from tests.store.make import FINGERPRINTS, TARGETS, targets_data

SOURCE = Geometry.plain(layers=16, kv_heads=8, head_dim=64, hidden_size=2048)
CASES: dict[str, Evict] = {
    "defaults": Evict(budget=24),
    "pyramid": Evict(budget=24, budget_shape="pyramid"),
    "another λ": Evict(budget=8, policy=RKV(lambda_=0.9, redundancy_phase="post_rope")),
    "merged, some layers": Evict.model_validate(
        {"budget": 4, "policy": "streaming", "layers": {"every": 2}, "share": "merged"}
    ),
    "codes": Evict(budget=4, keys_bits=8, values_bits=4, granularity="tensor"),
}


def made(folder: Path, settings: dict[str, Any]) -> TargetsStore:
    """A store that says it was made with these settings."""
    write_targets_shard(folder, TARGETS, 0, **vars(targets_data(2)))
    finalise(folder, TARGETS, shards=1, settings=settings, fingerprints=FINGERPRINTS)
    return TargetsStore.open(folder)


def test_slots_are_the_widest_layers_budget() -> None:
    even, pyramid = (Plan.of(CASES[name], SOURCE) for name in ("defaults", "pyramid"))
    assert even.budgets == [24] * 16 and even.geometry.slots == 24
    assert sum(pyramid.budgets) == 16 * 24
    assert max(pyramid.budgets) == pyramid.budgets[0] == pyramid.geometry.slots == 47


def test_layers_that_share_have_one_budget_and_one_row() -> None:
    plan = Plan.of(CASES["merged, some layers"], SOURCE)
    assert plan.layers == [1, 3, 5, 7, 9, 11, 13, 15]
    assert plan.groups == [[0, 1], [2, 3], [4, 5], [6, 7]] and plan.budgets == [4] * 4
    assert plan.geometry.rows == ((1, 3), (5, 7), (9, 11), (13, 15))
    assert (plan.geometry.model_layers, plan.geometry.head_dim) == (16, 64)
    assert plan.settings.policy == Streaming()


@pytest.mark.parametrize("case", CASES)
def test_a_store_gives_back_the_plan_it_was_made_by(tmp_path: Path, case: str) -> None:
    settings = CASES[case].model_copy(update={"layers": "all"})
    plain = settings.model_dump(mode="json", by_alias=True)
    store = made(tmp_path, {"evict": plain})
    plan = Plan.of_store(store)
    assert plan.settings == settings
    assert plan == Plan.of(settings, store.geometry)
    assert Plan.of(settings, plan.geometry) == plan  # any geometry of that teacher will do
    assert pickle.loads(pickle.dumps(plan)) == plan


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({}, "none"),
        ({"evict": {"budget": 4, "policy": "psychic"}}, "psychic"),
        ({"evict": {"budget": 4, "budgets": "pyramid"}}, "budgets"),
    ],
)
def test_a_store_that_does_not_say_how_it_was_made(
    tmp_path: Path, settings: dict[str, Any], wrong: str
) -> None:
    store = made(tmp_path, settings)
    with pytest.raises(
        KavaError, match=r"(?s)settings\.evict .*Make it again .*kava evict"
    ) as error:
        Plan.of_store(store)
    assert str(tmp_path) in str(error.value) and wrong in str(error.value).lower()
    with pytest.raises(KavaError, match=r"settings\.generate of its manifest"):
        stored_settings(store, Generate)


def test_the_settings_of_both_stages_are_read_back(tmp_path: Path) -> None:
    generate = Generate(latent_fraction=0.4, model_dtype="bfloat16")
    store = made(tmp_path, {"generate": generate.model_dump(mode="json"), "latent_fraction": 0.4})
    assert stored_settings(store, Generate) == generate
    assert latent_fraction(store) == 0.4


def test_without_a_word_latents_stand_for_the_whole_trace(tmp_path: Path) -> None:
    assert latent_fraction(made(tmp_path, {})) == 1


def test_another_budget_changes_nothing_else() -> None:
    plan = Plan.of(CASES["merged, some layers"], SOURCE)
    wider = plan.with_budget(9)
    assert wider.settings == plan.settings.model_copy(update={"budget": 9})
    assert (wider.layers, wider.groups) == (plan.layers, plan.groups)
    assert wider.budgets == [9] * 4
    assert wider.geometry == plan.geometry.model_copy(update={"slots": 9})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [0, 16]}, "`layers` to hold integers from 0 to 15"),
        ({"layers": {"last": 17}}, "`layers: last` to be an integer from 1 to 16"),
        ({"share": "merged", "share_size": 17}, "groups of 1 to 16 layers"),
    ],
)
def test_what_the_teacher_cannot_give_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(KavaError, match=message):
        Plan.of(Evict.model_validate({"budget": 4, **change}), SOURCE)


@pytest.mark.parametrize("share", ["none", "selection", "merged"])
def test_a_cut_is_eviction_with_the_plans_numbers(share: str) -> None:
    source = Geometry.plain(layers=4, kv_heads=2, head_dim=8, hidden_size=16)
    batch = naive.make_batch([20, 3, 9], layers=4, heads=2, dim=8)
    settings = Evict.model_validate(
        {"budget": 4, "layers": [0, 1, 3], "share": share, "phase": "post_rope"}
    )
    plan = Plan.of(settings, source)
    found = plan.cut(batch)
    expected = evict(
        batch.choose_layers([0, 1, 3]),
        RKV(),
        [4] * (3 if share == "none" else 2),
        share=settings.share,
        groups=None if share == "none" else [[0, 1], [2]],
        rotary_phase="post_rope",
    )
    assert found.keys.shape[1:4] == (len(plan.geometry.rows), 2, plan.geometry.slots)
    for name, value in vars(expected).items():
        assert torch.equal(getattr(found, name), value), name


def test_the_codec_is_the_settings() -> None:
    assert store_codec(CASES["codes"]) == Codec(
        keys="uint8", values="uint4", endpoint="bfloat16", granularity="tensor"
    )
    generate = Generate(keys_bits=32, endpoint_bits=8, half="float16")
    assert store_codec(generate) == Codec(keys="float32", values="float16", endpoint="uint8")
