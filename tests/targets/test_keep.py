"""`generate.keep: targets`: the targets alone, with the bytes of generate followed by evict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from kava_core.artefacts import publish
from kava_core.errors import KavaError
from kava_core.models.loading import save_model
from kava_core.problems.folder import write_problems
from kava_core.settings import Evict, Generate, Resources
from kava_core.targets.build import Build
from kava_core.targets.evict import build_kv_targets
from kava_core.targets.generate import CutJob, build_targets_alone, build_teacher_kv
from tests.stages.project import digest
from tests.targets.test_generate import SPLITS, TOKENIZER
from tests.tiny import COMMON, tiny_model

IN_PROCESS = Resources(workers=0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with problems/ and teacher/."""
    folder = tmp_path_factory.mktemp("inputs")
    write_problems(folder / "problems", SPLITS, "equations", {})
    config = LlamaConfig(**{**COMMON, "vocab_size": len(TOKENIZER)})
    save_model(folder / "teacher", tiny_model(config, torch.float32), TOKENIZER)
    return folder


def alone(
    inputs: Path, place: Path, generate: Generate, evict: Evict, resources: Resources = IN_PROCESS
) -> Build:
    return build_targets_alone(
        inputs / "problems", inputs / "teacher", generate, evict,
        place / "data/one/kv_targets", resources,
    )  # fmt: skip


def in_two_stages(inputs: Path, place: Path, generate: Generate, evict: Evict) -> dict[str, str]:
    """The bytes of the targets that evict makes of what generate kept."""
    caches, targets = place / "data/two/teacher_kv", place / "data/two/kv_targets"
    problems, teacher = inputs / "problems", inputs / "teacher"
    built = build_teacher_kv(problems, teacher, generate, caches, IN_PROCESS)
    publish((built.folder, caches))
    return digest(build_kv_targets(caches, evict, targets, IN_PROCESS).folder)


@pytest.mark.parametrize(
    ("generate", "evict"),
    [
        ({}, {"budget": 4}),
        (
            {"latent_fraction": 0.5, "keys_bits": 8, "values_bits": 4, "endpoint_bits": 8},
            {"budget": 3, "phase": "post_rope", "keys_bits": 4, "layers": {"last": 2}},
        ),
        (
            {"keys_bits": 32, "values_bits": 32},
            {
                "budget": 2,
                "keys_bits": 8,
                "values_bits": 8,
                "granularity": "channel",
                "calibration_records": 5,
            },
        ),
    ],
)
def test_the_bytes_are_those_of_generate_followed_by_evict(
    inputs: Path, tmp_path: Path, generate: dict[str, Any], evict: dict[str, Any]
) -> None:
    settings = Generate.model_validate({"shard_size": 4, "batch_size": 3, **generate})
    cut = Evict.model_validate(evict)
    kept = settings.model_copy(update={"keep": "targets"})
    built = alone(inputs, tmp_path, kept, cut)
    assert digest(built.folder) == in_two_stages(inputs, tmp_path, settings, cut)
    assert (built.examples, built.tokens) == (11, built.manifest.trace_tokens)


def test_no_cache_is_written_anywhere(inputs: Path, tmp_path: Path) -> None:
    built = alone(inputs, tmp_path, Generate(shard_size=4, keep="targets"), Evict(budget=2))
    written = [path.name for path in tmp_path.rglob("*.safetensors")]
    assert sorted(written) == [f"shard-{k:05d}.safetensors" for k in range(3)]
    assert all(path.parent == built.folder for path in tmp_path.rglob("*.safetensors"))


def test_a_killed_run_does_what_is_missing(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, cut = Generate(shard_size=4, keep="targets"), Evict(budget=2)
    whole = digest(alone(inputs, tmp_path / "whole", settings, cut).folder)
    opened = CutJob.open

    def killed(self: CutJob) -> Any:
        work = opened(self)

        def until_the_last(shard: int) -> Any:
            if shard == 2:
                raise KeyboardInterrupt
            return work(shard)

        return until_the_last

    monkeypatch.setattr(CutJob, "open", killed)
    with pytest.raises(KeyboardInterrupt):
        alone(inputs, tmp_path, settings, cut)
    monkeypatch.undo()
    # A note that a power cut took back: its shard is done again too.
    (notes,) = (tmp_path / "data/.work").glob("*/notes")
    (notes / "shard-00000.json").unlink()
    built = alone(inputs, tmp_path, settings, cut)
    assert built.examples == 4 + 3  # of shards 0 and 2
    assert digest(built.folder) == whole


def test_settings_that_do_not_fit_are_named_before_the_teacher_reads(
    inputs: Path, tmp_path: Path
) -> None:
    settings = Generate(keep="targets")
    with pytest.raises(KavaError, match="layer"):
        alone(inputs, tmp_path, settings, Evict.model_validate({"budget": 2, "layers": [9]}))
    assert not (tmp_path / "data").exists()


def test_no_training_problems(inputs: Path, tmp_path: Path) -> None:
    write_problems(tmp_path / "problems", replace(SPLITS, train=[]), "equations", {})
    with pytest.raises(KavaError, match=r"has no training problems\. Ask `prepare`"):
        build_targets_alone(
            tmp_path / "problems", inputs / "teacher", Generate(keep="targets"), Evict(budget=2),
            tmp_path / "data/one/kv_targets", IN_PROCESS,
        )  # fmt: skip
