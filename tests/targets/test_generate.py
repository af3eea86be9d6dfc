"""A teacher's store: what its passes give, cut where latents end, and said in the manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from kava_core.errors import KavaError
from kava_core.models.loading import load_model, model_fingerprint, save_model
from kava_core.models.phase import rotary_of
from kava_core.models.teacher_pass import TeacherPass
from kava_core.problems.folder import open_problems, write_problems
from kava_core.problems.sources.synthetic import Synthetic
from kava_core.problems.tokenizer import train_tokenizer
from kava_core.problems.traces import TraceEncoder
from kava_core.settings import Generate, Resources
from kava_core.store import TeacherStore
from kava_core.targets.build import Build
from kava_core.targets.generate import build_teacher_kv, store_geometry, teacher_spec
from tests.tiny import ARCHITECTURES, COMMON, assert_near, tiny_model

SPLITS = Synthetic(steps=(2, 4)).splits(11, 1, 1, seed=0, traces="equations")
TOKENIZER = train_tokenizer((p.question + "".join(p.steps) for p in SPLITS.train), 300)
IN_PROCESS = Resources(workers=0)
EXACT = {"keys_bits": 32, "values_bits": 32, "endpoint_bits": 32}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with problems/ and teacher/."""
    write_problems(tmp_path / "problems", SPLITS, "equations", {})
    model = tiny_model(LlamaConfig(**{**COMMON, "vocab_size": len(TOKENIZER)}), torch.float32)
    save_model(tmp_path / "teacher", model, TOKENIZER)
    return tmp_path


def generated(inputs: Path, settings: Generate) -> Build:
    problems, teacher = inputs / "problems", inputs / "teacher"
    return build_teacher_kv(problems, teacher, settings, inputs / "data/one/teacher_kv", IN_PROCESS)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_store_holds_what_the_teacher_knows_of_each_trace(inputs: Path, fraction: float) -> None:
    settings = Generate(shard_size=4, batch_size=3, latent_fraction=fraction, **EXACT)
    store = TeacherStore.open(generated(inputs, settings).folder)
    assert store.manifest.shards == (4, 4, 3)
    encoder = TraceEncoder(TOKENIZER, "equations", fraction)
    teacher = TeacherPass(load_model(str(inputs / "teacher")))
    for number in range(store.shards):
        shard = store.shard(number)
        for row, record in enumerate(shard.records):
            trace = encoder.encode(SPLITS.train[4 * number + row])
            assert replace(trace, answer="") == record
            alone, part = teacher([trace]), slice(*shard.offsets[row : row + 2].tolist())
            for name in ("keys", "values"):
                found = getattr(shard, name)[part].dequantise()
                assert_near(found, getattr(alone, name))
            assert_near(shard.importance[part], alone.importance)
            assert_near(shard.endpoint[row : row + 1].dequantise(), alone.endpoint)


def test_the_manifest_says_what_the_store_was_made_from(inputs: Path) -> None:
    settings = Generate(shard_size=4)
    manifest = generated(inputs, settings).manifest
    assert manifest.settings == {
        "generate": settings.model_dump(mode="json", exclude={"keep"}),
        "traces": "equations",
    }
    assert set(manifest.fingerprints) == {"problems", "teacher", "tokenizer"}
    assert manifest.fingerprints["problems"] == open_problems(inputs / "problems").fingerprint(
        "train"
    )
    assert manifest.fingerprints["teacher"] == model_fingerprint(str(inputs / "teacher"))
    assert manifest.rotary.phase == "pre_rope"
    half = Generate(shard_size=4, latent_fraction=0.5)
    cut = generated(inputs, half).manifest
    assert cut.settings["latent_fraction"] == 0.5
    assert cut.fingerprints == manifest.fingerprints  # the problems are the same ones
    assert cut.trace_tokens < manifest.trace_tokens


def test_no_training_problems(inputs: Path) -> None:
    write_problems(inputs / "problems", replace(SPLITS, train=[]), "equations", {})
    with pytest.raises(KavaError, match=r"has no training problems\. Ask `prepare`"):
        generated(inputs, Generate())


def test_a_trace_that_the_teacher_cannot_hold_is_named_before_any_is_read(inputs: Path) -> None:
    config = LlamaConfig(**{**COMMON, "vocab_size": len(TOKENIZER), "max_position_embeddings": 40})
    save_model(inputs / "teacher", tiny_model(config, torch.float32), TOKENIZER)
    with pytest.raises(KavaError, match=r"problem synthetic-train-\d+ takes \d+ positions"):
        generated(inputs, Generate())
    assert not (inputs / "data").exists()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_spec_is_the_models(architecture: str) -> None:
    model = tiny_model(architecture)
    cache = model(torch.tensor([[9, 10, 11]]), use_cache=True).past_key_values
    keys = cache.layers[0].keys  # [1, H, 3, D]
    spec = teacher_spec(model, Generate(keys_bits=8))
    assert spec.geometry == store_geometry(model.config)
    assert spec.kind == "teacher_kv" and spec.phase == "pre_rope" and spec.codec.keys == "uint8"
    assert (spec.geometry.kv_heads, spec.geometry.head_dim) == (keys.shape[1], keys.shape[3])
    assert spec.geometry.layers == tuple(range(len(cache.layers)))
    assert spec.rotary is not None
    assert spec.rotary.to_json() == rotary_of(model).to_json()
